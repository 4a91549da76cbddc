# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
"""The list of a step's tiles in Triton's language: each program looks for one tile and writes what it finds."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mtgr.kernels.launch import Launch
from mtgr.kernels.paged_items import FIELDS, PART

_FIELDS = tl.constexpr(FIELDS)
_PART = tl.constexpr(PART)
_INT32_MAX = tl.constexpr(2**31 - 1)

_VARYING = ("num_requests",)
_VARYING_POINTERS = ("query_start", "visible", "is_candidate", "items")


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_VARYING_POINTERS)
def list_items_kernel(query_start, visible, is_candidate, items, num_requests, block_m: tl.constexpr):
    """Number tiles without gaps, by a running sum over requests; the last tile stands first."""
    tile = tl.program_id(0)
    request = 0
    before = 0
    total = 0
    for first in range(0, num_requests, 128):
        requests = first + tl.arange(0, 128)
        there = requests < num_requests
        start = tl.load(query_start + requests, mask=there, other=0)
        end = tl.load(query_start + requests + 1, mask=there, other=0)
        tiles = tl.cdiv(end - start, block_m)
        is_before = there & (total + tl.cumsum(tiles, axis=0) <= tile)
        request += tl.sum(is_before.to(tl.int32), axis=0)
        before += tl.sum(tl.where(is_before, tiles, 0), axis=0)
        total += tl.sum(tiles, axis=0)
    if tile == 0:
        tl.store(items, total)
    if tile < total:
        first_token = tl.load(query_start + request) + (tile - before) * block_m
        end_token = tl.load(query_start + request + 1)
        fields = items + (total - tile) * _FIELDS
        num_keys = 0
        has_own = 0
        for part in tl.static_range(block_m // _PART):
            tokens = first_token + part * _PART + tl.arange(0, _PART)
            present = tokens < end_token
            seen = tl.load(visible + tokens, mask=present, other=0)
            own = tl.load(is_candidate + tokens, mask=present, other=0).to(tl.int32) != 0
            num_keys = tl.maximum(num_keys, tl.max(seen, axis=0))
            has_own = tl.maximum(has_own, tl.max(own.to(tl.int32), axis=0))
            tl.store(fields + 5 + part, tl.min(tl.where(present, seen, _INT32_MAX), axis=0))
        tl.store(fields + 0, request)
        tl.store(fields + 1, first_token)
        tl.store(fields + 2, end_token)
        tl.store(fields + 3, num_keys)
        tl.store(fields + 4, has_own)


def list_items_launch(
    query_start: Tensor, visible: Tensor, is_candidate: Tensor, items: Tensor, block_m: int
) -> Launch:
    """The launch that fills ``items``, of ``mtgr.kernels.paged_items.new_items``."""
    return Launch(
        kernel=list_items_kernel,
        grid=(items.shape[0] - 1,),
        arguments=(query_start, visible, is_candidate, items, query_start.shape[0] - 1),
        options={"block_m": block_m, "num_warps": 1},
    )
