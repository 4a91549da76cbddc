"""Trace a network into an ONNX file, and what manifests say of one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from export.onnx_graphs import Graph
from export.opset import OPSET_17, lower_to_17, traced_opset
from export.tensorrt_norms import without_divisions

OPSET = 20


def save_graph(module: nn.Module, path: Path, example: tuple[Tensor, ...], graph: Graph, opset: int = OPSET) -> None:
    """Trace ``module`` on ``example`` rows and write an ONNX file."""
    trace(module, example, graph.inputs, graph.outputs, graph.dynamic_shapes, traced_opset(opset)).save(path)
    if opset == OPSET_17:  # for TensorRT 8.6
        lower_to_17(path)
        model = onnx.load(path)
        without_divisions(model)
        onnx.save(model, path)
    onnx.checker.check_model(str(path))


def trace(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: tuple[dict[int, Any], ...] | None,
    opset: int = OPSET,
    optimize: bool = True,
) -> torch.onnx.ONNXProgram:
    """The graph of ``module``, recorded on ``example`` rows; ``optimize`` needs weights that are there."""
    # The exporter speaks of its own deprecated calls and of packages it can do without: nothing a user could act on.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic_shapes,
            verbose=False,
            optimize=optimize,
        )
    assert program is not None
    return program


def versions(opset: int = OPSET) -> dict[str, str]:
    """What a manifest says of the software that made a graph."""
    return {
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "opset": str(opset),
    }


def shapes_of(model: onnx.ModelProto) -> dict[str, list[str | int]]:
    """What a manifest says of a graph's inputs and outputs: dtype and dimensions by name, -1 for those that vary."""
    return {
        value.name: [
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
            *(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim),
        ]
        for value in (*model.graph.input, *model.graph.output)
    }
