"""Rewrite an exported graph for opset 17, the newest that TensorRT 8.6 reads.

PyTorch writes opset 18 and up. ONNX's own converter to 17 gives up on graphs whose axes are shared constants, and
8.6 has one more wish that no opset asks for, so the few operators that changed are rewritten here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from mtgr.errors import ConfigurationError

OPSET_17 = 17
_TRACED = 18  # the oldest that PyTorch writes without a converter
_IR_VERSION = 8  # of opset 17's time
# Operators whose axes became an input in opset 18; ReduceSum's did long before.
_AXES_AS_ATTRIBUTE = frozenset(
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)


def traced_opset(opset: int) -> int:
    """What to trace a graph at that shall have ``opset`` in the end."""
    return _TRACED if opset == OPSET_17 else opset


def lower_to_17(path: Path) -> None:
    """Rewrite the graph of opset 18 in ``path``, which holds its weights itself.

    Raises:
        ConfigurationError: If it has an operator whose meaning in opset 17 is not known to be the same.
    """
    model = onnx.load(path)
    lower(model)
    onnx.save(model, path)


def lower(model: ModelProto) -> None:
    """Rewrite a graph of opset 18 in memory; see :func:`lower_to_17`."""
    found = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if found != [_TRACED]:
        raise ConfigurationError(f"the graph is of opset {found}; trace it at {_TRACED} to lower it to {OPSET_17}.")
    graph = model.graph
    constants = _constants(graph)
    nodes = [new for node in graph.node for new in _lowered(node, graph, constants)]
    del graph.node[:]
    graph.node.extend(nodes)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", OPSET_17))
    model.ir_version = min(model.ir_version, _IR_VERSION)


def _lowered(node: NodeProto, graph: GraphProto, constants: dict[str, list[int]]) -> Iterator[NodeProto]:
    if node.op_type in _AXES_AS_ATTRIBUTE:
        _axes_to_attribute(node, constants)
    elif node.op_type == "Split" and _take(node, "num_outputs") is not None and len(node.input) < 2:
        raise ConfigurationError(f"{node.name} splits into equal parts; give the sizes of the parts.")
    elif node.op_type == "Shape":
        start, end = _take(node, "start"), _take(node, "end")
        if start is not None or end is not None:
            # 8.6 reads all dimensions of it, whatever is asked for, and then stops at what the shape is used for.
            yield from _part_of_shape(node, graph, start or 0, end)
            return
    yield node


def _axes_to_attribute(node: NodeProto, constants: dict[str, list[int]]) -> None:
    keep_all = _take(node, "noop_with_empty_axes")
    if len(node.input) < 2 or not node.input[1]:
        if keep_all:
            raise ConfigurationError(f"{node.name} reduces nothing; opset {OPSET_17} has no such operator.")
        del node.input[1:]
        return
    axes = constants.get(node.input[1])
    if axes is None:
        raise ConfigurationError(f"{node.name} computes its axes; make them constants.")
    del node.input[1:]
    node.attribute.append(helper.make_attribute("axes", axes))


def _part_of_shape(node: NodeProto, graph: GraphProto, start: int, end: int | None) -> Iterator[NodeProto]:
    output = node.output[0]
    bounds = []
    for word, value in (("start", start), ("end", np.iinfo(np.int64).max if end is None else end)):
        bounds.append(f"{output}.{word}")
        graph.initializer.append(numpy_helper.from_array(np.array([value], dtype=np.int64), bounds[-1]))
    node.output[0] = f"{output}.all"
    yield node
    yield helper.make_node("Slice", [f"{output}.all", *bounds], [output], f"{output}.part")


def _take(node: NodeProto, name: str) -> int | None:
    """Remove an integer attribute and give its value."""
    for index, attribute in enumerate(node.attribute):
        if attribute.name == name:
            value = int(attribute.i)
            del node.attribute[index]
            return value
    return None


def _constants(graph: GraphProto) -> dict[str, list[int]]:
    """Integer vectors that are part of the graph, by name."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                tensors[node.output[0]] = attribute.t
    return {
        name: numpy_helper.to_array(tensor).reshape(-1).tolist()
        for name, tensor in tensors.items()
        if tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) <= 1
    }
