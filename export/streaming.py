"""``python -m export.streaming``: export a network that does not fit into memory, tensor by tensor.

The graph is traced on tensors without data. Then its weights, which are most of an artifact, are written one after
another into one file beside it: read from a checkpoint or drawn at random, and cast on the way. So memory holds one
tensor at a time, where an ordinary export holds the network twice. Nothing is folded while exporting; ONNX Runtime and
TensorRT do that when they load a graph.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from export.graphs import RankGraph
from export.onnx import OPSET, rank_axes, trace
from export.precision import Precision, typed
from export.rows import random_rows
from mtgr.checkpoint import CONFIG_FILE, MODEL_FILE
from mtgr.config import ModelConfig, preset, preset_names
from mtgr.errors import ConfigurationError, MTGRError
from mtgr.features.catalog import CATALOG_FILE, ItemCatalog
from mtgr.files import read_json, replaced_directory, write_json
from mtgr.model import MTGR
from mtgr.schema import SCHEMA_FILE, Schema

GRAPH_FILE, DATA_FILE, MANIFEST_FILE = "model.onnx", "model.onnx.data", "manifest.json"
MAX_ELEMENTS = 2**31 - 1  # of one tensor: engines index with 32 bits
_ALIGNMENT = 4096  # a page, so that weights can be mapped instead of read

Weights = Callable[[str, torch.Size, int], Tensor]
"""Gives a tensor of the network by its name in a checkpoint, its shape, and, of tables in parts, its first row."""


class SplitEmbedding(nn.Module):
    """An embedding whose table lies in several tensors of at most ``max_elements``."""

    def __init__(self, table: nn.Embedding, max_elements: int) -> None:
        super().__init__()
        rows, width = table.weight.shape
        step = max_elements // width
        self.starts = list(range(0, rows, step))
        self.parts = nn.ModuleList(
            nn.Embedding(min(step, rows - start), width, device=table.weight.device, dtype=table.weight.dtype)
            for start in self.starts
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Float [..., width] of INT [...] ids."""
        found = torch.zeros((), dtype=self.parts[0].weight.dtype, device=self.parts[0].weight.device)
        for start, part in zip(self.starts, self.parts, strict=True):
            local = ids - start
            inside = (local >= 0) & (local < part.num_embeddings)
            found = found + part(local.clamp(0, part.num_embeddings - 1)) * inside.unsqueeze(-1).to(found.dtype)
        return found


@dataclass(frozen=True)
class Streamed:
    """What was written.

    Attributes:
        parameters: Elements of all weights.
        data_bytes: Size of their file.
        tensors: How many there are.
    """

    parameters: int
    data_bytes: int
    tensors: int


def export_streamed(
    config: ModelConfig,
    schema: Schema,
    catalog: ItemCatalog,
    weights: Weights,
    directory: Path,
    precision: Precision = "fp16",
    max_elements: int = MAX_ELEMENTS,
) -> Streamed:
    """Write the ranking graph, its weights, and a manifest.

    Args:
        config: The network.
        schema: Meaning of its rows.
        catalog: The items.
        weights: Where its tensors come from.
        directory: Replaced as a whole.
        precision: fp32, fp16 or bf16.
        max_elements: Embedding tables with more are split.

    Raises:
        ConfigurationError: If the disk has no room, a tensor is missing or has another shape, or INT8 is asked for.
    """
    if precision == "int8":
        raise ConfigurationError("INT8 is made of a whole graph in fp32; export large networks in fp16 or bf16.")
    graph, starts = _traced(config, schema, catalog, precision, max_elements)
    values = [value for value in graph.graph.initializers.values() if _is_empty(value)]
    sizes = {value.name: value.const_value.nbytes for value in values}
    needed = sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values())
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if free < needed:
        raise ConfigurationError(
            f"{directory.parent} has {free / 1e9:.1f} GB free, and the weights take {needed / 1e9:.1f}; make room."
        )
    with replaced_directory(directory) as staging:
        parameters = _write_weights(values, weights, starts, f"blocks.{config.num_layers - 1}.", staging)
        onnx_ir.save(graph, staging / GRAPH_FILE)
        onnx.checker.check_model(str(staging / GRAPH_FILE))
        result = Streamed(parameters, (staging / DATA_FILE).stat().st_size, len(values))
        write_json(
            staging / MANIFEST_FILE,
            {
                "model": "mtgr_onnx_rank",
                "precision": precision,
                "schema": schema.hash,
                "config": config.to_dict(),
                "versions": {"torch": torch.__version__, "onnx": onnx.__version__, "opset": str(OPSET)},
                "parameters": result.parameters,
                "data_bytes": result.data_bytes,
            },
        )
    return result


def stored_weights(directory: Path) -> Weights:
    """Tensors of a checkpoint in one safetensors file or several, read one at a time.

    Raises:
        ConfigurationError: If there is none.
    """
    index = directory / f"{MODEL_FILE}.index.json"
    if index.is_file():
        files: Mapping[str, str] = read_json(index)["weight_map"]
    elif (directory / MODEL_FILE).is_file():
        with safe_open(directory / MODEL_FILE, "pt") as tensors:
            files = dict.fromkeys(tensors.keys(), MODEL_FILE)
    else:
        raise ConfigurationError(f"there are no weights in {directory}; run `make train`.")

    def read(name: str, shape: torch.Size, first: int) -> Tensor:
        if name not in files:
            raise ConfigurationError(f"{directory} lacks {name}; it is a checkpoint of another network.")
        with safe_open(directory / files[name], "pt") as tensors:
            part = tensors.get_slice(name)
            tensor: Tensor = part[first : first + shape[0]] if shape else part[...]
        return tensor

    return read


def random_weights(seed: int) -> Weights:
    """Weights of an untrained network, the same for a name and a seed whatever the order."""

    def draw(name: str, shape: torch.Size, first: int) -> Tensor:
        if name.endswith("gain"):
            return torch.ones(shape)
        if name.endswith("bias"):
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{seed}:{name}:{first}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        scale = 0.05 if "table" in name else shape[-1] ** -0.5
        return torch.randn(shape, generator=generator) * scale

    return draw


def _traced(
    config: ModelConfig, schema: Schema, catalog: ItemCatalog, precision: Precision, max_elements: int
) -> tuple[onnx_ir.Model, dict[str, int]]:
    """The graph of a network without data, and the first row of each part of a table that was split."""
    starts: dict[str, int] = {}
    with torch.device("meta"):
        network = MTGR(config, schema, catalog.features.shape[1])
    for path, part in list(network.named_modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Embedding) and child.weight.numel() > max_elements:
                split = SplitEmbedding(child, max_elements)
                setattr(part, name, split)
                starts |= {f"model.{path}.{name}.parts.{i}.weight": start for i, start in enumerate(split.starts)}
    for name, tensor in network.state_dict().items():
        if tensor.numel() > max_elements:
            raise ConfigurationError(
                f"{name} has {tensor.numel()} elements, more than engines index; take fewer items or a smaller width."
            )
    example = random_rows(schema, catalog, 2, min(40, schema.max_context), 12, np.random.default_rng(0))
    graph = typed(RankGraph(network.eval()), precision)
    rows = tuple(row.to("meta") for row in example)
    model = trace(graph, rows, ("context", "candidates"), ("task_scores",), rank_axes(), optimize=False).model
    # The one tensor that no checkpoint holds, because the schema says it.
    network.wide_terms.place(torch.device("cpu"))
    for name, value in model.graph.initializers.items():
        if name.endswith("wide_terms.offsets"):
            value.const_value = onnx_ir.tensor(network.wide_terms.offsets.numpy(), name=name)
    return model, starts


def _is_empty(value: onnx_ir.Value) -> bool:
    """Whether an initializer has a shape and no data."""
    raw = getattr(value.const_value, "raw", None)
    return isinstance(raw, Tensor) and raw.is_meta


def _write_weights(
    values: Sequence[onnx_ir.Value], weights: Weights, starts: Mapping[str, int], last: str, directory: Path
) -> int:
    """Write the data of initializers one after another, and have the graph refer to them."""
    parameters = 0
    with (directory / DATA_FILE).open("wb") as file:
        for value in tqdm(values, desc="weights", unit="tensor", leave=False):
            stand_in = value.const_value
            tensor = _part(value.name, stand_in.raw.shape, weights, starts, last).to(stand_in.raw.dtype).contiguous()
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            offset = file.tell()
            data = tensor.view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
            file.write(memoryview(data.reshape(-1).numpy()))
            parameters += tensor.numel()
            value.const_value = onnx_ir.ExternalTensor(
                DATA_FILE,
                offset,
                file.tell() - offset,
                stand_in.dtype,
                shape=stand_in.shape,
                name=value.name,
                base_dir=directory,
            )
    return parameters


def _part(name: str, shape: torch.Size, weights: Weights, starts: Mapping[str, int], last: str) -> Tensor:
    """The data of an initializer: a tensor of the checkpoint, or some rows of a table that was split."""
    source = name.removeprefix("model.").replace("last.block.", last)
    if name in starts:
        source = f"{source.partition('.parts.')[0]}.weight"
    tensor = weights(source, shape, starts.get(name, 0))
    if tensor.shape != shape:
        raise ConfigurationError(f"{source} has shape {list(tensor.shape)}; the config says {list(shape)}.")
    return tensor


def main(arguments: list[str] | None = None) -> int:
    """Export; 0, or 2 with one sentence after an error."""
    parser = argparse.ArgumentParser(prog="python -m export.streaming", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="directory with weights in one safetensors file or several")
    source.add_argument("--preset", choices=preset_names(), help="random weights of this size")
    parser.add_argument("--items", type=int, default=20_000, help="with --preset: size of the catalogue")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp16")
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        if options.preset is not None:
            # Imported here: benchmarks' data are no part of an export from a checkpoint.
            from perf.synthetic import synthetic_catalog, synthetic_schema

            catalog = synthetic_catalog(options.items, np.random.default_rng(options.seed))
            config, schema, weights = preset(options.preset), synthetic_schema(catalog), random_weights(options.seed)
        else:
            values = read_json(options.checkpoint / CONFIG_FILE)
            config = ModelConfig.from_dict(values["model"])
            schema = Schema.load(options.checkpoint / SCHEMA_FILE)
            catalog, weights = ItemCatalog.load(options.checkpoint / CATALOG_FILE), stored_weights(options.checkpoint)
        start = time.perf_counter()
        done = export_streamed(config, schema, catalog, weights, options.out, options.precision)
    except MTGRError as error:
        print(f"export.streaming: {error}", file=sys.stderr)
        return 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{options.out}: {done.parameters / 1e9:.2f} billion parameters in {options.precision}, "
        f"{done.data_bytes / 1e9:.2f} GB, {time.perf_counter() - start:.0f} s, {peak / 1e9:.2f} GB of memory at most"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
