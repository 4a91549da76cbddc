# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
"""Scatter keys, values and times of a step into their caches, and clear its padding, in Triton's language."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mtgr.kernels.launch import Launch

_PROGRAM_ELEMENTS = 2048
_TIMES_PER_PROGRAM = 256
_ELEMENTS_AT_ONCE = 1024


@triton.jit(do_not_specialize_on_alignment=["slots"])
def store_keys_values_kernel(
    q,
    k,
    v,
    cache,
    slots,
    num_heads,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_cache_block,
    stride_cache_head,
    stride_cache_slot,
    head_size: tl.constexpr,
    padded_size: tl.constexpr,
    block_size: tl.constexpr,
    block_heads: tl.constexpr,
    activates: tl.constexpr,
):
    """Copy some heads of one token; put them through SiLU first, and the queries too, where they are not yet."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if not activates:  # noqa: SIM102 - decided when this is compiled
        if slot < 0:
            return
    heads = tl.program_id(1) * block_heads + tl.arange(0, block_heads)
    columns = tl.arange(0, padded_size)
    inside = (heads < num_heads)[:, None] & (columns < head_size)[None, :]
    of_keys = k + token * stride_k_token + heads[:, None] * stride_k_head + columns[None, :]
    of_values = v + token * stride_v_token + heads[:, None] * stride_v_head + columns[None, :]
    keys = tl.load(of_keys, mask=inside, other=0.0)
    values = tl.load(of_values, mask=inside, other=0.0)
    if activates:
        of_queries = q + token * stride_q_token + heads[:, None] * stride_q_head + columns[None, :]
        tl.store(of_queries, _silu(tl.load(of_queries, mask=inside, other=0.0)), mask=inside)
        keys, values = _silu(keys), _silu(values)
        kept = inside & (slot < 0)
        tl.store(of_keys, keys, mask=kept)
        tl.store(of_values, values, mask=kept)
    stored = inside & (slot >= 0)
    target = cache + slot // block_size * stride_cache_block + slot % block_size * stride_cache_slot
    target += heads[:, None] * stride_cache_head + columns[None, :]
    tl.store(target, keys.to(cache.dtype.element_ty), mask=stored)
    tl.store(target + head_size, values.to(cache.dtype.element_ty), mask=stored)


@triton.jit
def _silu(x):
    wide = x.to(tl.float32)
    return (wide * tl.sigmoid(wide)).to(x.dtype)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["times", "slots"])
def store_times_kernel(
    times,
    cache,
    slots,
    num_tokens,
    stride_times,
    stride_block,
    stride_slot,
    block_size: tl.constexpr,
    block_tokens: tl.constexpr,
):
    """Copy the times of ``block_tokens`` tokens."""
    tokens = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    slot = tl.load(slots + tokens, mask=tokens < num_tokens, other=-1).to(tl.int64)
    kept = slot >= 0
    value = tl.load(times + tokens.to(tl.int64) * stride_times, mask=kept, other=0)
    tl.store(cache + slot // block_size * stride_block + slot % block_size * stride_slot, value, mask=kept)


@triton.jit(do_not_specialize=["num_requests"], do_not_specialize_on_alignment=["query_start"])
def clear_padding_kernel(rows, query_start, num_requests, width, block: tl.constexpr):
    """Zero one row, if it is padding."""
    row = tl.program_id(0)
    if row < tl.load(query_start + num_requests):
        return
    first = rows + row.to(tl.int64) * width
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        tl.store(first + columns, tl.zeros([block], rows.dtype.element_ty), mask=columns < width)


def store_keys_values_launch(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> Launch:
    """The launch of ``mtgr.kernels.store.store_keys_values``, for at least one token."""
    return _keys_values_launch(None, k, v, cache, slots)


def activate_and_store_launch(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> Launch:
    """The launch of ``mtgr.kernels.store.activate_and_store``, for at least one token."""
    return _keys_values_launch(q, k, v, cache, slots)


def _keys_values_launch(q: Tensor | None, k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> Launch:
    num_tokens, num_heads, head_size = k.shape
    padded_size = triton.next_power_of_2(head_size)
    block_heads = min(triton.next_power_of_2(num_heads), max(1, _PROGRAM_ELEMENTS // padded_size))
    return Launch(
        kernel=store_keys_values_kernel,
        grid=(num_tokens, triton.cdiv(num_heads, block_heads)),
        arguments=(
            q,
            k,
            v,
            cache,
            slots,
            num_heads,
            0 if q is None else q.stride(0),
            0 if q is None else q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            cache.stride(0),
            cache.stride(1),
            cache.stride(2),
        ),
        options={
            "head_size": head_size,
            "padded_size": padded_size,
            "block_size": cache.shape[2],
            "block_heads": block_heads,
            "activates": q is not None,
            "num_warps": 4 if block_heads * padded_size >= 1024 else 1,
        },
    )


def store_times_launch(times: Tensor, cache: Tensor, slots: Tensor) -> Launch:
    """The launch of ``mtgr.kernels.store.store_times``, for at least one token."""
    num_tokens = times.shape[0]
    return Launch(
        kernel=store_times_kernel,
        grid=(triton.cdiv(num_tokens, _TIMES_PER_PROGRAM),),
        arguments=(times, cache, slots, num_tokens, times.stride(0), cache.stride(0), cache.stride(1)),
        options={"block_size": cache.shape[1], "block_tokens": _TIMES_PER_PROGRAM, "num_warps": 4},
    )


def clear_padding_launch(rows: Tensor, query_start: Tensor) -> Launch:
    """The launch of ``mtgr.kernels.store.clear_padding``, for at least one row."""
    return Launch(
        kernel=clear_padding_kernel,
        grid=(rows.shape[0],),
        arguments=(rows, query_start, query_start.shape[0] - 1, rows[0].numel()),
        options={"block": _ELEMENTS_AT_ONCE, "num_warps": 4},
    )
