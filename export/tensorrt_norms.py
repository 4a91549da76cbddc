"""Leave out divisions by a constant before a layer normalisation, for TensorRT 8.6.

Normalising x / N with epsilon e is normalising x with epsilon e N^2. A plan whose fp16 is a permission may keep A V / N
in 16 bits, where it underflows (a mean of thousands of weights); A V itself does not.
"""

from __future__ import annotations

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_EPSILON = 1e-5  # where a normalisation says nothing


def without_divisions(model: ModelProto) -> int:
    """Change a graph in memory.

    Returns:
        The number of divisions that it had.
    """
    graph = model.graph
    users = _users(graph)
    scalars = _scalars(graph)
    gone = []
    for node in graph.node:
        if node.op_type != "Div" or node.input[1] not in scalars:
            continue
        after = users.get(node.output[0], [])
        if len(after) != 1 or after[0].op_type != "LayerNormalization" or after[0].input[0] != node.output[0]:
            continue
        (norm,) = after
        norm.input[0] = node.input[0]
        _scale_epsilon(norm, scalars[node.input[1]] ** 2)
        gone.append(node)
    for node in gone:
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    return len(gone)


def _users(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """Nodes that read each value; outputs of the graph count as read twice."""
    users: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for value in graph.output:
        users.setdefault(value.name, []).extend([NodeProto(), NodeProto()])
    return users


def _scalars(graph: GraphProto) -> dict[str, float]:
    """Constants of one number, by name."""
    tensors = [(tensor.name, tensor) for tensor in graph.initializer]
    for node in graph.node:
        if node.op_type == "Constant":
            tensors += [(node.output[0], entry.t) for entry in node.attribute if entry.name == "value"]
    return {
        name: float(numpy_helper.to_array(tensor).reshape(-1)[0])
        for name, tensor in tensors
        if tensor.data_type in _FLOATS and all(size == 1 for size in tensor.dims)
    }


def _scale_epsilon(norm: NodeProto, factor: float) -> None:
    for attribute in norm.attribute:
        if attribute.name == "epsilon":
            attribute.f *= factor
            return
    norm.attribute.append(helper.make_attribute("epsilon", _EPSILON * factor))
