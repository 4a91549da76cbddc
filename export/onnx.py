"""Export the ``onnx`` strategy: one graph that ranks, one that retrieves, each checked against PyTorch.

Both graphs are plain tensor arithmetic on INT32 rows: no Range, no ConstantOfShape, no loop, no length input. Batch,
context, and candidate axes vary.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim

from export.graphs import rank_graph, retrieve_graph
from export.install import model_directory, template_hash
from export.rows import random_rows
from mtgr.checkpoint import Checkpoint, operations
from mtgr.engines.onnx import OnnxEngine
from mtgr.errors import ConfigurationError
from mtgr.manifest import Manifest
from mtgr.schema import FIRST_ID

OPSET = 20
TOLERANCE = 1e-5  # absolute, on probabilities: another path in fp32

# Batch, context, and candidates of the shapes that every artifact is checked at.
SHAPES = ((1, 1, 1), (1, 7, 3), (2, 64, 16), (3, 130, 5), (4, 200, 64), (1, 512, 256))


@dataclass(frozen=True)
class _Graph:
    """What differs between the two graphs."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_shapes: tuple[dict[int, Any], ...]
    error: Callable[[OnnxEngine, Checkpoint, Tensor, Tensor], float]


def export_onnx(checkpoint: Checkpoint, model_repository: Path, stack: ExitStack, seed: int = 0) -> list[Manifest]:
    """Export and check ``mtgr_onnx_rank`` and ``mtgr_onnx_retrieve``, or those of them that the network can do.

    Args:
        checkpoint: A trained model.
        model_repository: Where the models go.
        stack: Installs them when it closes without an error, together with whatever else it holds.
        seed: Of the rows that the graphs are checked on.

    Raises:
        ConfigurationError: If a graph misses the tolerance at any shape; what was installed before stays.
    """
    manifests = []
    for graph in _graphs(checkpoint):
        version = stack.enter_context(model_directory(graph.name, model_repository, checkpoint))
        path = version / "model.onnx"
        save_graph(graph.module, path, _example(checkpoint, len(graph.inputs)), graph)
        error = check_graph(graph, path, checkpoint, SHAPES, seed)
        manifests.append(_manifest(graph, checkpoint, path, error))
        manifests[-1].save(version)
    return manifests


def check_graph(
    graph: _Graph, path: Path, checkpoint: Checkpoint, shapes: Sequence[tuple[int, int, int]], seed: int
) -> float:
    """Largest absolute error of an exported graph over ``shapes``.

    Raises:
        ConfigurationError: If it is above the tolerance.
    """
    engine = OnnxEngine(path)
    generator = np.random.default_rng(seed)
    worst = 0.0
    for batch, length, candidates in shapes:
        context = min(length, checkpoint.schema.max_context)
        rows = random_rows(checkpoint.schema, checkpoint.catalog, batch, context, candidates, generator)
        error = graph.error(engine, checkpoint, *rows)
        if not error <= TOLERANCE:
            raise ConfigurationError(
                f"{graph.name} differs from PyTorch by {error:.1e} at shape {batch} x {context} x {candidates}, "
                f"more than {TOLERANCE:.0e}; it was not installed."
            )
        worst = max(worst, error)
    return worst


def save_graph(module: nn.Module, path: Path, example: tuple[Tensor, ...], graph: _Graph) -> None:
    """Trace ``module`` on ``example`` rows and write an ONNX file."""
    # The exporter speaks of its own deprecated calls and of packages it can do without: nothing a user could act on.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=graph.dynamic_shapes,
            verbose=False,
        )
    assert program is not None
    program.save(path)
    onnx.checker.check_model(str(path))


def _graphs(checkpoint: Checkpoint) -> tuple[_Graph, ...]:
    batch, context, candidates = Dim("batch", max=4096), Dim("context", max=4096), Dim("candidates", max=16_384)
    rank = _Graph(
        "mtgr_onnx_rank",
        rank_graph(checkpoint.model),
        ("context", "candidates"),
        ("task_scores",),
        ({0: batch, 1: context}, {0: batch, 1: candidates}),
        rank_error,
    )
    if "retrieve" not in operations(checkpoint.model):
        return (rank,)
    retrieve = _Graph(
        "mtgr_onnx_retrieve",
        retrieve_graph(checkpoint.model),
        ("context",),
        ("items", "scores"),
        ({0: batch, 1: context},),
        retrieve_error,
    )
    return rank, retrieve


def _example(checkpoint: Checkpoint, count: int) -> tuple[Tensor, ...]:
    """Rows to trace with; no dimension is 1, which the tracer would take for a constant."""
    length = min(40, checkpoint.schema.max_context)
    return random_rows(checkpoint.schema, checkpoint.catalog, 2, length, 12, np.random.default_rng(0))[:count]


def rank_error(engine: OnnxEngine, checkpoint: Checkpoint, context: Tensor, candidates: Tensor) -> float:
    """Largest difference of task scores."""
    with torch.inference_mode():
        expected = checkpoint.model(context, candidates).numpy()
    found = engine.infer({"context": context.numpy(), "candidates": candidates.numpy()}, ["task_scores"])["task_scores"]
    return _difference(found, expected)


def retrieve_error(engine: OnnxEngine, checkpoint: Checkpoint, context: Tensor, candidates: Tensor) -> float:
    """Largest difference of cosine similarities: of the item at each place, and of the score beside it.

    Items of almost equal score may change places; the similarity of what stands at a place may not differ.
    """
    with torch.inference_mode():
        logits = checkpoint.model.next_item_logits(context).numpy()
        expected = checkpoint.model.retrieve(context)[1].numpy()
    answer = engine.infer({"context": context.numpy()}, ["items", "scores"])
    items = answer["items"].astype(np.int64) - FIRST_ID
    distinct = all(len(np.unique(row)) == len(row) for row in items)
    if items.shape != expected.shape or not distinct or items.min() < 0 or items.max() >= logits.shape[1]:
        return float("inf")
    found = np.take_along_axis(logits, items, axis=1)
    return checkpoint.config.temperature * max(_difference(found, expected), _difference(answer["scores"], expected))


def _difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max(initial=0.0)) if np.isfinite(found).all() else float("inf")


def _manifest(graph: _Graph, checkpoint: Checkpoint, path: Path, error: float) -> Manifest:
    model = onnx.load(path, load_external_data=False)
    shapes = {
        value.name: [
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
            *(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim),
        ]
        for value in (*model.graph.input, *model.graph.output)
    }
    return Manifest(
        model=graph.name,
        checkpoint=checkpoint.hash,
        schema=checkpoint.schema.hash,
        precision="fp32",
        versions={
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "opset": str(OPSET),
        },
        shapes=shapes,
        parity={"max_abs_error": error, "shapes": [list(shape) for shape in SHAPES]},
        details={
            "retrieve_count": checkpoint.model.retrieve_count,
            "operations": list(operations(checkpoint.model)),
            "nodes": len(model.graph.node),
            "template": template_hash(graph.name),
        },
    )
