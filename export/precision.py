"""Numeric precision of an artifact, and when one is close enough to the fp32 reference to be installed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mtgr.model.bias import RelativeBias
from mtgr.model.heads import WideTerms

Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

TOLERANCE = 1e-5  # absolute, on probabilities: another path in fp32
_NATIVE_FACTOR = 2.0  # a low-precision path may miss by twice what PyTorch misses in the same precision
# Smallest Spearman correlation with the reference, the mean over users, on a trained checkpoint.
_SPEARMAN = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.999, "int8": 0.99, "fp8": 0.99}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

Module = TypeVar("Module", bound=nn.Module)
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """How a path agrees with the reference in fp32.

    Attributes:
        error: Largest absolute difference of scores.
        native_error: The same of PyTorch in the path's own precision; None for fp32.
        spearman: Smallest over tasks of the mean over users of the rank correlation; None without a trained checkpoint.
        auc: By task, of the reference and of the path; empty where labels are not at hand.
    """

    error: float
    native_error: float | None = None
    spearman: float | None = None
    auc: dict[str, tuple[float, float]] = field(default_factory=dict)

    def problem(self, precision: Precision | Literal["fp8"]) -> str | None:
        """Why this is not close enough, as the end of a sentence; None if it is."""
        if not np.isfinite(self.error):
            return "its answers are no numbers, or not of the right shape"
        if precision == "fp32" and not self.error <= TOLERANCE:
            return f"it differs from PyTorch by {self.error:.1e}, more than {TOLERANCE:.0e}"
        if self.native_error is not None and not self.error <= max(TOLERANCE, _NATIVE_FACTOR * self.native_error):
            return (
                f"it differs from fp32 by {self.error:.1e}, more than twice as much as PyTorch does in {precision} "
                f"({self.native_error:.1e})"
            )
        if self.spearman is not None and not self.spearman >= _SPEARMAN[precision]:
            return f"its ranking correlates with that of fp32 by {self.spearman:.4f}, less than {_SPEARMAN[precision]}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """What a manifest says of it; figures that were not taken are left out."""
        values: dict[str, Any] = {"max_abs_error": self.error}
        if self.native_error is not None:
            values["max_abs_error_of_pytorch"] = self.native_error
        if self.spearman is not None:
            values["spearman"] = self.spearman
        if self.auc:
            values["auc"] = {task: {"fp32": before, "artifact": after} for task, (before, after) in self.auc.items()}
        return values


def typed(module: Module, precision: Precision) -> Module:
    """A copy with weights and activations of a precision.

    Relative biases, wide terms and what is computed from times and slots stay fp32: they are tables and comparisons,
    small beside the products, and rounding a position's or a bucket's bias shifts every score of a user. Norms take
    their statistics in fp32 by themselves. INT8 begins as fp32: it is made of the exported graph.
    """
    result = copy.deepcopy(module)
    if precision in ("fp32", "int8"):
        return result  # as it is: tables that are stored in 16 bits stay so
    result.to(_DTYPES[precision])
    for part in result.modules():
        if isinstance(part, RelativeBias | WideTerms):
            part.float()
    # A cast to 16 bits and back would keep the rounding.
    exact = {name: tensor for name, tensor in module.state_dict().items() if _is_wide(result, name)}
    result.load_state_dict(exact, strict=False)
    return result


def _is_wide(module: nn.Module, name: str) -> bool:
    path = name.rpartition(".")[0]
    while path:
        if isinstance(module.get_submodule(path), RelativeBias | WideTerms):
            return True
        path = path.rpartition(".")[0]
    return False


def mean_spearman(found: list[Float32Array], expected: list[Float32Array]) -> float:
    """Rank correlation with the reference, the mean over users, of the task where it is smallest.

    Args:
        found: FP32 [k, T] of each user.
        expected: The same of the reference.
    """
    by_task = [
        np.mean([_spearman(a[:, task], b[:, task]) for a, b in zip(found, expected, strict=True)])
        for task in range(expected[0].shape[1])
    ]
    return float(min(by_task))


def _spearman(found: Float32Array, expected: Float32Array) -> float:
    if np.ptp(found) == 0 or np.ptp(expected) == 0:
        return 1.0 if np.ptp(found) == np.ptp(expected) else 0.0
    return float(np.corrcoef(_ranks(found), _ranks(expected))[0, 1])


def _ranks(values: Float32Array) -> npt.NDArray[np.float64]:
    """Mean ranks, ties sharing theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return ranks


def rounded_fp32(source: Path, target: Path) -> int:
    """Write a graph in fp32 that computes what a bf16 graph does: ONNX Runtime has no kernels for bf16 on a CPU.

    Every value is rounded to bf16 and products run in fp32: what a GPU does, up to the order of sums, and what ONNX
    Runtime itself does with fp16 on a CPU.

    Args:
        source: Graph with bf16 weights and activations.
        target: Where the other goes.

    Returns:
        The number of values that are rounded to bf16.
    """
    model = onnx.load(source)
    graph = onnx.shape_inference.infer_shapes(model).graph
    is_bf16 = {value.name for value in (*graph.value_info, *graph.output) if _type(value) == TensorProto.BFLOAT16}
    tensors = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
        tensors.append(tensor)
    nodes = []
    rounded = 0
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "stash_type", "dtype") and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.BFLOAT16:
                array = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(array))
        names = list(node.output)
        nodes.append(node)
        for index, name in enumerate(names):
            if name not in is_bf16:
                continue
            node.output[index] = f"{name}.exact"
            nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.bf16"], to=TensorProto.BFLOAT16))
            nodes.append(helper.make_node("Cast", [f"{name}.bf16"], [name], to=TensorProto.FLOAT))
            rounded += 1
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)
    onnx.save(model, target)
    return rounded


def _type(value: onnx.ValueInfoProto) -> int:
    return int(value.type.tensor_type.elem_type)
