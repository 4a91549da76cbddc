# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
# mypy: disable-error-code="attr-defined, assignment"
# ruff: noqa: PIE808, RUF005, RUF059  (the language has no range of one argument and no starred tuples)
"""Paged SiLU attention for Hopper in Gluon: as ``gluon_dense``, with tiles put together from pages."""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mtgr.kernels.configs import LaunchConfig
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
from mtgr.kernels.paged_items import FIELDS

# Columns that one copy takes: those of the widest swizzle, 128 bytes of half precision.
_PANEL = gl.constexpr(64)

_MANY = gl.constexpr(2**31 - 1)

_FIELDS = gl.constexpr(FIELDS)


@gluon.jit
def _item(turn, num_items, num_heads, num_tiles, splits, num_requests, query_start, visible, is_candidate,
          block_m: gl.constexpr, block_n: gl.constexpr, padded_m: gl.constexpr, warps: gl.constexpr):  # fmt: skip
    """What a program does in its ``turn``: late tiles of late requests first.

    Request r's tiles begin at tile query_start[r] // block_m + r: ascending in r, and never fewer than it needs, so
    that their number follows from those of tokens and requests alone.

    Returns:
        head, split, request, first token, end of the request's tokens, keys that any query sees, first tile of keys,
        tiles of keys, tiles of own keys.
    """
    item = place_of(turn)
    valid = item < num_items
    item = gl.where(valid, item, 0)
    split = item % splits
    head = item // splits % num_heads
    tile = num_tiles - 1 - item // (splits * num_heads)
    # Every warp reads all of it: what it finds needs no other.
    spread: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 1], [1, 32], [warps, 1], [1, 0]))
    several = gl.arange(0, 128, spread)
    request = -1
    for first in range(0, num_requests, 128):
        requests = first + several
        starts = gl.load(query_start + requests, mask=requests < num_requests, other=_MANY)
        before = (requests < num_requests) & (starts // block_m + requests <= tile)
        request += gl.sum(before.to(gl.int32), axis=0)
    start = gl.load(query_start + request)
    end = gl.load(query_start + request + 1)
    first_token = start + (tile - (start // block_m + request)) * block_m
    end = gl.where(valid, end, 0)
    lanes = gl.arange(0, padded_m, spread)
    present = (lanes < block_m) & (first_token + lanes < end)
    num_keys = gl.max(gl.load(visible + first_token + lanes, mask=present, other=0), axis=0)
    own = gl.load(is_candidate + first_token + lanes, mask=present, other=0).to(gl.int32)
    has_own = gl.max(own, axis=0) > 0
    first_tile, key_tiles, own_tiles = _tiles(
        split, splits, num_keys, gl.minimum(end - first_token, block_m), has_own, block_n
    )
    return head, split, request, first_token, end, num_keys, first_tile, key_tiles, own_tiles


@gluon.jit
def _tiles(split, splits, num_keys, own_rows, has_own, block_n: gl.constexpr):
    """First tile of a split's keys, tiles of keys, tiles of own keys: those of the first split only."""
    key_tiles = (num_keys + block_n - 1) // block_n
    per_split = (key_tiles + splits - 1) // splits
    first_tile = gl.minimum(split * per_split, key_tiles)
    key_tiles = gl.minimum(per_split, key_tiles - first_tile)
    own_tiles = gl.where(has_own & (split == 0), (own_rows + block_n - 1) // block_n, 0)
    return first_tile, key_tiles, own_tiles


@gluon.jit
def _entry(turn, num_items, num_heads, splits, items, head_size: gl.constexpr, part: gl.constexpr):
    """What the list says of this program's item of a turn, of which nothing is there yet when this is done.

    Returns:
        head, split, request, first token, end of the request's tokens, keys that any query sees, whether a query sees
        itself, keys that all queries of a part see; all but the first two 0 where there is no item.
    """
    item = place_of(turn)
    valid = item < num_items
    item = gl.where(valid, item, 0)
    if head_size > 128:
        # All tiles of a head first: keys and values of all heads may be more than the L2 cache holds.
        tiles = gl.maximum(num_items // (splits * num_heads), 1)
        head = item // (splits * tiles)
        tile = item // splits % tiles
    else:
        head = item // splits % num_heads
        tile = item // (splits * num_heads)
    fields = items + (1 + tile) * _FIELDS
    return (
        head,
        item % splits,
        gl.load(fields + 0, mask=valid, other=0),
        gl.load(fields + 1, mask=valid, other=0),
        gl.load(fields + 2, mask=valid, other=0),
        gl.load(fields + 3, mask=valid, other=0),
        gl.load(fields + 4, mask=valid, other=0),
        gl.load(fields + 5 + part, mask=valid, other=0),
    )


@gluon.jit
def _rows(token, end, part: gl.constexpr, visible, is_candidate, layout: gl.constexpr):
    """For a warpgroup's queries the keys that each sees, and whether it sees itself."""
    tokens = token + part * 64 + gl.arange(0, 64, layout)
    present = tokens < end
    return gl.load(visible + tokens, mask=present, other=0), gl.load(is_candidate + tokens, mask=present, other=0)


@gluon.jit
def _blocks(table, index, first_tile, key_tiles, last_page, block_size: gl.constexpr, block_n: gl.constexpr,
            pages: gl.constexpr):  # fmt: skip
    """The cache blocks of a tile, which are not there yet when this is done; behind the last tile 0."""
    found = ()
    for page in gl.static_range(pages):
        key = (first_tile + index) * block_n + page * (block_n // pages)
        block = gl.load(table + gl.minimum(key // block_size, last_page), mask=index < key_tiles, other=0)
        found = found + (block,)
    return found


@gluon.jit
def _load_tiles(head_size: gl.constexpr, block_m: gl.constexpr, block_n: gl.constexpr, padded_m: gl.constexpr,
                stages: gl.constexpr, q_stages: gl.constexpr, listed: gl.constexpr, block_size: gl.constexpr, q, k, v,
                cache, block_table, k_pages, v_pages, barriers, q_buffers, k_buffers, v_buffers, items, turns,
                num_items, num_heads, num_tiles, splits, num_requests, query_start, visible, is_candidate,
                stride_table, rows_block, rows_head, head_columns_q, head_columns_k, head_columns_v):  # fmt: skip
    """The loading warp."""
    _, q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    groups: gl.constexpr = block_m // 64
    panels: gl.constexpr = head_size // _PANEL
    rows: gl.constexpr = cache.block_type.shape[0]
    pages: gl.constexpr = block_n // rows
    stage = 0
    phase = 0
    q_stage = 0
    q_phase = 0
    if listed:
        num_items = gl.load(items) * num_heads * splits
        turns = (num_items + gl.num_programs(0) - 1) // gl.num_programs(0)
        entry = _entry(0, num_items, num_heads, splits, items, head_size, 0)
    for turn in range(0, turns):
        if listed:
            head, split, request, token, end, num_keys, has_own, seen_by_all = entry
            entry = _entry(turn + 1, num_items, num_heads, splits, items, head_size, 0)
            first_tile, key_tiles, own_tiles = _tiles(
                split, splits, num_keys, gl.minimum(end - token, block_m), has_own != 0, block_n
            )
        else:
            head, split, request, token, end, num_keys, first_tile, key_tiles, own_tiles = _item(
                turn, num_items, num_heads, num_tiles, splits, num_requests, query_start, visible, is_candidate,
                block_m, block_n, padded_m, 1,
            )  # fmt: skip
        total = key_tiles + own_tiles
        table = block_table + request.to(gl.int64) * stride_table
        last_page = (num_keys - 1) // block_size
        if total > 0:
            load_queries(q, token, head, head_columns_q, q_full, q_empty, q_buffers, q_stage, q_phase, groups)
            q_stage, q_phase = next_stage(q_stage, q_phase, q_stages)
        following = _blocks(table, 0, first_tile, key_tiles, last_page, block_size, block_n, pages)
        for index in range(0, key_tiles):
            blocks = following
            if listed:
                # Those of the next tile come while this one waits for its buffers.
                following = _blocks(table, index + 1, first_tile, key_tiles, last_page, block_size, block_n, pages)
            else:
                blocks = _blocks(table, index, first_tile, key_tiles, last_page, block_size, block_n, pages)
            found = ()
            for page in gl.static_range(pages):
                key = (first_tile + index) * block_n + page * rows
                found = found + (blocks[page] * rows_block + head * rows_head + key % block_size,)
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
            for page in gl.static_range(pages):
                for panel in gl.static_range(panels):
                    tma.async_copy_global_to_shared(
                        cache, [found[page], panel * _PANEL], k_full.index(stage),
                        k_pages.index((stage * panels + panel) * pages + page),
                    )  # fmt: skip
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
            for page in gl.static_range(pages):
                for panel in gl.static_range(panels):
                    tma.async_copy_global_to_shared(
                        cache, [found[page], head_size + panel * _PANEL], v_full.index(stage),
                        v_pages.index((stage * panels + panel) * pages + page),
                    )  # fmt: skip
            stage, phase = next_stage(stage, phase, stages)
        for index in range(0, own_tiles):
            row = token + index * block_n
            load_tile(k, row, head * head_columns_k, k_full, k_empty, k_buffers, stage, phase)
            load_tile(v, row, head * head_columns_v, v_full, v_empty, v_buffers, stage, phase)
            stage, phase = next_stage(stage, phase, stages)


@gluon.jit
def _attend_tiles(part: gl.constexpr, head_size: gl.constexpr, block_m: gl.constexpr, block_n: gl.constexpr,
                  padded_m: gl.constexpr, stages: gl.constexpr, q_stages: gl.constexpr, listed: gl.constexpr,
                  overlaps: gl.constexpr, in_turn: gl.constexpr, out, barriers, q_buffers, k_buffers, v_buffers, items,
                  turns, num_items, num_heads, num_tiles, splits, num_requests, query_start, visible, is_candidate,
                  factor, out_factor, stride_out_row, stride_out_head, stride_split):  # fmt: skip
    """A warpgroup: 64 queries of every tile."""
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_size, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, 16]))
    order_phase = 0
    k_stage = 0
    k_phase = 0
    v_stage = 0
    v_phase = 0
    q_stage = 0
    q_phase = 0
    if listed:
        num_items = gl.load(items) * num_heads * splits
        turns = (num_items + gl.num_programs(0) - 1) // gl.num_programs(0)
        entry = _entry(0, num_items, num_heads, splits, items, head_size, part)
        seen, own = _rows(entry[3], entry[4], part, visible, is_candidate, rows_layout)
    for turn in range(0, turns):
        if listed:
            head, split, request, token, end, num_keys, has_own, seen_by_all = entry
            entry = _entry(turn + 1, num_items, num_heads, splits, items, head_size, part)
            first_tile, key_tiles, own_tiles = _tiles(
                split, splits, num_keys, gl.minimum(end - token, block_m), has_own != 0, block_n
            )
        else:
            head, split, request, token, end, num_keys, first_tile, key_tiles, own_tiles = _item(
                turn, num_items, num_heads, num_tiles, splits, num_requests, query_start, visible, is_candidate,
                block_m, block_n, padded_m, 4,
            )  # fmt: skip
        total = key_tiles + own_tiles
        lanes = part * 64 + gl.arange(0, 64, rows_layout)
        if not listed:
            seen, own = _rows(token, end, part, visible, is_candidate, rows_layout)
            seen_by_all = gl.min(gl.where(token + lanes < end, seen, _MANY), axis=0)
        own_end = lanes + (own.to(gl.int32) != 0).to(gl.int32)
        first_key = first_tile * block_n
        whole_tiles = gl.maximum(gl.minimum(seen_by_all // block_n - first_tile, key_tiles), 0)
        attended = gl.zeros([64, head_size], gl.float32, out_layout)
        if total > 0:
            attended, order_phase, q_stage, q_phase, k_stage, k_phase, v_stage, v_phase = attend_item(
                q_buffers, k_buffers, v_buffers, barriers, part, block_m // 64, in_turn,
                order_phase, q_stage, q_phase, k_stage, k_phase, v_stage, v_phase,
                total, key_tiles, whole_tiles, first_key, num_keys, lanes, own_end, seen,
                factor, 1.0, out, 0, 0, 0,
                head_size, block_n, stages, q_stages, False, False, overlaps, True,
            )  # fmt: skip
        if listed:
            # The next item's come while this one's answers are stored.
            seen, own = _rows(entry[3], entry[4], part, visible, is_candidate, rows_layout)
        tokens = token + part * 64 + gl.arange(0, 64, gl.SliceLayout(1, out_layout))
        columns = gl.expand_dims(gl.arange(0, head_size, gl.SliceLayout(0, out_layout)), 0)
        target = out + split * stride_split + head * stride_out_head
        target = target + gl.expand_dims(tokens.to(gl.int64) * stride_out_row, 1)
        inside = (gl.expand_dims(tokens, 1) < end) & (columns >= 0)
        gl.store(target + columns, (attended * out_factor).to(out.dtype.element_ty), mask=inside)


_VARYING = (
    "turns",
    "num_items",
    "num_tiles",
    "splits",
    "num_requests",
    "stride_table",
    "rows_block",
    "rows_head",
    "factor",
    "out_factor",
    "stride_split",
)
_VARYING_POINTERS = ("block_table", "query_start", "visible", "is_candidate", "items")


@gluon.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_VARYING_POINTERS)
def specialised_paged_kernel(q, k, v, cache, block_table, query_start, visible, is_candidate, items, out, turns,
                             num_items, num_heads, num_tiles, splits, num_requests, stride_table, rows_block,
                             rows_head, factor, out_factor, head_columns_q, head_columns_k, head_columns_v,
                             stride_out_row, stride_out_head, stride_split,
                             head_size: gl.constexpr, block_m: gl.constexpr, block_n: gl.constexpr,
                             padded_m: gl.constexpr, stages: gl.constexpr, q_stages: gl.constexpr,
                             block_size: gl.constexpr, listed: gl.constexpr, overlaps: gl.constexpr,
                             in_turn: gl.constexpr, num_warps: gl.constexpr):  # fmt: skip
    """Set up the buffers and their barriers and let the warps go their ways."""
    groups: gl.constexpr = block_m // 64
    dtype: gl.constexpr = q.dtype
    rows: gl.constexpr = cache.block_type.shape[0]
    panels: gl.constexpr = head_size // _PANEL
    copies: gl.constexpr = stages * panels * (block_n // rows)
    q_buffers = gl.allocate_shared_memory(dtype, [q_stages * groups, 64, head_size], q.layout)
    # In memory a tile is its panels of 64 columns, each all rows of it: what one copy fills is a piece of one panel.
    k_pages = gl.allocate_shared_memory(dtype, [copies, rows, _PANEL], cache.layout)
    v_pages = gl.allocate_shared_memory(dtype, [copies, rows, _PANEL], cache.layout)
    k_buffers = k_pages._reinterpret(dtype, [stages, block_n, head_size], k.layout)
    v_buffers = v_pages._reinterpret(dtype, [stages, block_n, head_size], v.layout)
    barriers = new_barriers(stages, q_stages, groups)
    # fmt: off
    attend = (out, barriers, q_buffers, k_buffers, v_buffers, items, turns, num_items, num_heads, num_tiles, splits,
              num_requests, query_start, visible, is_candidate, factor, out_factor, stride_out_row, stride_out_head,
              stride_split)
    load = (q, k, v, cache, block_table, k_pages, v_pages, barriers, q_buffers, k_buffers, v_buffers, items, turns,
            num_items, num_heads, num_tiles, splits, num_requests, query_start, visible, is_candidate, stride_table,
            rows_block, rows_head, head_columns_q, head_columns_k, head_columns_v)
    # A number in a tuple that has a name, or that stands to the right of a +, would not be compiled in any more.
    if groups == 2:
        gl.warp_specialize(
            [
                (_attend_tiles, (0, head_size, block_m, block_n, padded_m, stages, q_stages, listed, overlaps,
                                 in_turn) + attend),
                (_attend_tiles, (1, head_size, block_m, block_n, padded_m, stages, q_stages, listed, overlaps,
                                 in_turn) + attend),
                (_load_tiles, (head_size, block_m, block_n, padded_m, stages, q_stages, listed, block_size) + load),
            ],
            [4, 1], [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_attend_tiles, (0, head_size, block_m, block_n, padded_m, stages, q_stages, listed, overlaps,
                                 in_turn) + attend),
                (_attend_tiles, (1, head_size, block_m, block_n, padded_m, stages, q_stages, listed, overlaps,
                                 in_turn) + attend),
                (_attend_tiles, (2, head_size, block_m, block_n, padded_m, stages, q_stages, listed, overlaps,
                                 in_turn) + attend),
                (_load_tiles, (head_size, block_m, block_n, padded_m, stages, q_stages, listed, block_size) + load),
            ],
            [4, 4, 1], [152, 152, 40],
        )
    # fmt: on


def specialised_paged_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    visible: Tensor,
    is_candidate: Tensor,
    target: Tensor,
    *,
    scale: float,
    out_factor: float,
    stride_split: int,
    config: LaunchConfig,
    items: Tensor | None,
) -> Launch:
    """The launch that attends, of ``mtgr.kernels.triton_attention.attention_launches`` in a specialised configuration.

    ``target`` is the output, or FP32 sums by split, which ``out_factor`` is multiplied into; ``items`` the list of
    ``mtgr.kernels.paged_items``, without which every program searches.
    """
    num_tokens, num_heads, head_size = q.shape
    block_size = cache.shape[2]
    num_requests = query_start.shape[0] - 1
    tiles = num_tokens // config.block_m + num_requests
    most = tiles * num_heads * config.splits
    programs = programs_for(most, q.device)
    slot = cache.stride(2)
    rows = min(block_size, config.block_n)
    count = (cache.shape[0] - 1) * (cache.stride(0) // slot) + (num_heads - 1) * (cache.stride(1) // slot) + block_size
    pages = TensorDescriptor(
        cache, [count, 2 * head_size], [slot, 1], [rows, 64], shared_layout([rows, 64], cache.dtype)
    )
    return Launch(
        kernel=specialised_paged_kernel,
        grid=(programs,),
        arguments=(
            table_of(q, 64),
            table_of(k, config.block_n),
            table_of(v, config.block_n),
            pages,
            block_table,
            query_start,
            visible,
            is_candidate,
            query_start if items is None else items,
            target,
            triton.cdiv(most, programs),
            most,
            num_heads,
            tiles,
            config.splits,
            num_requests,
            block_table.stride(0),
            cache.stride(0) // slot,
            cache.stride(1) // slot,
            scale / 2,
            out_factor,
            q.stride(1),
            k.stride(1),
            v.stride(1),
            target.stride(-3),
            target.stride(-2),
            stride_split,
        ),
        options={
            "head_size": head_size,
            "block_m": config.block_m,
            "block_n": config.block_n,
            "padded_m": triton.next_power_of_2(config.block_m),
            "stages": config.num_stages,
            "q_stages": query_stages(config, head_size, q.dtype.itemsize),
            "block_size": block_size,
            "listed": items is not None,
            "overlaps": config.overlaps,
            "in_turn": config.in_turn,
            "num_warps": 4,
        },
    )
