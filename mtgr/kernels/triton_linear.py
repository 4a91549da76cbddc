# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
"""Products with SiLU in their epilogue, in half precision and FP8, in Triton's language: one program a tile."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mtgr.kernels.dispatch import capability_of
from mtgr.kernels.launch import Launch, is_aligned
from mtgr.kernels.linear import BLOCK, STEP, QuantisedRows, QuantisedWeight
from mtgr.kernels.triton_fp8 import to_e4m3
from mtgr.kernels.triton_rounding import rounded

_LOG2_E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(448.0)

# Tiles of rows that take the same columns in turn, so that the weight's are still in the L2 cache.
_GROUP = 8
# The same where most tiles of rows may be skipped: the few that are not lie far apart.
_SPARSE_GROUP = 32
_ROWS_PER_PROGRAM = 16


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x,
    weight,
    bias,
    out,
    x_scales,
    weight_scales,
    wanted,
    num_rows,
    stride_x,
    stride_weight,
    stride_out,
    stride_x_scales,
    stride_weight_scales,
    num_columns: tl.constexpr,
    depth: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group: tl.constexpr,
    use_descriptors: tl.constexpr,
    is_fp8: tl.constexpr,
    is_silu: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    interpreted: tl.constexpr,
):
    """One tile, FP32 [block_m, block_n], of activation(x W^T + b); nothing if none of its rows is ``wanted``."""
    column_tiles = tl.cdiv(num_columns, block_n)
    row_tiles = tl.cdiv(num_rows, block_m)
    program = tl.program_id(0)
    in_group = group * column_tiles
    first_tile = program // in_group * group
    members = tl.minimum(row_tiles - first_tile, group)
    row_tile = first_tile + program % in_group % members
    column_tile = program % in_group // members

    rows = row_tile * block_m + tl.arange(0, block_m)
    columns = column_tile * block_n + tl.arange(0, block_n)
    steps = tl.arange(0, block_k)
    if wanted is not None:
        is_read = tl.load(wanted + rows, mask=rows < num_rows, other=0)
        if tl.max(is_read.to(tl.int32), axis=0) == 0:
            return
    # Beyond the edges the last row is read again: what comes of it is not stored.
    read_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    read_columns = tl.minimum(columns, num_columns - 1).to(tl.int64)
    total = tl.zeros([block_m, block_n], dtype=tl.float32)
    for start in tl.range(0, depth, block_k):
        if use_descriptors:
            left = x.load([row_tile * block_m, start])
            right = weight.load([column_tile * block_n, start])
        elif depth % block_k != 0:
            present = (start + steps < depth)[None, :]
            left = tl.load(x + read_rows[:, None] * stride_x + (start + steps)[None, :], mask=present, other=0.0)
            right = tl.load(weight + read_columns[:, None] * stride_weight + (start + steps)[None, :], mask=present, other=0.0)  # fmt: skip  # noqa: E501
        else:
            left = tl.load(x + read_rows[:, None] * stride_x + (start + steps)[None, :])
            right = tl.load(weight + read_columns[:, None] * stride_weight + (start + steps)[None, :])
        if widen:
            left, right = left.to(tl.float32), right.to(tl.float32)
        if is_fp8:
            of_rows = tl.load(x_scales + read_rows * stride_x_scales + start // block_k)
            of_columns = tl.load(weight_scales + column_tile * block_n // block_k * stride_weight_scales + start // block_k)  # fmt: skip  # noqa: E501
            total += tl.dot(left, tl.trans(right)) * (of_rows * of_columns)[:, None]
        else:
            total = tl.dot(left, tl.trans(right), total, input_precision=precision)
    total += tl.load(bias + read_columns).to(tl.float32)[None, :]
    if is_silu:
        if wanted is not None:  # as PyTorch, which makes the same rows where they are few
            total = rounded(total, out.dtype.element_ty, interpreted).to(tl.float32)
        total = total / (1.0 + tl.exp2(total * -_LOG2_E))
    tl.store(
        out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :],
    )


@triton.jit(do_not_specialize=["num_rows"])
def quantise_rows_kernel(
    x,
    data,
    scales,
    num_rows,
    stride_x,
    stride_data,
    stride_scales,
    width: tl.constexpr,
    filled: tl.constexpr,
    block: tl.constexpr,
    block_rows: tl.constexpr,
    interpreted: tl.constexpr,
):
    """Round ``block`` columns of some rows, with one scale for each row; zeros up to column ``filled``."""
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    present = (rows < num_rows)[:, None]
    wide = rows.to(tl.int64)[:, None]
    part = tl.load(x + wide * stride_x + columns[None, :], mask=present & (columns < width)[None, :], other=0.0)
    part = part.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(part), axis=1), 1e-12) / _LARGEST
    tl.store(scales + rows.to(tl.int64) * stride_scales + tl.program_id(1), scale, mask=rows < num_rows)
    inside = present & (columns < filled)[None, :]
    tl.store(data + wide * stride_data + columns[None, :], to_e4m3(part / scale[:, None], interpreted), mask=inside)


def linear_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    is_silu: bool,
    tile: tuple[int, int, int, int] | None = None,
    wanted: Tensor | None = None,
) -> Launch:
    """The launch that makes ``out``, [T, N], of ``mtgr.kernels.linear.linear_silu``.

    ``tile`` is block_m, block_n, num_warps, num_stages. Tiles without a ``wanted`` row, BOOL [T], stay unwritten.
    """
    return _launch(x, weight, bias, out, None, None, STEP, is_silu, tile, wanted)


def fp8_linear_launch(
    rows: QuantisedRows,
    weight: QuantisedWeight,
    bias: Tensor,
    out: Tensor,
    *,
    is_silu: bool,
    tile: tuple[int, int, int, int] | None = None,
) -> Launch:
    """The launch that makes ``out``, [T, N], of ``mtgr.kernels.linear.fp8_linear``."""
    return _launch(rows.data, weight.data, bias, out, rows.scales, weight.scales, BLOCK, is_silu, tile)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    x_scales: Tensor | None,
    weight_scales: Tensor | None,
    block_k: int,
    is_silu: bool,
    tile: tuple[int, int, int, int] | None,
    wanted: Tensor | None = None,
) -> Launch:
    tokens, columns = out.shape
    is_fp8 = x_scales is not None
    interpreted = triton.knobs.runtime.interpret
    # Copies of whole tiles need rows that begin at multiples of 16 bytes; products on tensor cores have them.
    use_descriptors = has_descriptors(x.device) and is_aligned(x, weight)
    block_m, block_n, warps, stages = tile or tiles(tokens, use_descriptors, is_fp8)[0]
    left: Any = x
    right: Any = weight
    if use_descriptors:
        left = TensorDescriptor(x, list(x.shape), list(x.stride()), [block_m, block_k])
        right = TensorDescriptor(weight, list(weight.shape), list(weight.stride()), [block_n, block_k])
    return Launch(
        kernel=linear_kernel,
        grid=(triton.cdiv(tokens, block_m) * triton.cdiv(columns, block_n),),
        arguments=(
            left,
            right,
            bias,
            out,
            x_scales,
            weight_scales,
            wanted,
            tokens,
            x.stride(0),
            weight.stride(0),
            out.stride(0),
            0 if x_scales is None else x_scales.stride(0),
            0 if weight_scales is None else weight_scales.stride(0),
        ),
        options={
            "num_columns": columns,
            "depth": x.shape[1],
            "block_m": block_m,
            "block_n": block_n,
            "block_k": block_k,
            "group": _GROUP if wanted is None else _SPARSE_GROUP,
            "use_descriptors": use_descriptors,
            "is_fp8": is_fp8,
            "is_silu": is_silu,
            "precision": "ieee",
            # The interpreter would multiply the bits of BF16 and FP8; FP32 gives the same products.
            "widen": interpreted and x.dtype not in (torch.float16, torch.float32),
            "interpreted": interpreted,
            "num_warps": warps,
            "num_stages": stages,
        },
    )


def tiles(tokens: int, use_descriptors: bool, is_fp8: bool) -> list[tuple[int, int, int, int]]:
    """Tiles worth measuring, the safest first: block_m, block_n, num_warps, num_stages."""
    if tokens <= 64:
        return [(16, 64, 4, 4), (64, 64, 4, 4)]
    if use_descriptors:
        return [(128, 128, 8, 3), (64, 128, 4, 3)] if is_fp8 else [(128, 256, 8, 3), (128, 128, 8, 4), (64, 128, 4, 4)]
    return [(64, 128, 4, 3), (128, 128, 8, 3)]


def has_descriptors(device: torch.device) -> bool:
    """Whether the GPU copies whole tiles."""
    if device.type == "cuda":
        return capability_of(device) >= 90
    target = None if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target()
    return target is not None and target.arch >= 90


def quantise_rows_launch(x: Tensor, made: QuantisedRows) -> Launch:
    """The launch that fills what ``mtgr.kernels.linear.quantise_rows`` returns."""
    tokens, width = x.shape
    filled = made.data.shape[1]
    block = triton.next_power_of_2(filled) if made.by_row else BLOCK
    rows = max(1, _ROWS_PER_PROGRAM * BLOCK // block)
    return Launch(
        kernel=quantise_rows_kernel,
        grid=(triton.cdiv(tokens, rows), made.scales.shape[1]),
        arguments=(x, made.data, made.scales, tokens, x.stride(0), made.data.stride(0), made.scales.stride(0)),
        options={
            "width": width,
            "filled": filled,
            "block": block,
            "block_rows": rows,
            "interpreted": triton.knobs.runtime.interpret,
            "num_warps": 4,
        },
    )
