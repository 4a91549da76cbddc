"""``python -m export.fixed``: graphs of one shape each, for the buckets that requests are padded to.

No operator computes a shape in such a graph, so that nothing runs on the host between two kernels and a CUDA graph can
hold the whole of it. Each holds weights of its own: export the buckets that traffic has, not the whole table.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F

from export.agreement import check_graph
from export.last_token import LastToken
from export.onnx import manifest_of
from export.onnx_graphs import graph_of
from export.opset import OPSET_17
from export.precision import Precision
from export.report import Exported, table
from export.rows import random_rows
from export.trace import OPSET, save_graph
from mtgr.checkpoint import Checkpoint, load_checkpoint, operations
from mtgr.errors import ConfigurationError, MTGRError
from mtgr.files import replaced_directory
from mtgr.loading import DEFAULT_CHECKPOINT
from mtgr.manifest import Manifest
from mtgr.routing.buckets import CANDIDATE_BUCKETS, CONTEXT_BUCKETS, bucket

Shape = tuple[int, int, int]
"""Batch, context tokens, and candidates."""

_INPUTS = ("context", "candidates")


def fixed_shapes(
    max_context: int,
    batches: Sequence[int] = (1, 8),
    contexts: Sequence[int] = CONTEXT_BUCKETS,
    candidates: Sequence[int] = (256,),
) -> list[Shape]:
    """Shapes of buckets, without those of contexts longer than the schema has.

    Args:
        max_context: Tokens of the longest context.
        batches: Users at a time.
        contexts: Buckets of contexts.
        candidates: Buckets of candidates.

    Raises:
        ConfigurationError: If one of them is no bucket, to which no request would ever be padded.
    """
    for wanted, known, name in ((contexts, CONTEXT_BUCKETS, "context"), (candidates, CANDIDATE_BUCKETS, "candidates")):
        for size in wanted:
            # More candidates than the last bucket are split over calls; longer contexts are padded to other lengths.
            if size not in known and (name == "candidates" or bucket(size, known) != size):
                raise ConfigurationError(f"{size} is no bucket of {name}; choose among {', '.join(map(str, known))}.")
    if any(size < 1 for size in batches):
        raise ConfigurationError("a batch has at least one user.")
    longest = bucket(max_context, CONTEXT_BUCKETS)
    return [shape for shape in itertools.product(batches, contexts, candidates) if shape[1] <= longest]


def export_fixed(
    checkpoint: Checkpoint,
    model: str,
    directory: Path,
    shape: Shape,
    precision: Precision = "fp32",
    opset: int = OPSET,
    seed: int = 0,
    force: bool = False,
) -> Manifest:
    """Write a graph of one shape with its manifest, checked at that shape.

    Args:
        checkpoint: The model.
        model: ``mtgr_onnx_rank`` or ``mtgr_onnx_retrieve``.
        directory: Replaced as a whole.
        shape: A bucket.
        precision: fp32, fp16 or bf16.
        opset: 17 is the newest that TensorRT 8.6 reads.
        seed: Of the rows that it is checked on.
        force: Write a graph in low precision also if it is not close enough.

    Raises:
        ConfigurationError: If it is not close enough to PyTorch, or the network cannot do this; what was there stays.
    """
    if precision == "int8":
        raise ConfigurationError("INT8 is made of graphs with dynamic lengths; export with `python -m export`.")
    # What 8.6 cannot build of retrieval stands in export/tensorrt_ways.py.
    last: LastToken = "sums" if opset == OPSET_17 else "products"
    graph = replace(graph_of(checkpoint, model, precision, last), dynamic_shapes=None)
    batch, context, candidates = shape
    generator = np.random.default_rng(seed)
    length = min(context, checkpoint.schema.max_context)
    rows = random_rows(checkpoint.schema, checkpoint.catalog, batch, length, candidates, generator)
    example = (F.pad(rows[0], (0, 0, 0, context - length)), rows[1])
    with replaced_directory(directory) as staging:
        path = staging / "model.onnx"
        save_graph(graph.module, path, example[: len(graph.inputs)], graph, opset)
        agreement = check_graph(graph, path, checkpoint, [shape] * 2, seed + 1, engine=lambda e: _Padded(e, shape))
        problem = agreement.problem(precision)
        if problem is not None and (precision == "fp32" or not force):
            raise ConfigurationError(f"{model} of {_name(shape)} in {precision} was not written: {problem}.")
        details = {} if problem is None else {"forced": problem}
        manifest = manifest_of(graph, checkpoint, path, agreement, details, shapes=[shape])
        manifest.save(staging)
    return manifest


class _Padded:
    """An engine of one shape that takes shorter contexts."""

    def __init__(self, engine: Any, shape: Shape) -> None:
        self._engine, self._lengths = engine, dict(zip(_INPUTS, shape[1:], strict=True))

    def infer(self, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> Any:
        padded = {
            name: np.pad(rows, ((0, 0), (0, self._lengths[name] - rows.shape[1]), (0, 0)))
            for name, rows in inputs.items()
        }
        return self._engine.infer(padded, outputs)


def main(arguments: list[str] | None = None) -> int:
    """Export; 0, or 2 with one sentence after an error."""
    parser = argparse.ArgumentParser(prog="python -m export.fixed", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="directory of `make train`")
    parser.add_argument("--out", type=Path, required=True, help="gets <model>/b<batch>-n<context>-k<candidates>/")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32")
    parser.add_argument("--opset", type=int, choices=(OPSET_17, OPSET), default=OPSET, help="17 for TensorRT 8.6")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, nargs="+", default=list(CONTEXT_BUCKETS), help="all buckets by default")
    parser.add_argument("--candidates", type=int, nargs="+", default=[256])
    parser.add_argument("--force", action="store_true", help="also write what is not close enough to fp32")
    options = parser.parse_args(arguments)
    lines = []
    try:
        checkpoint = load_checkpoint(options.checkpoint)
        shapes = fixed_shapes(checkpoint.schema.max_context, options.batch, options.context, options.candidates)
        for line in export_all(checkpoint, options.out, shapes, options.precision, options.opset, options.force):
            print(f"{line.directory}: {line.state}", flush=True)
            lines.append(line)
    except MTGRError as error:
        print(f"export.fixed: {error}", file=sys.stderr)
        return 2
    finally:
        if lines:
            print(f"\n{table(lines, options.out)}")
    return 0


def export_all(
    checkpoint: Checkpoint, out: Path, shapes: Sequence[Shape], precision: Precision, opset: int, force: bool = False
) -> Iterator[Exported]:
    """Write ``<out>/<model>/b<batch>-n<context>-k<candidates>/`` for each model and shape.

    Yields:
        A line of the table each.
    """
    for kind in operations(checkpoint.model):
        model = f"mtgr_onnx_{kind}"
        for shape in dict.fromkeys(shapes if kind == "rank" else ((batch, n, 1) for batch, n, _ in shapes)):
            start = time.perf_counter()
            directory = out / model / _name(shape, kind == "rank")
            manifest = export_fixed(checkpoint, model, directory, shape, precision, opset, force=force)
            words = f"{manifest.details['nodes']} nodes"
            yield Exported("fixed", words, manifest, time.perf_counter() - start, directory)


def _name(shape: Shape, ranks: bool = True) -> str:
    batch, context, candidates = shape
    return f"b{batch}-n{context}" + (f"-k{candidates}" if ranks else "")


if __name__ == "__main__":
    sys.exit(main())
