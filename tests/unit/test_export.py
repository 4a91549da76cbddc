"""Exports of a small random network: checked at many shapes, described in a manifest, installed whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import export.onnx as onnx_export
from export.__main__ import export, is_installed, main
from export.differences import SHAPES
from export.engines import EXPORTERS, Job
from export.graphs import RankGraph, RetrieveGraph
from export.precision import TOLERANCE
from export.rows import random_rows
from mtgr.bundle import STORE_FILE, load_bundle
from mtgr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mtgr.engines.baseline import BaselineEngine
from mtgr.engines.onnx import OnnxEngine
from mtgr.errors import ConfigurationError, InvalidRequestError
from mtgr.features.sqlite import write_store
from mtgr.features.store import UserRecord
from mtgr.manifest import MANIFEST_FILE, Manifest
from tests.unit.models import batch, random_user, small_catalog, small_config, small_schema, spread_model

STRATEGIES = ("baseline", "onnx")  # vllm is exported in tests/engine
ENGINES = tuple(model for name in STRATEGIES for model in EXPORTERS[name].models)
# Long enough for every shape that export checks at.
SCHEMA = small_schema(max_history=600)
CATALOG = small_catalog()
# Batch, profile, history, real-time tokens and candidates; other shapes than those that export itself looks at.
OTHER_SHAPES = (
    (1, 1, 0, 0, 1),
    (1, 3, 0, 0, 7),
    (2, 3, 1, 0, 1),
    (3, 3, 20, 9, 16),
    (5, 2, 60, 33, 2),
    (1, 3, 200, 99, 33),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_checkpoint(directory: Path, seed: int = 0, **overrides: Any) -> Path:
    """A checkpoint as training leaves it, feature store included."""
    config = small_config(max_positions=1024, **overrides)
    model = spread_model(config, SCHEMA, CATALOG, seed)
    directory.mkdir()
    save_checkpoint(Checkpoint(model, config, SCHEMA, CATALOG), directory)
    write_store(directory / STORE_FILE, [("ann", UserRecord({"age": 30}))])
    return directory


def run_export(checkpoint: Path, repository: Path) -> None:
    export(Job(load_checkpoint(checkpoint), checkpoint, repository), strategies=STRATEGIES)


def installed(checkpoint: Path, repository: Path) -> bool:
    job = Job(load_checkpoint(checkpoint), checkpoint, repository)
    return is_installed(job, checkpoint / STORE_FILE, [EXPORTERS[name] for name in STRATEGIES])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("export") / "checkpoint")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with every engine; tests that change it take a copy."""
    repository = tmp_path_factory.mktemp("exported")
    run_export(checkpoint, repository)
    return repository


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "repository"))


def fingerprint(directory: Path) -> dict[str, str]:
    """Hash of every file, and every directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in directory.rglob("*")
    }


def test_the_checked_shapes_hold_the_smallest_and_several_more() -> None:
    assert (1, 1, 1) in SHAPES
    assert len(set(SHAPES)) >= 5
    for axis in range(3):
        assert len({shape[axis] for shape in SHAPES}) >= 3


@pytest.mark.parametrize("shape", OTHER_SHAPES, ids=str)
def test_graphs_agree_with_the_network_at_other_shapes(
    exported: Path, checkpoint: Path, shape: tuple[int, ...]
) -> None:
    size, profile, history, realtime, candidates = shape
    generator = np.random.default_rng(5)
    users = [
        random_user(
            SCHEMA,
            generator,
            profile=profile,
            history=history if index == 0 else int(generator.integers(0, history + 1)),
            realtime=realtime if index == 0 else int(generator.integers(0, realtime + 1)),
            candidates=candidates,
        )
        for index in range(size)
    ]
    context, rows = batch(users)
    model = load_checkpoint(checkpoint).model
    with torch.inference_mode():
        expected = model(context, rows).numpy()
        items, logits = (tensor.numpy() for tensor in model.retrieve(context))
    if expected.size > 30:
        assert expected.std() >= 0.05, "a comparison of constants would prove nothing"
    inputs = {"context": context.numpy(), "candidates": rows.numpy()}
    rank = OnnxEngine(exported / "mtgr_onnx_rank" / "1" / "model.onnx").infer(inputs, ["task_scores"])
    np.testing.assert_allclose(rank["task_scores"], expected, rtol=0, atol=TOLERANCE)
    found = OnnxEngine(exported / "mtgr_onnx_retrieve" / "1" / "model.onnx").infer(
        {"context": context.numpy()}, ["items", "scores"]
    )
    np.testing.assert_array_equal(found["items"], items)
    np.testing.assert_allclose(found["scores"], logits, rtol=0, atol=1e-4)
    assert found["items"].dtype == np.int32
    baseline = BaselineEngine(exported / "mtgr_baseline" / "1").infer(inputs)
    np.testing.assert_allclose(baseline["task_scores"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("max_history", [100, 200])
def test_random_rows_are_as_long_as_they_shall_be(max_history: int) -> None:
    schema = small_schema(max_history=max_history)
    for seed in range(20):
        rows, _ = random_rows(schema, CATALOG, 2, schema.max_context, 3, np.random.default_rng(seed))
        assert (rows[0, :, 0] > 0).all()
        assert rows[0, :, 1].tolist() == list(range(schema.max_context))
    with pytest.raises(ConfigurationError, match=f"have {schema.max_context} tokens at most, not 999"):
        random_rows(schema, CATALOG, 1, 999, 3, np.random.default_rng(0))


def test_manifests_say_what_was_made_of_what(exported: Path, checkpoint: Path) -> None:
    expected = load_checkpoint(checkpoint)
    width, tasks, count = SCHEMA.width, len(SCHEMA.tasks), expected.model.retrieve_count
    manifests = {name: Manifest.load(exported / name / "1") for name in ENGINES}
    for name, manifest in manifests.items():
        assert (manifest.model, manifest.checkpoint, manifest.schema) == (name, expected.hash, SCHEMA.hash)
        assert manifest.precision == "fp32"
        assert manifest.versions["torch"] == torch.__version__
        assert manifest.details["retrieve_count"] == count == 16
    for name in ("mtgr_onnx_rank", "mtgr_onnx_retrieve"):
        manifest = manifests[name]
        assert manifest.versions["onnx"] == onnx.__version__
        assert manifest.versions["onnxruntime"] == onnxruntime.__version__
        assert manifest.parity["shapes"] == [list(shape) for shape in SHAPES]
        assert 0 <= manifest.parity["max_abs_error"] <= TOLERANCE
        model = onnx.load(exported / name / "1" / "model.onnx")
        assert manifest.details["nodes"] == len(model.graph.node)
        # What TensorRT's parser stops at, and what would make a graph depend on lengths.
        assert not {node.op_type for node in model.graph.node} & {"Range", "ConstantOfShape", "Loop", "If", "Scan"}
    assert manifests["mtgr_onnx_rank"].shapes == {
        "context": ["int32", -1, -1, width],
        "candidates": ["int32", -1, -1, width],
        "task_scores": ["float", -1, -1, tasks],
    }
    assert manifests["mtgr_onnx_retrieve"].shapes == {
        "context": ["int32", -1, -1, width],
        "items": ["int32", -1, count],
        "scores": ["float", -1, count],
    }


def test_directories_are_complete_and_hold_nothing_else(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == sorted([*ENGINES, "mtgr_features"])
    assert [path.name for path in (exported / "mtgr_features").iterdir()] == ["bundle"]
    for name in ENGINES:
        config = (exported / name / "config.pbtxt").read_text()
        assert f'name: "{name}"' in config
        assert "${" not in config
        assert (exported / name / "1" / MANIFEST_FILE).is_file()
    assert load_bundle(exported).schema == SCHEMA
    assert load_bundle(exported).store().user_ids() == ["ann"]


class _OffRank(RankGraph):
    """A graph whose scores are wrong in the fifth decimal, for the first candidate only."""

    def forward(self, context: Tensor, candidates: Tensor) -> Tensor:
        scores = super().forward(context, candidates)
        first = candidates[..., 1:2] == candidates[:, :1, 1:2]
        return torch.where(first, scores + 3e-5, scores)


class _OffRetrieve(RetrieveGraph):
    """A graph that returns the best items in the reverse order."""

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        items, scores = super().forward(context)
        return items.flip(1), scores


@pytest.mark.parametrize(("broken", "model"), [(_OffRank, "mtgr_onnx_rank"), (_OffRetrieve, "mtgr_onnx_retrieve")])
def test_a_graph_that_misses_the_tolerance_leaves_everything_as_it_was(
    copy: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, broken: type, model: str
) -> None:
    loaded = load_checkpoint(checkpoint)
    graph = next(entry for entry in onnx_export.graphs_of(loaded) if entry.name == model)
    wrong = dataclasses.replace(graph, module=broken(loaded.model))
    monkeypatch.setattr(onnx_export, "graphs_of", lambda *_: (wrong,))
    before = fingerprint(copy)
    assert f"{model}/1/model.onnx" in before
    with pytest.raises(ConfigurationError, match=f"{model} in fp32 was not installed: it differs from PyTorch by"):
        run_export(checkpoint, copy)
    # Not the baseline and the bundle either: engines of two checkpoints would rank differently.
    assert fingerprint(copy) == before


def test_a_first_export_that_fails_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_written(module: object, path: Path, *rest: object) -> None:
        path.write_bytes(b"not a graph")

    monkeypatch.setattr(onnx_export, "save_graph", half_written)
    with pytest.raises(ConfigurationError, match="ONNX Runtime cannot load"):
        run_export(checkpoint, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not (tmp_path / "mtgr_onnx_rank").exists()
    assert not (tmp_path / "mtgr_features" / "staging").exists()


def test_scores_that_are_not_numbers_do_not_pass(checkpoint: Path) -> None:
    poisoned = {"task_scores": np.full((1, 1, 3), np.nan, dtype=np.float32)}
    loaded = load_checkpoint(checkpoint)
    graph = onnx_export.graphs_of(loaded)[0]
    context, rows = batch([random_user(SCHEMA, np.random.default_rng(0), candidates=1)])
    assert graph.error(poisoned, loaded, context, rows) == float("inf")
    assert graph.error(poisoned, loaded, context, rows.repeat(1, 2, 1)) == float("inf")  # another shape


def test_an_export_of_this_checkpoint_is_installed(exported: Path, checkpoint: Path) -> None:
    assert installed(checkpoint, exported)


@pytest.mark.parametrize("missing", [*ENGINES, "mtgr_features"])
def test_a_missing_part_is_not_installed(copy: Path, checkpoint: Path, missing: str) -> None:
    shutil.rmtree(copy / missing)
    assert not installed(checkpoint, copy)


@pytest.mark.parametrize(
    "change", [{"checkpoint": "another"}, {"versions": {"torch": "1.0"}}, {"unknown_key": 1}], ids=str
)
@pytest.mark.parametrize("model", ENGINES)
def test_a_stale_engine_is_not_installed(copy: Path, checkpoint: Path, model: str, change: dict[str, object]) -> None:
    path = copy / model / "1" / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert not installed(checkpoint, copy)


def test_another_checkpoint_is_not_installed(exported: Path, tmp_path: Path) -> None:
    assert not installed(make_checkpoint(tmp_path / "other", seed=1), exported)


def test_command_line_skips_what_is_installed(copy: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fingerprint(copy)
    arguments = ["--checkpoint", str(checkpoint), "--model-repository", str(copy), "--if-stale"]
    engines = [word for name in STRATEGIES for word in ("--engine", name)]
    assert main([*arguments, *engines]) == 0
    assert "holds the engines" in capsys.readouterr().out
    assert fingerprint(copy) == before


@pytest.mark.parametrize("options", [[], ["--if-stale"]])
def test_command_line_without_a_checkpoint_says_what_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    arguments = ["--checkpoint", str(tmp_path / "nothing"), "--model-repository", str(tmp_path / "repository")]
    assert main([*arguments, *options]) == 2
    assert "run `make train`" in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize("name", ["context", "candidates"])
@pytest.mark.parametrize("value", [-1, 10**6])
def test_the_baseline_refuses_ids_out_of_range(checkpoint: Path, name: str, value: int) -> None:
    engine = BaselineEngine(checkpoint)
    context, candidates = random_rows(SCHEMA, CATALOG, 2, 9, 4, np.random.default_rng(0))
    inputs = {"context": context.numpy(), "candidates": candidates.numpy()}
    assert np.isfinite(engine.infer(inputs)["task_scores"]).all()
    inputs[name][1, -1 if name == "candidates" else 0, SCHEMA.item_column] = value
    with pytest.raises(InvalidRequestError, match=f"{name} has an id out of range in column {SCHEMA.item_column}"):
        engine.infer(inputs)
