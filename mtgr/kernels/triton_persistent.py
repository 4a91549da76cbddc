# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
"""A product with SiLU in its epilogue whose programs stay: one a multiprocessor, each with many tiles in turn.

With few steps along the summed dimension, loading a tile's first operands and storing its result are as long as its
products; here the next tile's loads run while a result is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mtgr.kernels.launch import Launch

_LOG2_E = tl.constexpr(1.4426950408889634)

# Tiles of rows that take the same columns in turn, so that the weight's are still in the L2 cache.
_GROUP = 8
_STEP = 64

# Without a GPU there is nothing to count: fewer than tiles, so that the interpreter meets programs with several.
_PROGRAMS = 3


@triton.jit
def _activated(total, bias, columns, num_columns: tl.constexpr, is_silu: tl.constexpr):
    total += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    if is_silu:
        total = total / (1.0 + tl.exp2(total * -_LOG2_E))
    return total


@triton.jit(do_not_specialize=["num_rows"])
def persistent_linear_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_columns: tl.constexpr,
    depth: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group: tl.constexpr,
    programs: tl.constexpr,
    flatten: tl.constexpr,
    is_halved: tl.constexpr,
    is_silu: tl.constexpr,
):
    """Tiles, FP32 [block_m, block_n] each, of activation(x W^T + b); the result is stored in one part or two."""
    column_tiles = tl.cdiv(num_columns, block_n)
    row_tiles = tl.cdiv(num_rows, block_m)
    in_group = group * column_tiles
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=flatten):
        first_tile = tile // in_group * group
        members = tl.minimum(row_tiles - first_tile, group)
        row = (first_tile + tile % in_group % members) * block_m
        column = tile % in_group // members * block_n
        total = tl.zeros([block_m, block_n], dtype=tl.float32)
        for start in tl.range(0, depth, block_k):
            left = x.load([row, start])
            right = weight.load([column, start])
            total = tl.dot(left, tl.trans(right), total)
        if is_halved:
            half: tl.constexpr = block_n // 2
            columns = column + tl.arange(0, half)
            first, second = tl.split(tl.permute(tl.reshape(total, [block_m, 2, half]), [0, 2, 1]))
            first = _activated(first, bias, columns, num_columns, is_silu)
            out.store([row, column], first.to(out.dtype))
            second = _activated(second, bias, columns + half, num_columns, is_silu)
            out.store([row, column + half], second.to(out.dtype))
        else:
            columns = column + tl.arange(0, block_n)
            total = _activated(total, bias, columns, num_columns, is_silu)
            out.store([row, column], total.to(out.dtype))


def persistent_linear_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    is_silu: bool,
    tile: tuple[int, int, int, int] = (128, 256, 8, 3),
    is_halved: bool = True,
    flatten: bool = True,
    programs: int | None = None,
) -> Launch:
    """The launch that makes ``out``, [T, N], of ``mtgr.kernels.linear.linear_silu``, on Hopper and later.

    Args:
        x: FP16 or BF16 [T, K], K a multiple of 64, rows at multiples of 16 bytes.
        weight: Like x, [N, K].
        bias: Float [N].
        out: Like x, [T, N], N a multiple of 8.
        is_silu: Whether the activation is SiLU, or none.
        tile: Rows and columns of a tile, warps, and pairs of operands on their way at once.
        is_halved: Whether half a tile's result at a time is converted and stored, in half of the shared memory.
        flatten: Whether loads of the next tile may begin before this one's result is stored.
        programs: How many stay; one a multiprocessor by default.
    """
    block_m, block_n, warps, stages = tile
    if programs is None:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else _PROGRAMS
    tiles = triton.cdiv(x.shape[0], block_m) * triton.cdiv(weight.shape[0], block_n)
    stored = [block_m, block_n // 2 if is_halved else block_n]
    return Launch(
        kernel=persistent_linear_kernel,
        grid=(min(programs, tiles),),
        arguments=(
            TensorDescriptor(x, list(x.shape), list(x.stride()), [block_m, _STEP]),
            TensorDescriptor(weight, list(weight.shape), list(weight.stride()), [block_n, _STEP]),
            bias,
            TensorDescriptor(out, list(out.shape), list(out.stride()), stored),
            x.shape[0],
        ),
        options={
            "num_columns": weight.shape[0],
            "depth": x.shape[1],
            "block_m": block_m,
            "block_n": block_n,
            "block_k": _STEP,
            "group": _GROUP,
            "programs": programs,
            "flatten": flatten,
            "is_halved": is_halved,
            "is_silu": is_silu,
            "num_warps": warps,
            "num_stages": stages,
        },
    )
