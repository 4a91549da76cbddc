"""What is exported: for each ONNX model a network, its inputs and outputs, and how its answers are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.export import Dim

from export.differences import Answer, rank_error, retrieve_error
from export.graphs import rank_graph, retrieve_graph
from export.last_token import LastToken
from export.precision import Precision, typed
from export.rows import random_rows
from mtgr.checkpoint import Checkpoint, operations
from mtgr.errors import ConfigurationError


@dataclass(frozen=True)
class Graph:
    """What differs between the two graphs.

    Attributes:
        name: Its model.
        module: What is traced.
        inputs: Names, in the order of the module's arguments.
        outputs: Names, in the order of what it returns.
        dynamic_shapes: Axes that vary of each input; None if none does.
        error: How far an answer to context and candidates is from the reference.
        precision: Of weights and activations.
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_shapes: tuple[dict[int, Any], ...] | None
    error: Callable[[Answer, Checkpoint, Tensor, Tensor], float]
    precision: Precision = "fp32"


def onnx_precision(model: str, precision: Precision) -> Precision:
    """What a model is exported in where ``precision`` is asked for: retrieval has no INT8."""
    return "fp32" if precision == "int8" and model == "mtgr_onnx_retrieve" else precision


def graph_of(checkpoint: Checkpoint, model: str, precision: Precision = "fp32", last: LastToken = "products") -> Graph:
    """The graph that a model's name means.

    Args:
        checkpoint: Where from.
        model: ``mtgr_onnx_rank`` or ``mtgr_onnx_retrieve``.
        precision: Of weights and activations.
        last: How retrieval computes its last token.

    Raises:
        ConfigurationError: If the network cannot do what it does.
    """
    for graph in graphs_of(checkpoint, precision, last):
        if graph.name == model:
            return graph
    raise ConfigurationError(f"this checkpoint's network has nothing to do for {model}; export the other model.")


def rank_axes() -> tuple[dict[int, Any], ...]:
    """Axes that vary of a ranking graph's inputs."""
    batch, context, candidates = Dim("batch", max=4096), Dim("context", max=4096), Dim("candidates", max=16_384)
    return {0: batch, 1: context}, {0: batch, 1: candidates}


def graphs_of(checkpoint: Checkpoint, precision: Precision = "fp32", last: LastToken = "products") -> tuple[Graph, ...]:
    """The graphs that a checkpoint's network has something to do for; arguments as :func:`graph_of`'s."""
    axes = rank_axes()
    rank = Graph(
        "mtgr_onnx_rank",
        typed(rank_graph(checkpoint.model), precision),
        ("context", "candidates"),
        ("task_scores",),
        axes,
        rank_error,
        precision,
    )
    if "retrieve" not in operations(checkpoint.model):
        return (rank,)
    retrieve_precision = onnx_precision("mtgr_onnx_retrieve", precision)
    retrieve = Graph(
        "mtgr_onnx_retrieve",
        typed(retrieve_graph(checkpoint.model, last), retrieve_precision),
        ("context",),
        ("items", "scores"),
        axes[:1],
        retrieve_error,
        retrieve_precision,
    )
    return rank, retrieve


def example_rows(checkpoint: Checkpoint, count: int) -> tuple[Tensor, ...]:
    """Rows to trace with; no dimension is 1, which the tracer would take for a constant."""
    length = min(40, checkpoint.schema.max_context)
    return random_rows(checkpoint.schema, checkpoint.catalog, 2, length, 12, np.random.default_rng(0))[:count]
