# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
"""Relative bias of a tile of logits in Triton's language, for dense and paged attention alike."""

from __future__ import annotations

import triton
import triton.language as tl

from mtgr.kernels.bias import FRACTION_BITS, GUESS_FACTOR, MAX_SECONDS, ONE_BITS

_MAX_SECONDS = tl.constexpr(MAX_SECONDS)
_ONE_BITS = tl.constexpr(ONE_BITS)
_GUESS_FACTOR = tl.constexpr(GUESS_FACTOR)
_GUESS_SHIFT = tl.constexpr(FRACTION_BITS + 9)


@triton.jit
def gather(table, index, staged: tl.constexpr):
    """table[index], FP32, of a vector that nothing writes; every index must be inside.

    Triton's software pipeline would bring each element ahead by a copy of its own to shared memory, four bytes at a
    time. An instruction that it does not know stays where it is.
    """
    if staged or table.dtype.element_ty != tl.float32:
        return tl.load(table + index).to(tl.float32)
    return tl.inline_asm_elementwise(
        "ld.global.nc.f32 $0, [$1];", "=f,l", [(table + index).to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def gather_integers(table, index, staged: tl.constexpr):
    """The same for INT32."""
    if staged:
        return tl.load(table + index)
    return tl.inline_asm_elementwise(
        "ld.global.nc.b32 $0, [$1];", "=r,l", [(table + index).to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def relative_bias(
    query_positions,
    query_times,
    keys,
    key_times,
    position_table,
    time_table,
    bucket_edges,
    limit,
    last_edge,
    staged: tl.constexpr,
):
    """Bias of a tile, FP32 [block_m, block_n]: three gathers from tables that fit the L1 cache.

    ``staged``: whether gathers are loads like others, which is all that the interpreter knows.
    """
    distance = tl.minimum(tl.maximum(query_positions[:, None] - keys[None, :], -limit), limit) + limit
    seconds = tl.minimum(tl.abs(query_times[:, None] - key_times[None, :]), _MAX_SECONDS)
    # The guess, ``mtgr.kernels.bias.guess_of``, is the bucket or the one before it; the integer edge decides.
    octaves = tl.maximum(seconds, 1).to(tl.float32).to(tl.int32, bitcast=True) - _ONE_BITS
    guess = ((octaves.to(tl.int64) * _GUESS_FACTOR) >> _GUESS_SHIFT).to(tl.int32)
    guess = tl.minimum(guess, last_edge)
    bucket = guess + (seconds >= gather_integers(bucket_edges, guess, staged)).to(tl.int32)
    return gather(position_table, distance, staged) + gather(time_table, bucket, staged)


@triton.jit
def own_bias(position_table, time_table, limit):
    """Bias of a token to itself, FP32."""
    return tl.load(position_table + limit).to(tl.float32) + tl.load(time_table).to(tl.float32)
