"""Networks are exported tensor by tensor: the same weights and answers as in one piece, in far less memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch

from export import streaming
from export.agreement import check_graph
from export.differences import SHAPES
from export.onnx_graphs import graph_of
from export.precision import Precision
from export.rows import random_rows
from export.streaming import DATA_FILE, GRAPH_FILE, export_streamed, main, random_weights, stored_hash, stored_weights
from mtgr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mtgr.config import ModelConfig
from mtgr.engines.onnx import OnnxEngine
from mtgr.errors import ConfigurationError
from mtgr.files import write_json
from mtgr.manifest import Manifest
from perf.synthetic import synthetic_checkpoint
from tests.conftest import ROOT

CONFIG = ModelConfig(
    num_layers=2,
    d_model=64,
    num_heads=2,
    attention_norm_length=512,
    feature_dim=16,
    item_dim=32,
    head_dim=32,
    relative_bias=True,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(synthetic_checkpoint(CONFIG, num_items=400, seed=0), directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(directory: Path) -> Checkpoint:
    return load_checkpoint(directory)


def streamed(checkpoint: Checkpoint, directory: Path, target: Path, **options: Any) -> Path:
    weights = stored_weights(directory)
    options.setdefault("origin", checkpoint.hash)
    export_streamed(checkpoint.config, checkpoint.schema, checkpoint.catalog, weights, target, **options)
    return target / GRAPH_FILE


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    model = onnx.load(path)
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.fixture(scope="module")
def traced_once(checkpoint: Checkpoint) -> Callable[..., Any]:
    """``_traced`` of this network in fp16, which takes seconds, called once; weights are taken out again each time."""
    arguments = (checkpoint.config, checkpoint.schema, checkpoint.catalog, "fp16", streaming.MAX_ELEMENTS)
    graph, tables = streaming._traced(*arguments)
    empty = {name: value.const_value for name, value in graph.graph.initializers.items()}

    def again(*given: Any) -> Any:
        assert given == arguments
        for name, value in graph.graph.initializers.items():
            value.const_value = empty[name]
        return graph, tables

    return again


@pytest.fixture(scope="module")
def half(
    checkpoint: Checkpoint,
    directory: Path,
    traced_once: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The graph in fp16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "_traced", traced_once)
        return streamed(checkpoint, directory, tmp_path_factory.mktemp("half") / "out", precision="fp16")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_are_the_checkpoints_and_answers_as_close_as_those_of_an_ordinary_export(
    checkpoint: Checkpoint, directory: Path, half: Path, tmp_path: Path, precision: Precision
) -> None:
    path = half if precision == "fp16" else streamed(checkpoint, directory, tmp_path / "out", precision=precision)
    graph = graph_of(checkpoint, "mtgr_onnx_rank", precision)
    assert check_graph(graph, path, checkpoint, SHAPES, 1).problem(precision) is None
    stored, written = graph.module.state_dict(), tensors(path)
    compared = 0
    for name, values in written.items():
        if name in stored:
            np.testing.assert_array_equal(values, stored[name].numpy(), err_msg=name)
            compared += values.size
    assert compared > 0.9 * sum(parameter.numel() for parameter in graph.module.parameters()) > 100_000


def test_weights_lie_at_pages_of_one_file_beside_a_small_graph(checkpoint: Checkpoint, half: Path) -> None:
    path = half
    graph = onnx.load(path, load_external_data=False).graph
    entries = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.external_data
    ]
    assert len(entries) > 20
    assert {entry["location"] for entry in entries} == {DATA_FILE}
    assert all(int(entry["offset"]) % 4096 == 0 for entry in entries)
    assert path.stat().st_size < 1_000_000
    manifest = Manifest.load(path.parent)
    assert manifest.details["data_bytes"] == path.with_name(DATA_FILE).stat().st_size
    assert (manifest.precision, manifest.checkpoint) == ("fp16", checkpoint.hash)
    assert manifest.shapes["context"] == ["int32", -1, -1, checkpoint.schema.width]


def test_rows_that_are_held_at_a_time_do_not_change_what_is_written(
    checkpoint: Checkpoint,
    directory: Path,
    half: Path,
    traced_once: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "_traced", traced_once)
    monkeypatch.setattr(streaming, "_CHUNK", 1000)
    path = streamed(checkpoint, directory, tmp_path / "out", precision="fp16")
    assert path.with_name(DATA_FILE).read_bytes() == half.with_name(DATA_FILE).read_bytes()


def test_tables_that_are_too_large_are_split(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_checkpoint(synthetic_checkpoint(CONFIG, num_items=2000, seed=0), directory)
    checkpoint, limit = load_checkpoint(directory), 40_000
    path = streamed(checkpoint, directory, tmp_path / "out", precision="fp32", max_elements=limit)
    sizes = {name: values.size for name, values in tensors(path).items()}
    assert sum(".parts." in name for name in sizes) >= 2
    assert max(sizes.values()) <= limit < checkpoint.model.embedding.item.table.weight.numel()
    context, candidates = random_rows(checkpoint.schema, checkpoint.catalog, 2, 100, 30, np.random.default_rng(0))
    inputs = {"context": context.numpy(), "candidates": candidates.numpy()}
    with torch.inference_mode():
        expected = checkpoint.model(context, candidates).numpy()
    np.testing.assert_allclose(OnnxEngine(path).infer(inputs, ["task_scores"])["task_scores"], expected, atol=1e-5)


def test_a_checkpoint_in_several_files(
    checkpoint: Checkpoint,
    directory: Path,
    half: Path,
    traced_once: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "_traced", traced_once)
    from safetensors.torch import load_file, save_file

    everything = load_file(directory / "model.safetensors")
    names = sorted(everything)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    folder = tmp_path / "shards"
    folder.mkdir()
    for file, part in shards.items():
        save_file({name: everything[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    for file in ("config.json", "schema.json"):
        (folder / file).write_bytes((directory / file).read_bytes())
    whole = tensors(half)
    parts = tensors(streamed(checkpoint, folder, tmp_path / "parts", precision="fp16"))
    assert whole.keys() == parts.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(values, parts[name])
    assert stored_hash(directory) == checkpoint.hash
    before = stored_hash(folder)
    save_file({name: everything[name] + 1 for name in shards["b.safetensors"]}, folder / "b.safetensors")
    assert stored_hash(folder) != before
    (folder / "b.safetensors").unlink()
    weights = stored_weights(folder)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        weights(shards["b.safetensors"][0], torch.Size([1]), slice(0, 1))


def test_a_longer_table_is_another_networks(directory: Path) -> None:
    weights, name = stored_weights(directory), "embedding.item.table.weight"
    shape = torch.Size(load_checkpoint(directory).model.embedding.item.table.weight.shape)
    assert weights(name, shape, slice(3, 7)).shape == (4, shape[1])
    with pytest.raises(ConfigurationError, match="has shape"):
        weights(name, torch.Size([shape[0] - 1, shape[1]]), slice(3, 7))


def test_what_cannot_be_done_is_a_sentence_and_leaves_what_was_there(
    checkpoint: Checkpoint, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(half.parent, tmp_path / "out")) / GRAPH_FILE
    before = path.read_bytes()

    def lacking(name: str, shape: torch.Size, rows: slice) -> torch.Tensor:
        return torch.zeros(3)

    def large(name: str, shape: torch.Size, rows: slice) -> torch.Tensor:
        return random_weights(0)(name, shape, rows) + 1e6

    small = replace(checkpoint.config, num_layers=1, relative_bias=False)  # traced sooner
    arguments = (small, checkpoint.schema, checkpoint.catalog)
    with pytest.raises(ConfigurationError, match="one row of a table"):
        export_streamed(*arguments, random_weights(0), path.parent, max_elements=10)
    traced = streaming._traced(*arguments, "fp16", streaming.MAX_ELEMENTS)
    monkeypatch.setattr(streaming, "_traced", lambda *_: traced)  # once: each takes seconds
    with pytest.raises(ConfigurationError, match="gave shape"):
        export_streamed(*arguments, lacking, path.parent)
    with pytest.raises(ConfigurationError, match="too large for"):
        export_streamed(*arguments, large, path.parent)
    with pytest.raises(ConfigurationError, match="INT8 is made of a whole graph"):
        export_streamed(*arguments, random_weights(0), path.parent, "int8")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("export.streaming.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConfigurationError, match="make room"):
        export_streamed(*arguments, random_weights(0), path.parent)
    assert path.read_bytes() == before
    assert main(["--checkpoint", str(tmp_path / "nothing"), "--out", str(tmp_path / "x")]) == 2
    write_json(tmp_path / "config.json", {"record": {}})
    assert main(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert list(tmp_path.glob(".*")) == []


PEAK = """
import resource, sys
from pathlib import Path
import numpy as np
from export.streaming import export_streamed, random_weights
from mtgr.config import ModelConfig
from perf.synthetic import synthetic_catalog, synthetic_schema
catalog = synthetic_catalog(500, np.random.default_rng(0))
def peak(layers, width):
    config = ModelConfig(num_layers=layers, d_model=width, num_heads=4, attention_norm_length=512)
    done = export_streamed(config, synthetic_schema(catalog), catalog, random_weights(0), Path(sys.argv[1]), "fp16")
    return done.parameters, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
_, before = peak(1, 64)
parameters, after = peak(6, 1536)
print(parameters, after - before)
"""


def test_memory_holds_a_small_part_of_the_weights(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    parameters, more = map(int, done.stdout.split())
    assert parameters > 60e6
    assert more < 0.5 * parameters * 2, f"{more / 1e6:.0f} MB for {parameters / 1e6:.0f} million parameters"


def test_random_weights_do_not_depend_on_the_order() -> None:
    draw, again = random_weights(3), random_weights(3)
    shape = torch.Size([4, 5])
    rows = slice(0, 4)
    first = draw("blocks.0.uvqk.weight", shape, rows)
    again("blocks.1.uvqk.weight", shape, rows)
    assert torch.equal(first, again("blocks.0.uvqk.weight", shape, rows))
    assert not torch.equal(first, draw("blocks.1.uvqk.weight", shape, rows))
    assert not torch.equal(first, random_weights(4)("blocks.0.uvqk.weight", shape, rows))
    known = torch.arange(20.0).reshape(4, 5)
    assert torch.equal(random_weights(3, {"x": known})("x", shape, slice(1, 3)), known[1:3])
