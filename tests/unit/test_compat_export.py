"""Foreign checkpoints through export: graphs equal to the oracles, only what a network can do, and a report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.__main__ import main
from export.engines import EXPORTERS, Job
from export.onnx import export_onnx
from mtgr.bundle import load_bundle
from mtgr.engines.baseline import BaselineEngine
from mtgr.engines.onnx import OnnxEngine
from mtgr.errors import InvalidRequestError
from mtgr.loading import load_model, save_converted
from mtgr.manifest import Manifest
from tests.unit.foreign import (
    Case,
    batch_of,
    random_visitor,
    research_case,
    rows_of,
    stu_case,
    write_native,
    write_safetensors,
)

TOLERANCE = 1e-5
CASES = {
    "research": research_case,
    "dlrmv3": lambda: stu_case(categories=4, layers=1),
}  # the others in tests/server
SIZES = ((20, 8), (45, 5), (0, 3), (3, 1))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_exported_graphs_answer_as_the_oracle(name: str, tmp_path: Path) -> None:
    case: Case = CASES[name]()
    loaded = save_converted(load_model(write_safetensors(case, tmp_path / "source")), tmp_path / "converted")
    repository = tmp_path / "repository"
    with ExitStack() as stack:
        manifests = export_onnx(loaded.checkpoint, repository, stack)
    generator = np.random.default_rng(3)
    visitors = [random_visitor(case, generator, *size) for size in SIZES]
    context, candidates = batch_of([rows_of(loaded.checkpoint, visitor) for visitor in visitors], extra=2)
    inputs = {"context": context.numpy(), "candidates": candidates.numpy()}
    path = repository / "mtgr_onnx_rank" / "1" / "model.onnx"
    scores = OnnxEngine(path).infer(inputs, ["task_scores"])["task_scores"]
    for row, visitor in zip(scores, visitors, strict=True):
        expected = case.scores(visitor)
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=0, atol=TOLERANCE)
    # What TensorRT's parser stops at, and what would make a graph depend on lengths.
    nodes = {node.op_type for node in onnx.load(path).graph.node}
    assert not nodes & {"Range", "ConstantOfShape", "Loop", "If", "Scan"}

    assert all(manifest.details["operations"] == list(loaded.model.config.operations) for manifest in manifests)
    if case.similarities is None:
        assert [manifest.model for manifest in manifests] == ["mtgr_onnx_rank"]
        return
    engine = OnnxEngine(repository / "mtgr_onnx_retrieve" / "1" / "model.onnx")
    answer = engine.infer({"context": context.numpy()}, ["items", "scores"])
    for row, values, visitor in zip(answer["items"], answer["scores"], visitors, strict=True):
        expected = case.similarities(visitor)
        np.testing.assert_allclose(values, expected[row - 2], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(values, np.sort(expected)[::-1][: len(values)], rtol=0, atol=TOLERANCE)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Conversions go to ``build/`` of where the command is run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_exports_a_public_checkpoint_and_reports(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = stu_case(layers=1)
    write_native(case, in_folder / "downloads" / "dlrm")
    arguments = ["--checkpoint", "downloads/dlrm", "--model-repository", "repository"]
    (in_folder / "repository" / "mtgr_onnx_retrieve" / "1").mkdir(parents=True)  # of a checkpoint that could retrieve
    assert main([*arguments, "--engine", "baseline", "--engine", "onnx"]) == 0
    out = capsys.readouterr().out
    assert "downloads/dlrm: meta-dlrmv3, non_sparse.ckpt; it can rank." in out
    assert "_hstu_transducer._stu_module._stu_layers.*._uvqk_weight" in out
    assert "unused: _hstu_transducer._input_preprocessor._additional_embedding_mlp.0.weight" in out
    assert "using the public checkpoint downloads/dlrm (meta-dlrmv3)." in out
    assert (in_folder / "build" / "converted" / "downloads-dlrm" / "model.safetensors").is_file()
    repository = in_folder / "repository"
    assert not (repository / "mtgr_onnx_retrieve").exists()
    assert Manifest.load(repository / "mtgr_onnx_rank" / "1").details["operations"] == ["rank"]
    assert load_bundle(repository).store().user_ids() == []

    engine = BaselineEngine(repository / "mtgr_baseline" / "1")
    checkpoint = load_model(in_folder / "build" / "converted" / "downloads-dlrm").checkpoint
    visitor = random_visitor(case, np.random.default_rng(0), 10, 4)
    context, candidates = (rows[None] for rows in rows_of(checkpoint, visitor))
    found = engine.infer({"context": context, "candidates": candidates})["task_scores"][0]
    np.testing.assert_allclose(found, case.scores(visitor), rtol=0, atol=TOLERANCE)
    with pytest.raises(InvalidRequestError, match="ranks candidates and cannot retrieve items; send candidates"):
        engine.infer({"context": context})

    assert main([*arguments, "--engine", "baseline", "--engine", "onnx", "--if-stale"]) == 0
    assert "holds the engines of build/converted/downloads-dlrm already" in capsys.readouterr().out


def test_options_of_the_command_line_count_more_than_the_file(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_safetensors(research_case(), in_folder / "research")
    (in_folder / "research" / "mtgr.json").write_text('{"num_heads": 7}')
    arguments = ["--checkpoint", "research", "--model-repository", "repository", "--engine", "baseline"]
    assert main(arguments) == 2
    assert "option num_heads is 7, which does not divide" in capsys.readouterr().err
    assert not (in_folder / "repository").exists()
    assert main([*arguments, "--option", "num_heads=2", "--option", "max_history=30"]) == 0
    assert "contexts have at most 30 events" in capsys.readouterr().out


def test_vllm_says_that_it_has_no_such_network(tmp_path: Path) -> None:
    loaded = load_model(write_safetensors(research_case(), tmp_path / "research"))
    job = Job(loaded.checkpoint, loaded.path, tmp_path)
    assert EXPORTERS["vllm"].problem(job) == "vllm: the plugin has no meta-research network; export other engines."
