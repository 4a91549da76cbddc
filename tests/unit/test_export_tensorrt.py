"""The tensorrt strategy as `make export` installs it: built, compared as it serves, and left out where it cannot be.

TensorRT and CUDA are not on this machine. The fake module runs a plan's graph in ONNX Runtime, on buffers that the
project's own runner fills; how a plan is built is tested in test_tensorrt.py.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export import artifacts, plans, tensorrt_host
from export.__main__ import export, is_installed
from export.differences import SHAPES
from export.engines import EXPORTERS, Job
from export.last_token import LastToken
from export.onnx import export_artifact
from export.opset import OPSET_17
from export.plans import PlanEngine, build_checked_plan
from export.precision import Precision
from export.report import table
from export.rows import random_rows
from export.tensorrt_device import Gpu
from export.tensorrt_files import check_plan
from export.trace import OPSET
from mtgr.bundle import STORE_FILE
from mtgr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mtgr.errors import ConfigurationError
from mtgr.features.sqlite import write_store
from mtgr.features.store import UserRecord
from mtgr.manifest import Manifest
from tests.unit.fake_tensorrt import compile_cudart, running_tensorrt
from tests.unit.models import small_catalog, small_config, small_schema, spread_model

SCHEMA = small_schema(max_history=600)
CATALOG = small_catalog()
RANK, RETRIEVE = MODELS = ("mtgr_tensorrt_rank", "mtgr_tensorrt_retrieve")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tensorrt") / "checkpoint"
    directory.mkdir()
    config = small_config(max_positions=1024)
    save_checkpoint(Checkpoint(spread_model(config, SCHEMA, CATALOG, 0), config, SCHEMA, CATALOG), directory)
    write_store(directory / STORE_FILE, [("ann", UserRecord({"age": 30}))])
    return directory


@pytest.fixture(scope="module")
def cudart(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_cudart(tmp_path_factory.mktemp("cudart"))


@pytest.fixture(scope="module")
def written_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Manifest]:
    """``export_artifact``, which takes seconds, called once for each graph of this module's one checkpoint."""
    known: dict[Any, Path] = {}

    def export_once(
        checkpoint: Checkpoint,
        model: str,
        directory: Path,
        precision: Precision,
        seed: int = 0,
        force: bool = False,
        opset: int = OPSET,
        last: LastToken = "products",
    ) -> Manifest:
        key = (model, precision, seed, force, opset, last)
        if key not in known:
            known[key] = tmp_path_factory.mktemp("graph") / "graph"
            export_artifact(checkpoint, model, known[key], precision, seed, force, opset, last)
        shutil.copytree(known[key], directory)
        return Manifest.load(directory)

    return export_once


@pytest.fixture(params=["11.4.0"])
def trt(
    request: pytest.FixtureRequest, cudart: str, written_once: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A host with TensorRT and an H200."""
    monkeypatch.setattr(plans, "export_artifact", written_once)
    monkeypatch.setattr(artifacts, "export_artifact", written_once)
    module = running_tensorrt(request.param)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setenv("MTGR_CUDART", cudart)
    monkeypatch.setattr(tensorrt_host, "first_gpu", lambda: Gpu("NVIDIA H200", (9, 0)))
    return module


def job_of(checkpoint: Path, repository: Path, **changes: Any) -> Job:
    return Job(load_checkpoint(checkpoint), checkpoint, repository, plan_precision="fp32", **changes)


def is_current(job: Job) -> bool:
    return is_installed(job, job.directory / STORE_FILE, [EXPORTERS["tensorrt"]])


def test_plans_are_installed_with_their_parity_and_found_current(trt: Any, checkpoint: Path, tmp_path: Path) -> None:
    job = job_of(checkpoint, tmp_path)
    export(job, strategies=["tensorrt"])
    for name in MODELS:
        version = tmp_path / name / "1"
        manifest = Manifest.load(version)
        assert (manifest.model, manifest.checkpoint) == (name, job.checkpoint.hash)
        assert manifest.versions["tensorrt"] == "11.4.0"
        assert 0 < manifest.parity["max_abs_error"] <= 1e-5
        assert manifest.parity["shapes"] == [list(shape) for shape in SHAPES]
        assert manifest.details["retrieve_count"] == job.checkpoint.model.retrieve_count
        check_plan(version / "model.plan", manifest)
        # What a host of this kind asks for by name is the same file.
        assert (version / "model.sm90.plan").samefile(version / "model.plan")
        assert (version.parent / "configs" / "sm90.pbtxt").is_file()
    assert is_current(job)
    assert not is_current(dataclasses.replace(job, plan_precision="fp16"))
    trt.__version__ = "11.5.0"
    assert not is_current(job)


def test_what_other_hosts_built_stays_while_it_is_of_the_same_model(
    trt: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(checkpoint, tmp_path)
    export(job, strategies=["tensorrt"])
    before = (tmp_path / RANK / "1" / "model.plan").read_bytes()
    monkeypatch.setattr(tensorrt_host, "first_gpu", lambda: Gpu("NVIDIA A100", (8, 0)))
    assert not is_current(job)
    export(job, strategies=["tensorrt"])
    assert Manifest.load(tmp_path / RANK / "1").details["variants"] == ["sm80", "sm90"]
    assert (tmp_path / RANK / "1" / "model.sm90.plan").read_bytes() == before
    assert {path.name for path in (tmp_path / RANK / "configs").iterdir()} == {"sm80.pbtxt", "sm90.pbtxt"}
    installed = Manifest.load(tmp_path / RANK / "1")
    for change in (
        {"checkpoint": "another"},
        {"precision": "fp16"},
        {"details": {**installed.details, "template": ""}},
    ):
        dataclasses.replace(installed, **change).save(tmp_path / RANK / "1")
        export(job, strategies=["tensorrt"])
        assert Manifest.load(tmp_path / RANK / "1").details["variants"] == ["sm80"]


def test_a_plan_that_differs_is_refused_and_the_rest_is_installed(
    trt: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(checkpoint, tmp_path)
    trt.shared.off = 3e-5
    with pytest.raises(ConfigurationError, match=f"{RANK} in fp32 was not installed: it differs from PyTorch by 3"):
        export(job, strategies=["tensorrt"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    for name in ("onnx", "vllm"):
        monkeypatch.setitem(EXPORTERS, name, dataclasses.replace(EXPORTERS[name], problem=lambda job: "not here"))
    export(job)  # no strategy by name: what cannot be is left out
    assert (tmp_path / "mtgr_baseline" / "1").is_dir()
    assert not (tmp_path / RANK).exists()
    assert f"skipped ({RANK} in fp32 was not installed: it differs" in capsys.readouterr().out


def test_without_a_gpu_the_table_says_so(checkpoint: Path, tmp_path: Path) -> None:
    problem = EXPORTERS["tensorrt"].problem(job_of(checkpoint, tmp_path))
    assert problem is not None
    assert problem.startswith("tensorrt: TensorRT cannot be imported")
    with pytest.raises(ConfigurationError, match="TensorRT cannot be imported"):
        export(job_of(checkpoint, tmp_path), strategies=["tensorrt"])


def test_a_plan_that_cannot_be_loaded_is_one_sentence(
    trt: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTGR_CUDART", str(tmp_path / "nothing.so"))
    with pytest.raises(ConfigurationError, match="libcudart is not found"):
        export(job_of(checkpoint, tmp_path / "repository"), strategies=["tensorrt"])


@pytest.mark.parametrize("trt", ["8.6.0"], indirect=True)
def test_8_6_gets_graphs_of_the_opset_that_it_reads(trt: Any, checkpoint: Path, tmp_path: Path) -> None:
    job = job_of(checkpoint, tmp_path)
    export(job, strategies=["tensorrt"])
    manifest = Manifest.load(tmp_path / RETRIEVE / "1")
    assert (manifest.details["opset"], manifest.parity["max_abs_error"] <= 1e-5) == (str(OPSET_17), True)
    assert onnx.load_model_from_string(trt.shared.graph).opset_import[0].version == OPSET_17
    assert is_current(job)


@pytest.mark.parametrize("trt", ["8.6.0"], indirect=True)
@pytest.mark.parametrize(
    ("refused", "way"), [("products", "last token by sums, two profiles"), ("all", "batch 1 alone")]
)
def test_8_6_gets_a_retrieving_plan_all_the_same(
    trt: Any, checkpoint: Path, tmp_path: Path, refused: str, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A builder that stops at attention with one query in batches of more than one, or at retrieval as such."""

    def refuses(config: Any) -> bool:
        largest = max(profile["context"][2][0] for profile in config.profiles)
        ranks = b"candidates" in trt.shared.graph
        return largest > 1 and not ranks and (refused == "all" or b"ReduceL2" in trt.shared.graph)

    trt.shared.refuses = refuses
    job = job_of(checkpoint, tmp_path)
    export(job, strategies=["tensorrt"])
    manifest = Manifest.load(tmp_path / RETRIEVE / "1")
    assert manifest.details["way"] == way
    assert len(manifest.details["left"]) == (0 if refused == "products" else 4)
    assert manifest.parity["max_abs_error"] <= 1e-5
    assert ("(built with batch 1 alone, after 4 other ways)" in capsys.readouterr().out) == (refused == "all")
    text = (tmp_path / RETRIEVE / "config.pbtxt").read_text(encoding="utf-8")
    assert ("max_batch_size: 1\n" in text) == (refused == "all")
    assert (tmp_path / RETRIEVE / "configs" / "sm90.pbtxt").read_text(encoding="utf-8") == text.replace(
        "model.plan", "model.sm90.plan"
    )
    assert Manifest.load(tmp_path / RANK / "1").details["way"] == "two profiles"
    assert is_current(job)


@pytest.mark.parametrize("trt", ["8.6.0"], indirect=True)
def test_8_6_may_build_an_fp16_plan_of_the_fp32_graph(
    trt: Any, checkpoint: Path, tmp_path: Path, written_once: Callable[..., Manifest]
) -> None:
    """And of the typed graph where its builder refuses that."""
    loaded = load_checkpoint(checkpoint)
    written_once(loaded, "mtgr_onnx_rank", tmp_path / "graph", "fp16", 0, False, OPSET_17)
    (tmp_path / "plan").mkdir()
    plan = tmp_path / "plan" / "model.plan"
    manifest = plans.build_plan(loaded, "mtgr_onnx_rank", tmp_path / "graph", plan)
    assert (manifest.precision, manifest.details["constraints"]) == ("fp16", "none")
    assert manifest.details["way"] == "16 bits anywhere, two profiles"
    assert manifest.parity["max_abs_error_of_pytorch"] > 0  # what fp16 is allowed, not fp32

    def refuses(config: Any) -> bool:
        graph = onnx.load_model_from_string(trt.shared.graph).graph
        return all(tensor.data_type != onnx.TensorProto.FLOAT16 for tensor in graph.initializer)

    trt.shared.refuses = refuses
    manifest = plans.build_plan(loaded, "mtgr_onnx_rank", tmp_path / "graph", plan)
    assert (manifest.precision, manifest.details["way"]) == ("fp16", "two profiles")
    assert list(manifest.details["left"]) == ["16 bits anywhere, two profiles", "16 bits anywhere, one profile"]


def test_rows_are_padded_to_buckets_and_cut_again(
    trt: Any, checkpoint: Path, tmp_path: Path, written_once: Callable[..., Manifest]
) -> None:
    loaded = load_checkpoint(checkpoint)
    written_once(loaded, "mtgr_onnx_rank", tmp_path / "graph", "fp32", 0, False, OPSET)
    manifest = build_checked_plan(loaded, "mtgr_onnx_rank", tmp_path / "graph", tmp_path / "plan" / "model.plan")
    assert manifest.parity["max_abs_error"] <= 1e-5
    context, candidates = random_rows(SCHEMA, CATALOG, 2, 70, 17, np.random.default_rng(0))
    engine = PlanEngine(tmp_path / "plan" / "model.plan")
    seen = []
    run = engine._plan.run
    engine._plan.run = lambda inputs, outputs: seen.append({k: v.shape for k, v in inputs.items()}) or run(inputs)
    answer = engine.infer({"context": context.numpy(), "candidates": candidates.numpy()}, ["task_scores"])
    assert seen == [{"context": (2, 128, SCHEMA.width), "candidates": (2, 64, SCHEMA.width)}]
    with torch.inference_mode():
        np.testing.assert_allclose(answer["task_scores"], loaded.model(context, candidates).numpy(), rtol=0, atol=1e-5)
    engine.close()


def test_artifacts_are_graphs_and_plans_with_their_errors(trt: Any, checkpoint: Path, tmp_path: Path) -> None:
    job = job_of(checkpoint, tmp_path / "repository")
    lines = list(artifacts.export_artifacts(job, tmp_path / "artifacts", ["fp32"]))
    assert [line.strategy for line in lines] == ["artifact", "tensorrt"] * 2
    for line in lines:
        assert line.state == "written"
        assert line.manifest is not None
        assert line.directory == tmp_path / "artifacts" / "fp32" / line.manifest.model
        assert Manifest.load(line.directory) == line.manifest
        assert line.manifest.parity["max_abs_error"] <= 1e-5
    assert "not checked" not in table(lines, tmp_path)
    trt.shared.off = 1e-3
    again = list(artifacts.export_artifacts(job, tmp_path / "again", ["fp32"]))
    assert again[1].state.startswith(f"failed ({RANK} in fp32 was not installed: it differs from PyTorch")
    assert not (tmp_path / "again" / "fp32" / RANK).exists()


def test_without_tensorrt_artifacts_are_graphs_alone(
    checkpoint: Path, tmp_path: Path, written_once: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "export_artifact", written_once)
    lines = list(artifacts.export_artifacts(job_of(checkpoint, tmp_path / "repository"), tmp_path, ["fp32"]))
    assert [line.state for line in lines[::2]] == ["written"] * 2
    for line, name in zip(lines[1::2], MODELS, strict=True):
        assert line.state.startswith(f"skipped ({name} in fp32: TensorRT cannot be imported")
        assert line.manifest is None
