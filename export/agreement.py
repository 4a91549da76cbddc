"""Compare what runs an exported graph with the reference in fp32."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from export.differences import Answer, compare_requests
from export.onnx_graphs import Graph
from export.precision import Agreement, rounded_fp32
from export.quantize import int8_in_pytorch
from export.requests import LabelledRequest
from export.rows import random_rows
from mtgr.checkpoint import Checkpoint
from mtgr.engines.onnx import OnnxEngine


class Engine(Protocol):
    """What runs an exported graph."""

    def infer(self, inputs: Answer, outputs: Sequence[str]) -> Answer:
        """Outputs by name."""
        ...


def check_graph(
    graph: Graph,
    path: Path,
    checkpoint: Checkpoint,
    shapes: Sequence[tuple[int, int, int]],
    seed: int,
    requests: Sequence[LabelledRequest] = (),
    engine: Callable[[Engine], Engine] = lambda loaded: loaded,
) -> Agreement:
    """Compare an exported graph with the reference in fp32.

    Args:
        graph: What was exported.
        path: The file.
        checkpoint: The reference.
        shapes: Batch, context tokens, and candidates of random rows.
        seed: Of the rows.
        requests: Of real users, for rank correlation and AUC of a ranking graph.
        engine: Puts something before the loaded graph, such as padding.

    Raises:
        ConfigurationError: If ONNX Runtime cannot run it here.
    """
    return compare(graph, engine(_engine(graph, path)), checkpoint, shapes, seed, requests)


def compare(
    graph: Graph,
    engine: Engine,
    checkpoint: Checkpoint,
    shapes: Sequence[tuple[int, int, int]],
    seed: int,
    requests: Sequence[LabelledRequest] = (),
) -> Agreement:
    """As :func:`check_graph`, of whatever runs the graph."""
    native = _in_native_precision(graph)
    generator = np.random.default_rng(seed)
    error, native_error = 0.0, 0.0
    for batch, length, candidates in shapes:
        context = min(length, checkpoint.schema.max_context)
        rows = random_rows(checkpoint.schema, checkpoint.catalog, batch, context, candidates, generator)
        inputs = dict(zip(graph.inputs, (row.numpy() for row in rows), strict=False))
        error = _worse(error, graph.error(engine.infer(inputs, graph.outputs), checkpoint, *rows))
        if native is not None:
            native_error = max(native_error, graph.error(_in_pytorch(native, graph, rows), checkpoint, *rows))
    spearman, aucs = None, {}
    if requests and "candidates" in graph.inputs:
        spearman, aucs = compare_requests(lambda request: _rank(engine, request), checkpoint, requests)
    return Agreement(error, None if native is None else native_error, spearman, aucs)


def _engine(graph: Graph, path: Path) -> OnnxEngine:
    if graph.precision != "bf16":
        return OnnxEngine(path)
    with tempfile.TemporaryDirectory() as folder:
        rounded = Path(folder) / "model.onnx"
        rounded_fp32(path, rounded)
        return OnnxEngine(rounded)


def _in_native_precision(graph: Graph) -> nn.Module | None:
    """What PyTorch computes in the graph's precision; None in fp32, where it is the reference itself."""
    if graph.precision == "fp32":
        return None
    return int8_in_pytorch(graph.module) if graph.precision == "int8" else graph.module


def _worse(first: float, second: float) -> float:
    """The larger error; unlike ``max``, one that is no number is kept."""
    return first if first >= second or np.isnan(first) else second


def _in_pytorch(module: nn.Module, graph: Graph, rows: tuple[Tensor, ...]) -> Answer:
    with torch.inference_mode():
        answer = module(*rows[: len(graph.inputs)])
    outputs = answer if isinstance(answer, tuple) else (answer,)
    return {name: value.numpy() for name, value in zip(graph.outputs, outputs, strict=True)}


def _rank(engine: Engine, request: LabelledRequest) -> np.ndarray[Any, Any]:
    inputs = {"context": request.context, "candidates": request.candidates}
    scores: np.ndarray[Any, Any] = engine.infer(inputs, ["task_scores"])["task_scores"][0]
    return scores
