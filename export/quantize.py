"""INT8 graphs: weight matrix products in integers, everything else as it was.

Products of activations with activations (attention) stay in floating point, where quantising costs accuracy and time;
so do biases, the mask, and the time buckets. Weights have a scale per output channel.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

Inputs = Mapping[str, npt.NDArray[Any]]


def quantize_for_cpu(source: Path, target: Path) -> int:
    """INT8 weights, and activations whose scale is found at run time: what ONNX Runtime's CPU does fastest.

    Args:
        source: Graph in fp32.
        target: Where the INT8 graph goes.

    Returns:
        The number of products in INT8.
    """
    with _prepared(source) as prepared:
        nodes = weight_products(prepared)
        quantize_dynamic(
            prepared,
            target,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=nodes,
        )
    return len(nodes)


def quantize_for_tensorrt(source: Path, target: Path, calibration: Iterable[Inputs]) -> int:
    """Quantise and dequantise pairs around weights and activations, both symmetric, which TensorRT fuses into products.

    The blocks' output projections are left out: their input is a normalised value times a gate, whose few large numbers
    take the one scale that all the others have to share.

    Args:
        source: Graph in fp32.
        target: Where the INT8 graph goes.
        calibration: Requests whose activations give the scales.

    Returns:
        The number of products in INT8.
    """
    with _prepared(source) as prepared:
        nodes = weight_products(prepared, gated=False)
        quantize_static(
            prepared,
            target,
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=nodes,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                # TensorRT wants a pair of its own before each product, also where two share an input.
                "DedicatedQDQPair": True,
                "QDQKeepRemovableActivations": True,
                # TensorRT 8.6 takes weights in floating point, and quantises them itself when it builds.
                "AddQDQPairToWeight": True,
            },
        )
    return len(nodes)


def int8_in_pytorch(module: nn.Module) -> nn.Module:
    """A copy whose linear layers compute with rounded numbers: what INT8 costs, whoever multiplies.

    Weights are symmetric with a scale per output channel, inputs asymmetric with one that is found at run time.
    """
    result = copy.deepcopy(module)
    for layer in result.modules():
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                scale = layer.weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
                layer.weight.copy_((layer.weight / scale).round() * scale)
            layer.register_forward_pre_hook(_round_input)
    return result


def _round_input(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = inputs
    if not x.numel():  # retrieval has no candidates
        return inputs
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round()
    return (((x / scale + zero).round().clamp(0, 255) - zero) * scale,)


def weight_products(path: Path, gated: bool = True) -> list[str]:
    """Names of the products of an activation and a constant matrix.

    Args:
        path: Graph with its constants folded.
        gated: Whether those count whose activation is the product of two: the output projections of the blocks.
    """
    graph = onnx.load(path, load_external_data=False).graph
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    products = [node for node in graph.node if node.op_type == "MatMul" and set(node.input) & matrices]
    if gated:
        return [node.name for node in products]
    made_by = {name: node for node in graph.node for name in node.output}

    def is_gated(name: str) -> bool:
        node = made_by.get(name)
        if node is None or node.op_type != "Mul" or not set(node.input) <= set(made_by):
            return False
        # SiLU is a product too, of a value and its sigmoid.
        return "Sigmoid" not in {made_by[part].op_type for part in node.input}

    return [node.name for node in products if not any(is_gated(name) for name in node.input)]


@contextmanager
def _prepared(source: Path) -> Iterator[Path]:
    """The graph with its constants folded, beside the source for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix=".quantize.", dir=source.parent) as folder:
        prepared = Path(folder) / "model.onnx"
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it recommends the very step that is being taken
        try:
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            yield prepared
        finally:
            logging.disable(disabled)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, requests: Iterable[Inputs]) -> None:
        self._requests: Iterator[Inputs] = iter(requests)

    def get_next(self) -> Inputs | None:
        return next(self._requests, None)
