"""Graphs lowered to opset 17 compute what they did, without what TensorRT 8.6 cannot read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.opset import OPSET_17, lower, lower_to_17
from mtgr.errors import ConfigurationError


def graph_of(
    nodes: Sequence[onnx.NodeProto], outputs: dict[str, int], constants: dict[str, Sequence[int]] | None = None
) -> onnx.ModelProto:
    """A graph of opset 18 with the input ``x``, FP32 [B, n, 4]."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "n", 4])],
        [helper.make_tensor_value_info(name, kind, ranks(name)) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def ranks(name: str) -> list[str]:
    """Names of unknown dimensions, as many as the output has."""
    return [f"{name}{axis}" for axis in range({"length": 1, "whole": 1, "batch": 1, "rest": 1}.get(name, 3))]


def answers(model: onnx.ModelProto) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)})


def test_a_lowered_graph_computes_the_same(tmp_path: Path) -> None:
    model = graph_of(
        [
            helper.make_node("ReduceMax", ["x", "axes"], ["max"], keepdims=1),
            helper.make_node("ReduceL2", ["x", "axes"], ["length"], keepdims=0),  # shares the constant
            helper.make_node("Constant", [], ["first"], value=numpy_helper.from_array(np.array([0], np.int64))),
            helper.make_node("ReduceMean", ["x", "first"], ["mean"], noop_with_empty_axes=0),
            helper.make_node("ReduceMin", ["x"], ["least"]),
            helper.make_node("ReduceSum", ["x", "axes"], ["sum"], noop_with_empty_axes=0),
            helper.make_node("Shape", ["x"], ["whole"]),
            helper.make_node("Shape", ["x"], ["batch"], start=0, end=1),
            helper.make_node("Shape", ["x"], ["rest"], start=-2),
            helper.make_node("Split", ["x", "sizes"], ["left", "right"], axis=2),
        ],
        {"max": 1, "length": 1, "mean": 1, "least": 1, "sum": 1, "whole": 7, "batch": 7, "rest": 7, "right": 1},
        {"axes": [1, 2], "sizes": [1, 3]},
    )
    onnx.checker.check_model(model)
    expected = answers(model)
    onnx.save(model, tmp_path / "model.onnx")
    lower_to_17(tmp_path / "model.onnx")
    lowered = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(lowered)
    assert [entry.version for entry in lowered.opset_import] == [OPSET_17]
    assert all(not node.attribute for node in lowered.graph.node if node.op_type == "Shape")
    assert [array.tolist() for array in answers(lowered)] == [array.tolist() for array in expected]
    assert answers(lowered)[7].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        (helper.make_node("Split", ["x"], ["y", "z"], "parts", axis=2, num_outputs=2), "parts splits into equal parts"),
        (helper.make_node("ReduceMax", ["x", "computed"], ["y"], "reduce"), "reduce computes its axes"),
        (helper.make_node("ReduceMax", ["x"], ["y"], "reduce", noop_with_empty_axes=1), "reduce reduces nothing"),
    ],
)
def test_what_opset_17_cannot_say_is_refused(node: onnx.NodeProto, sentence: str) -> None:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    with pytest.raises(ConfigurationError, match=sentence):
        lower(graph_of([copy], {"y": 1}))


def test_graphs_of_another_opset_are_refused() -> None:
    model = graph_of([helper.make_node("Identity", ["x"], ["y"])], {"y": 1})
    model.opset_import[0].version = 20
    with pytest.raises(ConfigurationError, match=r"of opset \[20\]; trace it at 18"):
        lower(model)
