"""What TensorRT 8.6 needs otherwise than 10 and 11, in one place.

8.6 is weakly typed: precision is a permission to the builder, not a property of the graph. It has no progress monitor,
and batch is explicit only if the network says so. Nothing else of the project knows the difference. Take this file
away with the last host that has 8.6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

LEGACY = (8, 6)


def is_legacy(version: tuple[int, int]) -> bool:
    """Whether a TensorRT (major, minor) is built for through this file."""
    return version == LEGACY


def legacy_network(trt: Any, builder: Any) -> Any:
    """A network with an explicit batch axis."""
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))


def stated_types(trt: Any, network: Any) -> dict[str, Any]:
    """The type that the graph gives each tensor, by name; the network calls all floats fp32.

    A constant's weights and a cast know theirs. All else has the type of its inputs, as operators of ONNX take one
    type of floats.
    """
    types: dict[str, Any] = {}
    for layer in _layers(network):
        cast = _constant_type(trt, layer) if layer.type == trt.LayerType.CONSTANT else _cast_to(trt, layer)
        inputs = [types.get(tensor.name, tensor.dtype) for tensor in _inputs(layer)]
        for tensor in _outputs(layer):
            kind = tensor.dtype
            if kind == trt.float32:
                kind = cast if cast is not None else trt.float16 if trt.float16 in inputs else kind
            types[tensor.name] = kind
    return types


def allow_precision(trt: Any, config: Any, network: Any, precision: str, free: bool = False) -> str:
    """Let the builder use what the graph's types mean, and nothing less where the graph says fp32.

    Args:
        trt: The module ``tensorrt``.
        config: Its builder config.
        network: The parsed network, whose fp32 parts (bias, time, mask, norms, TopK) are pinned.
        precision: ``fp32``, ``fp16`` or ``int8``.
        free: Whether any layer may be in 16 bits instead, and none is pinned.

    Returns:
        ``obeyed`` where layers are pinned, else ``none``.
    """
    if precision == "int8":
        # What stands between the quantizers is fp32 in the graph, and stays that unless it is free.
        config.set_flag(trt.BuilderFlag.INT8)
    if precision == "fp16" or (precision == "int8" and free):
        config.set_flag(trt.BuilderFlag.FP16)
    if precision != "fp16" or free:
        return "none"
    types = stated_types(trt, network)
    if trt.float16 not in types.values():
        return "none"  # the parser has told nothing, and all would be pinned
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    # A conversion is told by its two types, and a constant or a shape by what uses it.
    typeless = (trt.LayerType.CONSTANT, trt.LayerType.SHAPE, trt.LayerType.CAST, trt.LayerType.IDENTITY)
    for layer in _layers(network):
        outputs = [types[tensor.name] for tensor in _outputs(layer)]
        inputs = [types.get(tensor.name, tensor.dtype) for tensor in _inputs(layer)]
        wide = [place for place, kind in enumerate(outputs) if kind == trt.float32]
        if layer.type in typeless or not wide or trt.float16 in (*outputs, *inputs):
            continue
        layer.precision = trt.float32
        for place in wide:
            layer.set_output_type(place, trt.float32)
    return "obeyed"


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))


def _outputs(layer: Any) -> list[Any]:
    return [layer.get_output(place) for place in range(layer.num_outputs)]


def _inputs(layer: Any) -> list[Any]:
    found = [layer.get_input(place) for place in range(layer.num_inputs)]
    return [tensor for tensor in found if tensor is not None]  # optional ones


def _constant_type(trt: Any, layer: Any) -> Any:
    """What a constant's weights are stored in, if that is fp16; None otherwise."""
    if layer.get_output(0).dtype != trt.float32:
        return None
    layer.__class__ = trt.IConstantLayer  # the bindings give the base class
    return trt.float16 if str(getattr(layer.weights, "dtype", "")) in ("float16", "DataType.HALF") else None


def _cast_to(trt: Any, layer: Any) -> Any:
    """What a conversion converts to; None for other layers."""
    if layer.type == trt.LayerType.CAST:
        layer.__class__ = trt.ICastLayer  # the bindings give the base class
        return layer.to_type
    if layer.type == trt.LayerType.IDENTITY and layer.output_type_is_set(0):
        return layer.get_output_type(0)
    return None


def relaxations(trt: Any, config: Any, network: Any) -> Iterator[str]:
    """Loosen constraints step by step, for a builder that found no kernels that obey them; none where there are none.

    Parity decides whether a plan that was built so is good enough.

    Yields:
        What constraints are now: ``preferred``, wishes; then ``dropped``, and every layer may be in either precision.
    """
    if not config.get_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS):
        return
    config.clear_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
    yield "preferred"
    config.clear_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
    for layer in _layers(network):
        if layer.precision_is_set:
            layer.reset_precision()
            for place in range(layer.num_outputs):
                if layer.output_type_is_set(place):
                    layer.reset_output_type(place)
    yield "dropped"


def without_blas(trt: Any, config: Any) -> None:
    """Leave cuBLAS and cuDNN out, for a host that has 8.6 without them."""
    sources = (trt.TacticSource.JIT_CONVOLUTIONS, trt.TacticSource.EDGE_MASK_CONVOLUTIONS)
    config.set_tactic_sources(sum(1 << int(source) for source in sources))
