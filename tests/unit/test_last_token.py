"""Retrieval graphs for a TensorRT that cannot build attention with one query: same answers, other operators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from export.agreement import check_graph
from export.graphs import LastToken
from export.onnx_graphs import Graph, example_rows, graph_of
from export.opset import OPSET_17
from export.precision import Precision
from export.trace import save_graph
from mtgr.checkpoint import Checkpoint
from tests.unit.models import small_catalog, small_config, small_schema, spread_model

SHAPES = ((1, 1, 1), (2, 33, 1), (3, 130, 1), (1, 256, 1))
PLAIN: tuple[LastToken, ...] = ("sums", "rows", "company")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def checkpoint(bias: bool, items: int = 40) -> Checkpoint:
    config = small_config(max_positions=1024, relative_bias=bias)
    schema, catalog = small_schema(items, max_history=300), small_catalog(items)
    return Checkpoint(spread_model(config, schema, catalog, 0), config, schema, catalog)


def saved(loaded: Checkpoint, last: LastToken, precision: Precision, path: Path) -> Graph:
    graph = graph_of(loaded, "mtgr_onnx_retrieve", precision, last)
    save_graph(graph.module, path, example_rows(loaded, 1), graph, OPSET_17)
    return graph


@pytest.mark.parametrize("last", PLAIN)
@pytest.mark.parametrize(("precision", "bias"), [("fp32", True), ("fp16", False)])
def test_answers_are_those_of_the_reference(last: LastToken, precision: Precision, bias: bool, tmp_path: Path) -> None:
    loaded = checkpoint(bias)
    graph = saved(loaded, last, precision, tmp_path / "model.onnx")
    agreement = check_graph(graph, tmp_path / "model.onnx", loaded, SHAPES, seed=1)
    assert agreement.problem(precision) is None
    if precision == "fp32":
        assert agreement.error <= 1e-6


def test_operators_that_stop_8_6_are_gone(tmp_path: Path) -> None:
    items = 4_000  # too many for the exporter to compute their vectors by itself
    loaded = checkpoint(bias=True, items=items)
    found, computed = {}, {}
    for last in ("products", *PLAIN):
        saved(loaded, last, "fp32", tmp_path / f"{last}.onnx")
        graph = found[last] = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / f"{last}.onnx")).graph
        tables = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and tensor.dims[0] == items}
        computed[last] = {node.op_type for node in graph.node if tables & set(node.input)} - {"Gather"}
    assert single_queries(found["products"]) == 2  # Q K^T and A V of the last token
    assert computed["products"] == {"Add", "Gemm"}  # the vectors of all items, in every request
    for last in PLAIN:
        assert single_queries(found[last]) == 0
        assert not {node.op_type for node in found[last].node} & {"Gemm", "ReduceL2", "Expand"}
        assert not computed[last]


def single_queries(graph: Any) -> int:
    """Products of two activations by head [B, h, q, n] that have one query."""
    shapes = {
        value.name: [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input)
    }
    products = [node for node in graph.node if node.op_type == "MatMul"]
    return sum(len(shape) == 4 and shape[2] == 1 for shape in (shapes.get(node.input[0], []) for node in products))
