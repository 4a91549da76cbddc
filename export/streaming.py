"""``python -m export.streaming``: export a network that does not fit into memory, tensor by tensor.

The graph is traced on tensors without data. Then its weights, which are most of an artifact, are written one after
another into one file beside it: read from a checkpoint or drawn at random, and cast on the way. So memory holds some
rows of one tensor at a time, where an ordinary export holds the network twice. Nothing is folded while exporting; ONNX
Runtime and TensorRT do that when they load a graph.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from export.graphs import RankGraph
from export.onnx_graphs import rank_axes
from export.precision import Precision, typed
from export.rows import random_rows
from export.trace import shapes_of, trace, versions
from mtgr.checkpoint import CONFIG_FILE, MODEL_FILE, checkpoint_hash
from mtgr.config import ModelConfig, preset, preset_names
from mtgr.errors import ConfigurationError, MTGRError
from mtgr.features.catalog import CATALOG_FILE, ItemCatalog
from mtgr.files import read_json, replaced_directory
from mtgr.manifest import Manifest
from mtgr.model import MTGR
from mtgr.schema import SCHEMA_FILE, Schema

INDEX_FILE = f"{MODEL_FILE}.index.json"
GRAPH_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
MAX_ELEMENTS = 2**31 - 1  # of one tensor: engines index with 32 bits
_ALIGNMENT = 4096  # a page, so that weights can be mapped instead of read
_CHUNK = 2**25  # elements that are held at a time

Weights = Callable[[str, torch.Size, slice], Tensor]
"""Gives rows of a tensor by its name in a checkpoint and its whole shape there; of a scalar, all of it."""


class SplitEmbedding(nn.Module):
    """An embedding whose table lies in several tensors of at most ``max_elements``."""

    def __init__(self, table: nn.Embedding, max_elements: int) -> None:
        super().__init__()
        rows, width = table.weight.shape
        step = max_elements // width
        if step == 0:
            raise ConfigurationError(f"one row of a table has {width} elements, more than {max_elements}; take fewer.")
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
class _Part:
    """Where a part of a table begins, and the shape of the whole."""

    first: int
    shape: torch.Size


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
    origin: str = "",
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
        origin: For the manifest: the checkpoint's hash, or how the weights were drawn.

    Raises:
        ConfigurationError: If the disk has no room, a tensor is missing, has another shape or does not fit into the
            precision, or INT8 is asked for.
    """
    if precision == "int8":
        raise ConfigurationError("INT8 is made of a whole graph in fp32; export large networks in fp16 or bf16.")
    graph, tables = _traced(config, schema, catalog, precision, max_elements)
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
        parameters = _write_weights(values, weights, tables, f"blocks.{config.num_layers - 1}.", staging)
        onnx_ir.save(graph, staging / GRAPH_FILE)
        onnx.checker.check_model(str(staging / GRAPH_FILE))
        result = Streamed(parameters, (staging / DATA_FILE).stat().st_size, len(values))
        Manifest(
            model="mtgr_onnx_rank",
            checkpoint=origin,
            schema=schema.hash,
            precision=precision,
            versions=versions(),
            shapes=shapes_of(onnx.load(staging / GRAPH_FILE, load_external_data=False)),
            parity={},  # the reference does not fit into memory beside it
            details={
                "config": config.to_dict(),
                "parameters": result.parameters,
                "data_bytes": result.data_bytes,
            },
        ).save(staging)
    return result


def stored_weights(directory: Path) -> Weights:
    """Tensors of a checkpoint in one safetensors file or several, read one at a time.

    Raises:
        ConfigurationError: If there is none.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        files: Mapping[str, str] = read_json(index)["weight_map"]
    elif (directory / MODEL_FILE).is_file():
        with _opened(directory / MODEL_FILE) as tensors:
            files = dict.fromkeys(tensors.keys(), MODEL_FILE)
    else:
        raise ConfigurationError(f"there are no weights in {directory}; run `make train`.")

    def read(name: str, shape: torch.Size, rows: slice) -> Tensor:
        if name not in files:
            raise ConfigurationError(f"{directory} lacks {name}; it is a checkpoint of another network.")
        with _opened(directory / files[name]) as tensors:
            stored = tensors.get_slice(name)
            # The whole of it: a longer table would otherwise pass as its first rows.
            if stored.get_shape() != list(shape):
                raise ConfigurationError(f"{name} has shape {stored.get_shape()}; the config says {list(shape)}.")
            tensor: Tensor = stored[rows] if shape else stored[...]
        return tensor

    return read


def stored_hash(directory: Path) -> str:
    """Hex SHA-256 that tells a checkpoint: ``checkpoint_hash``, or of one in several files, over all of them."""
    if not (directory / INDEX_FILE).is_file():
        return checkpoint_hash(directory)
    digest = hashlib.sha256()
    for name in sorted(set(read_json(directory / INDEX_FILE)["weight_map"].values())):
        with (directory / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update(repr(sorted(read_json(directory / CONFIG_FILE)["model"].items())).encode())
    digest.update(Schema.load(directory / SCHEMA_FILE).hash.encode())
    return digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); copy the checkpoint again.") from error


def random_weights(seed: int, known: Mapping[str, Tensor] | None = None) -> Weights:
    """Weights of an untrained network, the same for a name, rows and a seed whatever the order.

    Args:
        seed: Of the numbers.
        known: Tensors by name that are not drawn, such as the items' side features.
    """
    given = known or {}

    def draw(name: str, shape: torch.Size, rows: slice) -> Tensor:
        if name in given:
            return given[name][rows]
        wanted = (rows.stop - rows.start, *shape[1:]) if shape else ()
        if name.endswith("gain"):
            return torch.ones(wanted)
        if name.endswith("bias"):
            return torch.zeros(wanted)
        digest = hashlib.sha256(f"{seed}:{name}:{rows.start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        scale = 0.05 if "table" in name else shape[-1] ** -0.5
        return torch.randn(wanted, generator=generator).mul_(scale)

    return draw


def _traced(
    config: ModelConfig, schema: Schema, catalog: ItemCatalog, precision: Precision, max_elements: int
) -> tuple[onnx_ir.Model, dict[str, _Part]]:
    """The graph of a network without data, and where each part of a table that was split comes from."""
    tables: dict[str, _Part] = {}
    with torch.device("meta"):
        network = MTGR(config, schema, catalog.features.shape[1])
    for path, part in list(network.named_modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Embedding) and child.weight.numel() > max_elements:
                split = SplitEmbedding(child, max_elements)
                setattr(part, name, split)
                tables |= {
                    f"model.{path}.{name}.parts.{i}.weight": _Part(start, child.weight.shape)
                    for i, start in enumerate(split.starts)
                }
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
    return model, tables


def _is_empty(value: onnx_ir.Value) -> bool:
    """Whether an initializer has a shape and no data."""
    raw = getattr(value.const_value, "raw", None)
    return isinstance(raw, Tensor) and raw.is_meta


def _write_weights(
    values: Sequence[onnx_ir.Value], weights: Weights, tables: Mapping[str, _Part], last: str, directory: Path
) -> int:
    """Write the data of initializers one after another, and have the graph refer to them."""
    parameters = 0
    with (directory / DATA_FILE).open("wb") as file:
        for value in tqdm(values, desc="weights", unit="tensor", leave=False):
            stand_in = value.const_value
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            offset = file.tell()
            for rows in _rows(value.name, stand_in.raw, weights, tables, last):
                file.write(memoryview(rows.reshape(-1).view(torch.uint8).numpy()))
                parameters += rows.numel()
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


def _rows(name: str, stand_in: Tensor, weights: Weights, tables: Mapping[str, _Part], last: str) -> Iterator[Tensor]:
    """The data of an initializer, some rows at a time: of a tensor of the checkpoint, or of a table that was split."""
    source, shape, first = name.removeprefix("model.").replace("last.block.", last), stand_in.shape, 0
    if name in tables:
        source = f"{source.partition('.parts.')[0]}.weight"
        shape, first = tables[name].shape, tables[name].first
    count = stand_in.shape[0] if stand_in.dim() else 1
    step = max(1, _CHUNK * count // max(1, stand_in.numel()))
    for start in range(0, count, step):
        rows = slice(first + start, first + min(start + step, count))
        tensor = weights(source, shape, rows)
        expected = (rows.stop - rows.start, *shape[1:]) if shape else ()
        if tensor.shape != expected:
            raise ConfigurationError(f"{source} gave shape {list(tensor.shape)}; the config says {list(shape)}.")
        cast = tensor.to(stand_in.dtype).contiguous()
        if not cast.isfinite().all():
            raise ConfigurationError(
                f"{source} has values that are no numbers or too large for {cast.dtype}; export in bf16 or fp32."
            )
        yield cast


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
            config, schema = preset(options.preset), synthetic_schema(catalog)
            weights = random_weights(options.seed, {"embedding.item.features": torch.from_numpy(catalog.features)})
            origin = f"random weights of seed {options.seed}"
        else:
            values = read_json(options.checkpoint / CONFIG_FILE)
            if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
                raise ConfigurationError(f"{options.checkpoint / CONFIG_FILE} holds no model config; train again.")
            if "network" in values["model"]:
                raise ConfigurationError("only MTGR networks are streamed; export this one with `python -m export`.")
            config = ModelConfig.from_dict(values["model"])
            schema = Schema.load(options.checkpoint / SCHEMA_FILE)
            catalog, weights = ItemCatalog.load(options.checkpoint / CATALOG_FILE), stored_weights(options.checkpoint)
            origin = stored_hash(options.checkpoint)
        start = time.perf_counter()
        done = export_streamed(config, schema, catalog, weights, options.out, options.precision, origin=origin)
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
