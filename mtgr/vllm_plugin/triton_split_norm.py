# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
"""GroupLN over the columns of several ranks in Triton's language: statistics, and what is done with everyone's."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mtgr.kernels.dense_fp8 import LARGEST
from mtgr.kernels.launch import Launch
from mtgr.kernels.linear import BLOCK
from mtgr.kernels.triton_fp8 import to_e4m3

_BLOCK = tl.constexpr(BLOCK)
_LARGEST = tl.constexpr(LARGEST)
_ELEMENTS_PER_WARP = 512


@triton.jit
def statistics_kernel(
    x,
    out,
    stride_x,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    rank: tl.constexpr,
    ranks: tl.constexpr,
    padded_ranks: tl.constexpr,
):
    """Mean and variance of a row, at this rank's place among zeros."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, padded_width)
    inside = columns < width
    row = tl.load(x + token * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(row, axis=0) / width
    centred = tl.where(inside, row - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    places = tl.arange(0, padded_ranks)
    own = out + (token * ranks + places) * 2
    tl.store(own, tl.where(places == rank, mean, 0.0), mask=places < ranks)
    tl.store(own + 1, tl.where(places == rank, variance, 0.0), mask=places < ranks)


@triton.jit(do_not_specialize=["epsilon"], do_not_specialize_on_alignment=["types"])
def apply_kernel(
    x,
    statistics,
    types,
    gain,
    bias,
    gate,
    out,
    scales,
    epsilon,
    stride_types,
    stride_x,
    stride_gain,
    stride_bias,
    stride_gate,
    stride_out,
    stride_scales,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    ranks: tl.constexpr,
    padded_ranks: tl.constexpr,
    activates: tl.constexpr,
    is_fp8: tl.constexpr,
    interpreted: tl.constexpr,
):
    """Normalise this rank's part of a row with the statistics of all, apply gain, bias and gate, round once.

    In FP8 each block of numbers gets a scale, and the row's last block is filled up with zeros.
    """
    token = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, padded_ranks)
    present_ranks = places < ranks
    found = statistics + (token * ranks + places) * 2
    means = tl.load(found, mask=present_ranks, other=0.0)
    variances = tl.load(found + 1, mask=present_ranks, other=0.0)
    mean = tl.sum(means, axis=0) / ranks
    apart = tl.where(present_ranks, means - mean, 0.0)
    variance = tl.sum(variances + apart * apart, axis=0) / ranks
    columns = tl.arange(0, padded_width)
    inside = columns < width
    kind = tl.load(types + token * stride_types).to(tl.int64)
    row = tl.load(x + token * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    result = tl.where(inside, row - mean, 0.0) / tl.sqrt_rn(variance + epsilon)
    result *= tl.load(gain + kind * stride_gain + columns, mask=inside, other=0.0).to(tl.float32)
    result += tl.load(bias + kind * stride_bias + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gate + token * stride_gate + columns, mask=inside, other=0.0).to(tl.float32)
    result *= factor * tl.sigmoid(factor) if activates else factor
    if is_fp8:
        result = tl.reshape(tl.where(inside, result, 0.0), [padded_width // _BLOCK, _BLOCK])
        scale = tl.maximum(tl.max(tl.abs(result), axis=1), 1e-12) / _LARGEST
        blocks = tl.arange(0, padded_width // _BLOCK)
        present = blocks * _BLOCK < width
        tl.store(scales + token * stride_scales + blocks, scale, mask=present)
        place = blocks[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        tl.store(out + token * stride_out + place, to_e4m3(result / scale[:, None], interpreted), mask=present[:, None])
    else:
        tl.store(out + token * stride_out + columns, result.to(out.dtype.element_ty), mask=inside)


def statistics_launch(x: Tensor, rank: int, out: Tensor) -> Launch:
    """The launch that makes ``out``, [T, R, 2], of ``mtgr.vllm_plugin.split_norm.own_statistics``."""
    num_tokens, width = x.shape
    padded_width = triton.next_power_of_2(width)
    return Launch(
        kernel=statistics_kernel,
        grid=(num_tokens,),
        arguments=(x, out, x.stride(0)),
        options={
            "width": width,
            "padded_width": padded_width,
            "rank": rank,
            "ranks": out.shape[1],
            "padded_ranks": triton.next_power_of_2(out.shape[1]),
            "num_warps": _warps(padded_width),
        },
    )


def apply_launch(
    x: Tensor,
    statistics: Tensor,
    types: Tensor,
    gain: Tensor,
    bias: Tensor,
    epsilon: float,
    gate: Tensor,
    out: Tensor,
    scales: Tensor | None = None,
    activates: bool = False,
) -> Launch:
    """The launch that makes ``out``, [T, w], of ``mtgr.vllm_plugin.split_norm``; FP8 with ``scales``."""
    num_tokens, width = x.shape
    padded_width = triton.next_power_of_2(width)
    if scales is not None:
        padded_width = max(padded_width, BLOCK)
    return Launch(
        kernel=apply_kernel,
        grid=(num_tokens,),
        arguments=(
            x,
            statistics,
            types,
            gain,
            bias,
            gate,
            out,
            scales,
            epsilon,
            types.stride(0),
            x.stride(0),
            gain.stride(0),
            bias.stride(0),
            gate.stride(0),
            out.stride(0),
            0 if scales is None else scales.stride(0),
        ),
        options={
            "width": width,
            "padded_width": padded_width,
            "ranks": statistics.shape[1],
            "padded_ranks": triton.next_power_of_2(statistics.shape[1]),
            "activates": activates,
            "is_fp8": scales is not None,
            "interpreted": triton.knobs.runtime.interpret,
            "num_warps": _warps(padded_width),
        },
    )


def _warps(padded_width: int) -> int:
    return min(16, max(1, padded_width // _ELEMENTS_PER_WARP))
