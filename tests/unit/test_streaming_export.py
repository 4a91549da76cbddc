"""Networks are exported tensor by tensor: the same weights and answers as in one piece, in far less memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch

from export.onnx import SHAPES, check_graph, graph_of
from export.precision import Precision
from export.rows import random_rows
from export.streaming import DATA_FILE, GRAPH_FILE, MANIFEST_FILE, export_streamed, main, random_weights, stored_weights
from mtgr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mtgr.config import ModelConfig
from mtgr.engines.onnx import OnnxEngine
from mtgr.errors import ConfigurationError
from mtgr.files import read_json, write_json
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
    export_streamed(checkpoint.config, checkpoint.schema, checkpoint.catalog, weights, target, **options)
    return target / GRAPH_FILE


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    model = onnx.load(path)
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_are_the_checkpoints_and_answers_as_close_as_those_of_an_ordinary_export(
    checkpoint: Checkpoint, directory: Path, tmp_path: Path, precision: Precision
) -> None:
    path = streamed(checkpoint, directory, tmp_path / "out", precision=precision)
    graph = graph_of(checkpoint, "mtgr_onnx_rank", precision)
    assert check_graph(graph, path, checkpoint, SHAPES, 1).problem(precision) is None
    stored, written = graph.module.state_dict(), tensors(path)
    compared = 0
    for name, values in written.items():
        if name in stored:
            np.testing.assert_array_equal(values, stored[name].numpy(), err_msg=name)
            compared += values.size
    assert compared > 0.9 * sum(parameter.numel() for parameter in graph.module.parameters()) > 100_000


def test_weights_lie_at_pages_of_one_file_beside_a_small_graph(
    checkpoint: Checkpoint, directory: Path, tmp_path: Path
) -> None:
    path = streamed(checkpoint, directory, tmp_path / "out", precision="fp16")
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
    manifest = read_json(path.with_name(MANIFEST_FILE))
    assert manifest["data_bytes"] == path.with_name(DATA_FILE).stat().st_size
    assert manifest["precision"] == "fp16"


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


def test_a_checkpoint_in_several_files(checkpoint: Checkpoint, directory: Path, tmp_path: Path) -> None:
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
    whole = tensors(streamed(checkpoint, directory, tmp_path / "whole", precision="fp16"))
    parts = tensors(streamed(checkpoint, folder, tmp_path / "parts", precision="fp16"))
    assert whole.keys() == parts.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(values, parts[name])


def test_what_cannot_be_done_is_a_sentence_and_leaves_what_was_there(
    checkpoint: Checkpoint, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = streamed(checkpoint, directory, tmp_path / "out", precision="fp32")
    before = path.read_bytes()

    def lacking(name: str, shape: torch.Size, first: int) -> torch.Tensor:
        return torch.zeros(3)

    arguments = (checkpoint.config, checkpoint.schema, checkpoint.catalog)
    with pytest.raises(ConfigurationError, match="has shape"):
        export_streamed(*arguments, lacking, path.parent)
    with pytest.raises(ConfigurationError, match="INT8 is made of a whole graph"):
        export_streamed(*arguments, random_weights(0), path.parent, "int8")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("export.streaming.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConfigurationError, match="make room"):
        export_streamed(*arguments, random_weights(0), path.parent)
    assert path.read_bytes() == before
    assert main(["--checkpoint", str(tmp_path / "nothing"), "--out", str(tmp_path / "x")]) == 2


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
_, before = peak(2, 64)
parameters, after = peak(24, 1024)
print(parameters, after - before)
"""


def test_memory_holds_a_small_part_of_the_weights(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    parameters, more = map(int, done.stdout.split())
    assert parameters > 100e6
    assert more < 0.25 * parameters * 4, f"{more / 1e6:.0f} MB for {parameters / 1e6:.0f} million parameters"


def test_random_weights_do_not_depend_on_the_order() -> None:
    draw, again = random_weights(3), random_weights(3)
    shape = torch.Size([4, 5])
    first = draw("blocks.0.uvqk.weight", shape, 0)
    again("blocks.1.uvqk.weight", shape, 0)
    assert torch.equal(first, again("blocks.0.uvqk.weight", shape, 0))
    assert not torch.equal(first, draw("blocks.1.uvqk.weight", shape, 0))
    assert not torch.equal(first, random_weights(4)("blocks.0.uvqk.weight", shape, 0))
