# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
# mypy: disable-error-code="attr-defined"
# ruff: noqa: PIE808, RUF005, RUF059  (the language has no one-argument range and no starred lists)
"""Dense SiLU attention for Hopper in Gluon: as many programs as processors, with warps of their own for the loads."""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mtgr.errors import ConfigurationError
from mtgr.kernels.dense_configs import DenseConfig
from mtgr.kernels.dense_fp8 import SCALE_ROWS, WEIGHT_SCALE, QuantisedHeads
from mtgr.kernels.dense_segments import Segments
from mtgr.kernels.gluon_core import (
    attend_item,
    load_queries,
    load_tile,
    new_barriers,
    next_stage,
    place_of,
    programs_for,
    query_stages,
    shared_layout,
    table_of,
)
from mtgr.kernels.launch import Launch

_SCALE_ROWS = gl.constexpr(SCALE_ROWS)
_WEIGHT_SCALE = gl.constexpr(WEIGHT_SCALE)

# Bytes of keys and values of the heads in work at a time: read again and again, they should stay in the L2 cache.
_RESIDENT = 24 << 20


@gluon.jit
def _item(turn, num_items, tiles, num_heads, num_sequences, group, sequences, max_context, padded_context,
          padded_candidates, block_m: gl.constexpr, block_n: gl.constexpr):  # fmt: skip
    """What a program does in its ``turn``: tiles that see most first, forth and back so that all get like amounts.

    Returns:
        head, whether the tile is of candidates, its first token, its row in q, k and v and in the output, the row of
        the context, tokens of its part, rows to write, static tokens, context tokens, tiles of keys, tiles of own keys.
    """
    item = place_of(turn)
    valid = item < num_items
    item = gl.where(valid, item, 0)
    pairs = num_heads * num_sequences
    first_pair = item // (tiles * group) * group
    rest = item % (tiles * group)
    members = gl.minimum(group, pairs - first_pair)
    tile = tiles - 1 - rest // members
    pair = first_pair + rest % members
    head = pair % num_heads
    fields = sequences + pair // num_heads * 7
    context = gl.load(fields + 1)
    static = gl.minimum(gl.load(fields), context)
    context_row = gl.load(fields + 3)
    context_tiles = (max_context + block_m - 1) // block_m
    is_candidate = tile >= context_tiles
    first = gl.where(is_candidate, tile - context_tiles, tile) * block_m
    part = is_candidate.to(gl.int32)
    length = gl.load(fields + 1 + part)
    row = gl.load(fields + 3 + part) + first
    out_row = gl.load(fields + 5 + part) + first
    written = gl.maximum(length, gl.where(is_candidate, padded_candidates, padded_context))
    written = gl.where(valid, written, 0)
    last = gl.minimum(first + block_m, length)
    num_keys = gl.where(is_candidate, context, gl.maximum(last, static))
    some = valid & (first < length)
    key_tiles = gl.where(some, (num_keys + block_n - 1) // block_n, 0)
    own_tiles = gl.where(some & is_candidate, (last - first + block_n - 1) // block_n, 0)
    return (head, is_candidate, first, row, out_row, context_row, length, written, static, context, key_tiles,
            own_tiles)  # fmt: skip


@gluon.jit
def _scales(scales, stride_scale_kind, first, row, context_row, length, context, total, own_tiles,
            part: gl.constexpr, block_m: gl.constexpr, scale_blocks: gl.constexpr):  # fmt: skip
    """Of an item the scale of a warpgroup's queries, and the largest of its values' scales."""
    of_values = scales + 2 * stride_scale_kind
    spread: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    blocks = gl.arange(0, scale_blocks, gl.SliceLayout(0, spread))
    several = gl.load(
        of_values + context_row // _SCALE_ROWS + blocks,
        mask=blocks < (context + _SCALE_ROWS - 1) // _SCALE_ROWS,
        other=0.0,
    )
    present = (total > 0) & (first + part * 64 < length)
    of_queries = gl.load(scales + (row + part * 64) // _SCALE_ROWS, mask=present, other=0.0)
    of_own = gl.load(of_values + row // _SCALE_ROWS, mask=own_tiles > 0, other=0.0)
    if block_m > _SCALE_ROWS:
        last_row = row + gl.minimum(block_m, length - first) - 1
        of_last = gl.load(of_values + last_row // _SCALE_ROWS, mask=own_tiles > 0, other=0.0)
        of_own = gl.maximum(of_own, of_last)
    return of_queries, gl.maximum(gl.max(several, axis=0), of_own)


@gluon.jit
def _load_tiles(head_size: gl.constexpr, block_m: gl.constexpr, block_n: gl.constexpr, stages: gl.constexpr,
                q_stages: gl.constexpr, groups: gl.constexpr, is_fp8: gl.constexpr, q, k, v, barriers, q_buffers,
                k_buffers, v_buffers, turns, num_items, tiles, num_heads, num_sequences, group, sequences, max_context,
                padded_context, padded_candidates, head_columns_q, head_columns_k, head_columns_v):  # fmt: skip
    """The loading warp."""
    _, q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    stage = 0
    phase = 0
    q_stage = 0
    q_phase = 0
    for turn in range(0, turns):
        (head, is_candidate, first, row, out_row, context_row, length, written, static, context, key_tiles,
         own_tiles) = _item(turn, num_items, tiles, num_heads, num_sequences, group, sequences, max_context,
                            padded_context, padded_candidates, block_m, block_n)  # fmt: skip
        total = key_tiles + own_tiles
        if total > 0:
            load_queries(q, row, head, head_columns_q, q_full, q_empty, q_buffers, q_stage, q_phase, groups)
            q_stage, q_phase = next_stage(q_stage, q_phase, q_stages)
        for index in range(0, total):
            key_row = gl.where(index < key_tiles, context_row + index * block_n, row + (index - key_tiles) * block_n)
            load_tile(k, key_row, head * head_columns_k, k_full, k_empty, k_buffers, stage, phase)
            if is_fp8:
                load_tile(v, head * head_size, key_row, v_full, v_empty, v_buffers, stage, phase)
            else:
                load_tile(v, key_row, head * head_columns_v, v_full, v_empty, v_buffers, stage, phase)
            stage, phase = next_stage(stage, phase, stages)


@gluon.jit
def _attend_tiles(part: gl.constexpr, head_size: gl.constexpr, block_m: gl.constexpr, block_n: gl.constexpr,
                  stages: gl.constexpr, q_stages: gl.constexpr, scale_blocks: gl.constexpr, is_fp8: gl.constexpr,
                  packed: gl.constexpr, overlaps: gl.constexpr, in_turn: gl.constexpr, out, scales, barriers,
                  q_buffers, k_buffers, v_buffers, turns, num_items, tiles, num_heads, num_sequences, group,
                  sequences, max_context, padded_context, padded_candidates, factor, out_factor, stride_out_row,
                  stride_out_head, stride_scale_kind, stride_scale_head):  # fmt: skip
    """A warpgroup: 64 queries of every tile."""
    summed: gl.constexpr = 256 // k_buffers.dtype.primitive_bitwidth
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_size, summed])
    rows_layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, summed]))
    order_phase = 0
    k_stage = 0
    k_phase = 0
    v_stage = 0
    v_phase = 0
    q_stage = 0
    q_phase = 0
    for turn in range(0, turns):
        (head, is_candidate, first, row, out_row, context_row, length, written, static, context, key_tiles,
         own_tiles) = _item(turn, num_items, tiles, num_heads, num_sequences, group, sequences, max_context,
                            padded_context, padded_candidates, block_m, block_n)  # fmt: skip
        total = key_tiles + own_tiles
        lanes = part * 64 + gl.arange(0, 64, rows_layout)
        seen = gl.where(is_candidate, context, gl.maximum(first + lanes + 1, static))
        seen_by_all = gl.where(is_candidate, context, gl.maximum(first + part * 64 + 1, static))
        whole_tiles = gl.minimum(seen_by_all // block_n, key_tiles)
        attended = gl.zeros([64, head_size], gl.float32, out_layout)
        tile_factor = factor
        tile_out_factor = out_factor
        value_factor = 1.0
        own_scales = scales
        if is_fp8:
            # Relative to the sequence's largest, value scales lie in (0, 1] and go into the weights.
            own_scales = scales + head * stride_scale_head
            of_queries, largest = _scales(own_scales, stride_scale_kind, first, row, context_row, length, context,
                                          total, own_tiles, part, block_m, scale_blocks)  # fmt: skip
            largest = gl.maximum(largest, 1e-30)
            tile_factor = factor * of_queries
            value_factor = _WEIGHT_SCALE / largest
            tile_out_factor = out_factor * largest / _WEIGHT_SCALE
        if total > 0:
            attended, order_phase, q_stage, q_phase, k_stage, k_phase, v_stage, v_phase = attend_item(
                q_buffers, k_buffers, v_buffers, barriers, part, block_m // 64, in_turn,
                order_phase, q_stage, q_phase, k_stage, k_phase, v_stage, v_phase,
                total, key_tiles, whole_tiles, 0, context, lanes, lanes + 1, seen,
                tile_factor, value_factor, own_scales, context_row, row, stride_scale_kind,
                head_size, block_n, stages, q_stages, is_fp8, packed, overlaps, False,
            )  # fmt: skip
        out_rows = part * 64 + gl.arange(0, 64, gl.SliceLayout(1, out_layout))
        columns = gl.arange(0, head_size, gl.SliceLayout(0, out_layout))
        tokens = gl.expand_dims(first + out_rows, 1)
        result = gl.where(tokens < length, attended * tile_out_factor, 0.0)
        target = out + head * stride_out_head + gl.expand_dims((out_row + out_rows).to(gl.int64) * stride_out_row, 1)
        gl.store(
            target + gl.expand_dims(columns, 0), result.to(out.dtype.element_ty),
            mask=(tokens < written) & (gl.expand_dims(columns, 0) >= 0),
        )  # fmt: skip


_VARYING = (
    "turns",
    "num_items",
    "tiles",
    "num_sequences",
    "group",
    "max_context",
    "padded_context",
    "padded_candidates",
    "factor",
    "out_factor",
    "stride_scale_kind",
    "stride_scale_head",
)


@gluon.jit(do_not_specialize=_VARYING)
def specialised_attention_kernel(q, k, v, out, sequences, scales, turns, num_items, tiles, num_heads, num_sequences,
                                 group, max_context, padded_context, padded_candidates, factor, out_factor,
                                 head_columns_q, head_columns_k, head_columns_v, stride_out_row, stride_out_head,
                                 stride_scale_kind, stride_scale_head,
                                 head_size: gl.constexpr, block_m: gl.constexpr, block_n: gl.constexpr,
                                 stages: gl.constexpr, q_stages: gl.constexpr, scale_blocks: gl.constexpr,
                                 is_fp8: gl.constexpr, packed: gl.constexpr, overlaps: gl.constexpr,
                                 in_turn: gl.constexpr, num_warps: gl.constexpr):  # fmt: skip
    """Set up the buffers and their barriers and let the warps go their ways."""
    groups: gl.constexpr = block_m // 64
    dtype: gl.constexpr = q.dtype
    q_buffers = gl.allocate_shared_memory(dtype, [q_stages * groups, 64, head_size], q.layout)
    k_buffers = gl.allocate_shared_memory(dtype, [stages] + k.block_type.shape, k.layout)
    v_buffers = gl.allocate_shared_memory(dtype, [stages] + v.block_type.shape, v.layout)
    barriers = new_barriers(stages, q_stages, groups)
    # fmt: off
    attend = (out, scales, barriers, q_buffers, k_buffers, v_buffers, turns, num_items, tiles, num_heads, num_sequences,
              group, sequences, max_context, padded_context, padded_candidates, factor, out_factor, stride_out_row,
              stride_out_head, stride_scale_kind, stride_scale_head)
    load = (q, k, v, barriers, q_buffers, k_buffers, v_buffers, turns, num_items, tiles, num_heads, num_sequences,
            group, sequences, max_context, padded_context, padded_candidates, head_columns_q, head_columns_k,
            head_columns_v)
    # A number in a tuple that has a name, or that stands to the right of a +, would not be compiled in any more.
    if groups == 2:
        gl.warp_specialize(
            [
                (_attend_tiles, (0, head_size, block_m, block_n, stages, q_stages, scale_blocks, is_fp8, packed,
                                 overlaps, in_turn) + attend),
                (_attend_tiles, (1, head_size, block_m, block_n, stages, q_stages, scale_blocks, is_fp8, packed,
                                 overlaps, in_turn) + attend),
                (_load_tiles, (head_size, block_m, block_n, stages, q_stages, groups, is_fp8) + load),
            ],
            [4, 1], [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_attend_tiles, (0, head_size, block_m, block_n, stages, q_stages, scale_blocks, is_fp8, packed,
                                 overlaps, in_turn) + attend),
                (_attend_tiles, (1, head_size, block_m, block_n, stages, q_stages, scale_blocks, is_fp8, packed,
                                 overlaps, in_turn) + attend),
                (_attend_tiles, (2, head_size, block_m, block_n, stages, q_stages, scale_blocks, is_fp8, packed,
                                 overlaps, in_turn) + attend),
                (_load_tiles, (head_size, block_m, block_n, stages, q_stages, groups, is_fp8) + load),
            ],
            [4, 4, 1], [160, 160, 24],
        )
    # fmt: on


def specialised_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    segments: Segments,
    *,
    scale: float,
    norm_length: int,
    config: DenseConfig,
    quantised: QuantisedHeads | None = None,
) -> Launch:
    """The launch that makes ``mtgr.kernels.dense_attention``, in a ``specialised`` configuration.

    Arguments are as in ``mtgr.kernels.triton_dense.dense_launch``.

    Raises:
        ConfigurationError: If the head size is not 32, 64, 128 or 256, or the precision not FP16, BF16 or FP8.
    """
    num_heads, head_size = out.shape[1:]
    if head_size not in (32, 64, 128, 256) or q.dtype.itemsize > 2:
        raise ConfigurationError(
            f"specialised attention: {q.dtype} with heads of {head_size} is not built; choose another variant."
        )
    is_fp8 = quantised is not None
    batch = segments.sequences.shape[0]
    tiles = triton.cdiv(segments.max_context, config.block_m) + triton.cdiv(segments.max_candidates, config.block_m)
    items = tiles * num_heads * batch
    programs = programs_for(items, q.device)
    head_bytes = 2 * (segments.max_context + segments.max_candidates) * head_size * q.dtype.itemsize
    if is_fp8:
        layout = shared_layout([head_size, config.block_n], q.dtype)
        values = TensorDescriptor(v, list(v.shape), list(v.stride()), [head_size, config.block_n], layout)
    else:
        values = table_of(v, config.block_n)
    return Launch(
        kernel=specialised_attention_kernel,
        grid=(programs,),
        arguments=(
            table_of(q, 64),
            table_of(k, config.block_n),
            values,
            out,
            segments.sequences,
            quantised.scales if quantised else out,
            triton.cdiv(items, programs),
            items,
            tiles,
            num_heads,
            batch,
            _group(num_heads * batch, _RESIDENT // max(1, head_bytes)),
            segments.max_context,
            segments.padded_context,
            segments.padded_candidates,
            scale / 2,
            1.0 / norm_length,
            q.stride(1),
            k.stride(1),
            0 if is_fp8 else v.stride(1),
            out.stride(0),
            out.stride(1),
            quantised.scales.stride(0) if quantised else 0,
            quantised.scales.stride(1) if quantised else 0,
        ),
        options={
            "head_size": head_size,
            "block_m": config.block_m,
            "block_n": config.block_n,
            "stages": config.num_stages,
            "q_stages": query_stages(config, head_size, q.dtype.itemsize),
            # One kernel for all contexts but very long ones.
            "scale_blocks": triton.next_power_of_2(max(64, triton.cdiv(segments.max_context, SCALE_ROWS))),
            "is_fp8": is_fp8,
            "packed": is_fp8 and config.packed,
            "overlaps": config.overlaps,
            "in_turn": config.in_turn,
            "num_warps": config.num_warps,
        },
    )


def _group(pairs: int, limit: int) -> int:
    """Heads in work at a time: the largest number up to ``limit`` that divides all, so that no small group is last."""
    return next(group for group in range(max(1, min(pairs, limit)), 0, -1) if pairs % group == 0)
