"""Graphs of one shape for each bucket that is asked for: written, checked where contexts are padded, and listed."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from export.fixed import export_fixed, fixed_shapes, main
from export.precision import Precision
from mtgr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mtgr.errors import ConfigurationError
from mtgr.manifest import Manifest
from tests.unit.models import small_catalog, small_config, small_schema, spread_model

SCHEMA = small_schema(max_history=100)  # contexts of 202 tokens, padded to 256
CATALOG = small_catalog()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fixed")
    config = small_config()
    save_checkpoint(Checkpoint(spread_model(config, SCHEMA, CATALOG, 0), config, SCHEMA, CATALOG), directory)
    return directory


def test_shapes_are_buckets_up_to_the_longest_context() -> None:
    assert fixed_shapes(200, [1], [64, 192, 256, 384], [16, 64]) == [
        (1, 64, 16), (1, 64, 64), (1, 192, 16), (1, 192, 64), (1, 256, 16), (1, 256, 64),
    ]  # fmt: skip
    assert len(fixed_shapes(2048)) == 22
    for arguments, sentence in (
        (([1], [100], [16]), "100 is no bucket of context"),
        (([1], [64], [17]), "17 is no bucket of candidates; choose among 16, 64"),
        (([0], [64], [16]), "at least one user"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            fixed_shapes(200, *arguments)


def test_the_command_writes_checked_graphs_and_a_table(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = ["--batch", "1", "--context", "256", "2048", "--candidates", "16"]
    assert main(["--checkpoint", str(checkpoint), "--out", str(tmp_path), "--precision", "fp16", *shapes]) == 0
    rank, retrieve = tmp_path / "mtgr_onnx_rank" / "b1-n256-k16", tmp_path / "mtgr_onnx_retrieve" / "b1-n256"
    assert sorted(path.parent for path in tmp_path.rglob("model.onnx")) == [rank, retrieve]
    out = capsys.readouterr().out
    for folder in (rank, retrieve):
        manifest = Manifest.load(folder)
        assert (manifest.precision, manifest.shapes["context"]) == ("fp16", ["int32", 1, 256, SCHEMA.width])
        assert 0 < manifest.parity["max_abs_error"] <= 2 * manifest.parity["max_abs_error_of_pytorch"]
        assert "Shape" not in {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
        assert f"{manifest.model}  " in out.partition("state")[2]


def test_what_cannot_be_done_is_one_sentence(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_checkpoint(checkpoint)
    with pytest.raises(ConfigurationError, match="INT8 is made of graphs with dynamic lengths"):
        export_fixed(loaded, "mtgr_onnx_rank", tmp_path / "x", (1, 64, 16), "int8")
    with pytest.raises(ConfigurationError, match="nothing to do for mtgr_onnx_what"):
        export_fixed(loaded, "mtgr_onnx_what", tmp_path / "x", (1, 64, 16))
    assert main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "y"), "--context", "65"]) == 2
    assert "65 is no bucket of context" in capsys.readouterr().err
    precision: Precision = "fp32"
    other = Checkpoint(spread_model(loaded.config, SCHEMA, CATALOG, 1), loaded.config, SCHEMA, CATALOG)
    monkeypatch.setattr("export.fixed.graph_of", lambda *_: graph_of(other))
    with pytest.raises(ConfigurationError, match="b1-n64-k16 in fp32 was not written: it differs from PyTorch"):
        export_fixed(loaded, "mtgr_onnx_rank", tmp_path / "x", (1, 64, 16), precision)
    assert not list(tmp_path.rglob("model.onnx"))


def graph_of(checkpoint: Checkpoint) -> object:
    from export.onnx_graphs import graph_of

    return graph_of(checkpoint, "mtgr_onnx_rank", "fp32")
