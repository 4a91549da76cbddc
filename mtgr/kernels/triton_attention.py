# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
"""Paged SiLU attention in Triton's language: one program per request's tile of queries, head, and share of the keys.

Without a softmax there is nothing to renormalise: key tiles add up in any order, so the keys of few queries can be
shared out over many programs and summed by a second kernel, always in the same order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtgr.errors import ConfigurationError
from mtgr.kernels.bias import PagedBias
from mtgr.kernels.configs import LaunchConfig
from mtgr.kernels.launch import Launch, is_aligned
from mtgr.kernels.triton_bias import own_bias, relative_bias

_LOG2_E = tl.constexpr(1.4426950408889634)
_INT32_MAX = tl.constexpr(2**31 - 1)

_REDUCE_ELEMENTS = 2048


@triton.jit
def _silu(x):
    """SiLU of fp32 logits with one exponential and one division; x = -inf .. inf without NaN for finite x."""
    return x / (1.0 + tl.exp2(x * -_LOG2_E))


@triton.jit
def _attend_keys(
    attended,
    q,
    cache,
    table,
    visible,
    first,
    end,
    num_keys,
    scale,
    stride_block,
    stride_slot,
    query_positions,
    query_times,
    key_times,
    stride_time_block,
    stride_time_slot,
    position_table,
    time_table,
    bucket_edges,
    limit,
    last_edge,
    masked: tl.constexpr,
    head_size: tl.constexpr,
    padded_size: tl.constexpr,
    block_size: tl.constexpr,
    block_n: tl.constexpr,
    has_bias: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
):
    """Add the keys first..end-1, in tiles from ``first``, to FP32 ``attended`` [block_m, padded_size].

    Unmasked, every query sees every key of every tile. Masked, keys from ``num_keys`` on are not read: they may lie
    in blocks that were never written.
    """
    columns = tl.arange(0, padded_size)
    lanes = tl.arange(0, block_n)
    for start in range(first, end, block_n):
        keys = start + lanes
        # With whole tiles inside one cache block, one scalar takes the place of a block number per key.
        if block_n <= block_size:
            block = tl.load(table + start // block_size).to(tl.int64)
            slots = (start % block_size) + lanes
            rows = cache + (block * stride_block + (start % block_size) * stride_slot)
            rows += (lanes * stride_slot)[:, None] + columns[None, :]
        else:
            if masked:
                block = tl.load(table + keys // block_size, mask=keys < num_keys, other=0).to(tl.int64)
            else:
                block = tl.load(table + keys // block_size).to(tl.int64)
            slots = keys % block_size
            rows = cache + (block * stride_block + slots * stride_slot)[:, None] + columns[None, :]
        if masked:
            read = (keys < num_keys)[:, None] & (columns < head_size)[None, :]
            k = tl.load(rows, mask=read, other=0.0)
            v = tl.load(rows + head_size, mask=read, other=0.0)
        elif head_size == padded_size:
            k = tl.load(rows)
            v = tl.load(rows + head_size)
        else:
            k = tl.load(rows, mask=(columns < head_size)[None, :], other=0.0)
            v = tl.load(rows + head_size, mask=(columns < head_size)[None, :], other=0.0)
        if widen:
            q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
        logits = tl.dot(q, tl.trans(k), input_precision=precision) * scale
        if has_bias:
            times = key_times + block * stride_time_block + slots * stride_time_slot
            times = tl.load(times, mask=keys < num_keys, other=0) if masked else tl.load(times)
            logits += relative_bias(
                query_positions, query_times, keys, times, position_table, time_table, bucket_edges, limit, last_edge,
                True,
            )  # fmt: skip
        weights = _silu(logits)
        if masked:
            weights = tl.where(keys[None, :] < visible[:, None], weights, 0.0)
        weights = weights.to(cache.dtype.element_ty).to(v.dtype)
        attended = tl.dot(weights, v, attended, input_precision=precision)
    return attended


# What changes from step to step must not be compiled in: a value of 1 or a multiple of 16 would be. Strides of what is
# loaded or stored in bulk must: they are multiples of 16 in every step, and accesses are wide only if that is known.
_VARYING = (
    "num_requests",
    "num_splits",
    "stride_table",
    "stride_time_block",
    "stride_time_slot",
    "limit",
    "last_edge",
    "scale",
    "inverse_length",
)
_VARYING_POINTERS = ("block_table", "query_start", "visible", "is_candidate", "query_positions", "query_times")


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_VARYING_POINTERS)
def attention_kernel(
    q,
    k,
    v,
    cache,
    block_table,
    query_start,
    visible,
    is_candidate,
    out,
    query_positions,
    query_times,
    key_times,
    position_table,
    time_table,
    bucket_edges,
    scale,
    inverse_length,
    num_requests,
    limit,
    last_edge,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_cache_block,
    stride_cache_head,
    stride_cache_slot,
    stride_table,
    stride_time_block,
    stride_time_slot,
    stride_out_token,
    stride_out_head,
    stride_split,
    head_size: tl.constexpr,
    padded_size: tl.constexpr,
    block_size: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    has_bias: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
):
    """Attend for one tile of one request's queries, one head, and one share of the keys.

    Request r's tiles begin at program query_start[r] // block_m + r: ascending in r, and never fewer than it needs, so
    that the grid follows from the numbers of tokens and requests alone. Programs left over return at once.
    """
    # Candidates see most and stand last: start with them, so that no long program starts when all others are done.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    low = tl.full((), 0, tl.int32)
    high = num_requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // block_m + middle <= tile:
            low = middle
        else:
            high = middle
    request_start = tl.load(query_start + low)
    request_end = tl.load(query_start + low + 1)
    tile_start = request_start + (tile - (request_start // block_m + low)) * block_m
    if tile_start >= request_end:
        return

    tokens = tile_start + tl.arange(0, block_m)
    valid = tokens < request_end
    tokens = tokens.to(tl.int64)
    columns = tl.arange(0, padded_size)
    inside = valid[:, None] & (columns < head_size)[None, :]
    q_tile = tl.load(
        q + tokens[:, None] * stride_q_token + head * stride_q_head + columns[None, :], mask=inside, other=0.0
    )
    seen = tl.load(visible + tokens, mask=valid, other=0)
    num_keys = tl.max(seen)
    seen_by_all = tl.min(tl.where(valid, seen, _INT32_MAX))
    positions = seen
    times = seen
    if has_bias:
        positions = tl.load(query_positions + tokens, mask=valid, other=0)
        times = tl.load(query_times + tokens, mask=valid, other=0)

    attended = tl.zeros([block_m, padded_size], dtype=tl.float32)
    candidate = tl.load(is_candidate + tokens, mask=valid, other=0).to(tl.int32) != 0
    if tl.program_id(2) == 0 and tl.max(candidate.to(tl.int32)) > 0:
        read = inside & candidate[:, None]
        k_self = tl.load(
            k + tokens[:, None] * stride_k_token + head * stride_k_head + columns[None, :], mask=read, other=0.0
        )
        v_self = tl.load(
            v + tokens[:, None] * stride_v_token + head * stride_v_head + columns[None, :], mask=read, other=0.0
        )
        logits = tl.sum(q_tile.to(tl.float32) * k_self.to(tl.float32), axis=1) * scale
        if has_bias:
            logits += own_bias(position_table, time_table, limit)
        attended = _silu(logits)[:, None] * v_self.to(tl.float32)

    # Whole tiles go to the splits in runs; those that all queries see come first and need no mask.
    tiles_per_split = tl.cdiv(tl.cdiv(num_keys, block_n), tl.num_programs(2))
    first = tl.program_id(2) * tiles_per_split * block_n
    end = tl.minimum(first + tiles_per_split * block_n, num_keys)
    middle_key = tl.maximum(tl.minimum(end, seen_by_all // block_n * block_n), first)
    head_cache = cache + head * stride_cache_head
    table = block_table + low.to(tl.int64) * stride_table
    attended = _attend_keys(
        attended,
        q_tile,
        head_cache,
        table,
        seen,
        first,
        middle_key,
        num_keys,
        scale,
        stride_cache_block,
        stride_cache_slot,
        positions,
        times,
        key_times,
        stride_time_block,
        stride_time_slot,
        position_table,
        time_table,
        bucket_edges,
        limit,
        last_edge,
        False,
        head_size,
        padded_size,
        block_size,
        block_n,
        has_bias,
        precision,
        widen,
    )
    attended = _attend_keys(
        attended,
        q_tile,
        head_cache,
        table,
        seen,
        middle_key,
        end,
        num_keys,
        scale,
        stride_cache_block,
        stride_cache_slot,
        positions,
        times,
        key_times,
        stride_time_block,
        stride_time_slot,
        position_table,
        time_table,
        bucket_edges,
        limit,
        last_edge,
        True,
        head_size,
        padded_size,
        block_size,
        block_n,
        has_bias,
        precision,
        widen,
    )
    out += tl.program_id(2) * stride_split
    tl.store(
        out + tokens[:, None] * stride_out_token + head * stride_out_head + columns[None, :],
        (attended * inverse_length).to(out.dtype.element_ty),
        mask=inside,
    )


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_VARYING_POINTERS)
def sum_splits_kernel(
    partial,
    query_start,
    out,
    inverse_length,
    num_requests,
    num_splits,
    stride_partial_token,
    stride_partial_head,
    stride_split,
    stride_out_token,
    stride_out_head,
    head_size: tl.constexpr,
    padded_size: tl.constexpr,
    block_m: tl.constexpr,
):
    """Sum what the splits wrote, for ``block_m`` tokens of one head, and divide by N."""
    tokens = tl.program_id(0) * block_m + tl.arange(0, block_m)
    valid = tokens < tl.load(query_start + num_requests)
    tokens = tokens.to(tl.int64)
    columns = tl.arange(0, padded_size)
    inside = valid[:, None] & (columns < head_size)[None, :]
    head = tl.program_id(1)
    partial += tokens[:, None] * stride_partial_token + head * stride_partial_head + columns[None, :]
    total = tl.zeros([block_m, padded_size], dtype=tl.float32)
    for split in range(num_splits):
        total += tl.load(partial + split * stride_split, mask=inside, other=0.0)
    tl.store(
        out + tokens[:, None] * stride_out_token + head * stride_out_head + columns[None, :],
        (total * inverse_length).to(out.dtype.element_ty),
        mask=inside,
    )


def attention_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    visible: Tensor,
    is_candidate: Tensor,
    out: Tensor,
    *,
    scale: float,
    norm_length: int,
    bias: PagedBias | None,
    config: LaunchConfig,
    precision: str | None = None,
    items: Tensor | None = None,
) -> list[Launch]:
    """The launches, one or two, that make ``mtgr.kernels.paged_attention``; arguments and errors are as there.

    ``config`` says how the work is cut up, ``precision`` how FP32 products are computed: exactly by default (``ieee``),
    with ``tf32x3`` on tensor cores with an error of a few units in the last place. A ``listed`` configuration needs
    ``items``, of ``mtgr.kernels.paged_items`` for its ``block_m``.
    """
    num_tokens, num_heads, head_size = q.shape
    block_size = cache.shape[2]
    if any(tensor.stride(-1) != 1 for tensor in (q, k, v, cache, out, block_table)):
        raise ConfigurationError("paged attention: the last dimension of every tensor must be contiguous.")
    if not (query_start.is_contiguous() and visible.is_contiguous() and is_candidate.is_contiguous()):
        raise ConfigurationError("paged attention: query_start, visible and is_candidate must be contiguous.")
    if block_size & (block_size - 1) or cache.shape[1:] != (num_heads, block_size, 2 * head_size):
        raise ConfigurationError(
            f"paged attention: the cache is {tuple(cache.shape)}; it must be [blocks, {num_heads}, a power of two, "
            f"{2 * head_size}]."
        )
    slot = cache.stride(2)
    if not is_aligned(q, k, v, cache) or cache.stride(0) % slot or cache.stride(1) % slot:
        config = replace(config, variant="pointers")
    num_requests = query_start.shape[0] - 1
    splits = config.splits
    padded_size = triton.next_power_of_2(head_size)
    target, stride_split, factor = out, 0, 1.0 / norm_length
    if splits > 1:
        target = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
        stride_split, factor = target.stride(0), 1.0
    if config.variant == "specialised":
        if config.listed and items is None:
            raise ConfigurationError("paged attention: a listed configuration needs the list of the step's tiles.")
        from mtgr.kernels.gluon_paged import specialised_paged_launch

        attend = specialised_paged_launch(
            q,
            k,
            v,
            cache,
            block_table,
            query_start,
            visible,
            is_candidate,
            target,
            scale=scale,
            out_factor=factor,
            stride_split=stride_split,
            config=config,
            items=items if config.listed else None,
        )
        return [attend] if splits == 1 else [attend, _sum_launch(target, query_start, out, norm_length)]
    tables: tuple[Any, ...] = (None,) * 6
    sizes = (0, 0)
    time_strides = (0, 1)
    if bias is not None:
        tables = (
            bias.query_positions,
            bias.query_times,
            bias.key_times,
            bias.position_table,
            bias.time_table,
            bias.bucket_edges,
        )
        sizes = (bias.max_positions - 1, bias.bucket_edges.shape[0] - 1)
        time_strides = (bias.key_times.stride(0), bias.key_times.stride(1))
    attend = Launch(
        kernel=attention_kernel,
        grid=(num_tokens // config.block_m + num_requests, num_heads, splits),
        arguments=(
            q,
            k,
            v,
            cache,
            block_table,
            query_start,
            visible,
            is_candidate,
            target,
            *tables,
            scale,
            factor,
            num_requests,
            *sizes,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            cache.stride(0),
            cache.stride(1),
            cache.stride(2),
            block_table.stride(0),
            *time_strides,
            target.stride(-3),
            target.stride(-2),
            stride_split,
        ),
        options={
            "head_size": head_size,
            "padded_size": padded_size,
            "block_size": block_size,
            "block_m": config.block_m,
            "block_n": config.block_n,
            "has_bias": bias is not None,
            "precision": precision or "ieee",
            # The interpreter would multiply the bits of BF16; FP32 gives the same products.
            "widen": triton.knobs.runtime.interpret and q.dtype == torch.bfloat16,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
    if splits == 1:
        return [attend]
    return [attend, _sum_launch(target, query_start, out, norm_length)]


def _sum_launch(partial: Tensor, query_start: Tensor, out: Tensor, norm_length: int) -> Launch:
    """The launch that makes the output of FP32 sums by split, [splits, T, H, D]."""
    splits, num_tokens, num_heads, head_size = partial.shape
    padded_size = triton.next_power_of_2(head_size)
    rows = max(1, _REDUCE_ELEMENTS // padded_size)
    return Launch(
        kernel=sum_splits_kernel,
        grid=(triton.cdiv(num_tokens, rows), num_heads),
        arguments=(
            partial,
            query_start,
            out,
            1.0 / norm_length,
            query_start.shape[0] - 1,
            splits,
            partial.stride(1),
            partial.stride(2),
            partial.stride(0),
            out.stride(0),
            out.stride(1),
        ),
        options={"head_size": head_size, "padded_size": padded_size, "block_m": rows, "num_warps": 4},
    )
