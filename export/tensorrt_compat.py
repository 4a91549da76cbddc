"""What TensorRT 8.6 needs otherwise than 10 and 11, in one place.

8.6 is weakly typed: precision is a permission to the builder, not a property of the graph. It has no progress monitor,
and batch is explicit only if the network says so. Nothing else of the project knows the difference. Take this file
away with the last host that has 8.6.
"""

from __future__ import annotations

from typing import Any

LEGACY = (8, 6)


def is_legacy(version: tuple[int, int]) -> bool:
    """Whether a TensorRT (major, minor) is built for through this file."""
    return version == LEGACY


def legacy_network(trt: Any, builder: Any) -> Any:
    """A network with an explicit batch axis."""
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))


def allow_precision(trt: Any, config: Any, network: Any, precision: str) -> None:
    """Let the builder use what the graph's types mean, and nothing less where the graph says fp32.

    Args:
        trt: The module ``tensorrt``.
        config: Its builder config.
        network: The parsed network, whose fp32 parts (bias, time, mask) are pinned.
        precision: ``fp32``, ``fp16`` or ``int8``.
    """
    if precision == "fp32":
        return
    config.set_flag(trt.BuilderFlag.FP16)
    if precision == "int8":
        config.set_flag(trt.BuilderFlag.INT8)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    quantizers = (trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE, trt.LayerType.CONSTANT, trt.LayerType.SHAPE)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(place) for place in range(layer.num_outputs)]
        # In an INT8 graph the products between the quantizers carry fp32 types and are what shall be quantized.
        if precision == "fp16" and layer.type not in quantizers and _all_float(trt, layer, outputs):
            layer.precision = trt.float32
            for place in range(layer.num_outputs):
                layer.set_output_type(place, trt.float32)


def without_blas(trt: Any, config: Any) -> None:
    """Leave cuBLAS and cuDNN out, for a host that has 8.6 without them."""
    sources = (trt.TacticSource.JIT_CONVOLUTIONS, trt.TacticSource.EDGE_MASK_CONVOLUTIONS)
    config.set_tactic_sources(sum(1 << int(source) for source in sources))


def _all_float(trt: Any, layer: Any, outputs: list[Any]) -> bool:
    inputs = [layer.get_input(place) for place in range(layer.num_inputs)]
    tensors = [*outputs, *(tensor for tensor in inputs if tensor is not None)]
    return bool(outputs) and all(tensor.dtype == trt.float32 for tensor in tensors)
