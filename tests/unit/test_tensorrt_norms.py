"""Divisions before layer normalisations: what is left out, and that answers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.tensorrt_norms import without_divisions

LENGTH = 64.0


def graph_of(
    nodes: list[onnx.NodeProto], outputs: tuple[str, ...] = ("y",), dtype: Any = np.float32
) -> onnx.ModelProto:
    """``x`` [B, 4] -> outputs, with the constants that nodes may use."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    constants = {"length": np.array(LENGTH, dtype), "many": np.full(4, LENGTH, dtype), "ones": np.ones(4, dtype)}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", kind, ["B", 4])],
        [helper.make_tensor_value_info(name, kind, ["B", 4]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def answer(model: onnx.ModelProto, scale: float = 1.0) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = (scale * np.random.default_rng(0).normal(size=(3, 4))).astype(np.float32)
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("epsilon", [{"epsilon": 1e-4}, {}])
@pytest.mark.parametrize("inline", [True, False])
def test_a_normalisation_takes_the_division_into_its_epsilon(epsilon: dict[str, float], inline: bool) -> None:
    divisor = "constant" if inline else "length"
    nodes = [
        helper.make_node("Constant", [], ["constant"], value=numpy_helper.from_array(np.array([LENGTH], np.float32))),
        helper.make_node("Div", ["x", divisor], ["mean"]),
        helper.make_node("LayerNormalization", ["mean", "ones"], ["y"], axis=-1, **epsilon),
    ]
    model = graph_of(nodes)
    before = [answer(model, scale) for scale in (0.1, 1.0, 1e3)]  # the epsilon decides, and does not
    assert without_divisions(model) == 1
    onnx.checker.check_model(model)
    assert {tensor.name for tensor in model.graph.initializer} == {"ones"}
    assert "Div" not in {node.op_type for node in model.graph.node}
    for scale, expected in zip((0.1, 1.0, 1e3), before, strict=True):
        np.testing.assert_allclose(answer(model, scale), expected, atol=1e-6)


def test_other_divisions_stay() -> None:
    norm = helper.make_node("LayerNormalization", ["mean", "ones"], ["y"], axis=-1)
    mean = helper.make_node("Div", ["x", "length"], ["mean"])
    for nodes, outputs in (
        ([mean, norm], ("y", "mean")),  # asked for
        ([mean, norm, helper.make_node("Add", ["y", "mean"], ["z"])], ("z",)),  # used elsewhere
        ([helper.make_node("Div", ["x", "many"], ["mean"]), norm], ("y",)),  # a number each
        ([helper.make_node("Div", ["x", "x"], ["mean"]), norm], ("y",)),
        ([mean, helper.make_node("LayerNormalization", ["x", "mean"], ["y"], axis=-1)], ("y",)),  # its gain
    ):
        assert without_divisions(graph_of(nodes, outputs)) == 0


def test_graphs_in_16_bits_lose_it_too() -> None:
    nodes = [
        helper.make_node("Div", ["x", "length"], ["mean"]),
        helper.make_node("LayerNormalization", ["mean", "ones"], ["y"], axis=-1, epsilon=1e-3),
    ]
    model = graph_of(nodes, dtype=np.float16)
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert without_divisions(model) == 1
    (epsilon,) = [entry.f for entry in model.graph.node[0].attribute if entry.name == "epsilon"]
    assert epsilon == pytest.approx(1e-3 * LENGTH**2)
