# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
"""Rows to tokens in Triton's language: one program a sequence, or one a token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mtgr.kernels.embedding import Pieces
from mtgr.kernels.launch import Launch
from mtgr.schema import FIRST_COLUMN, SLOT_COLUMN, TYPE_COLUMN, TokenType

_TYPE = tl.constexpr(TYPE_COLUMN)
_SLOT = tl.constexpr(SLOT_COLUMN)
_FIRST = tl.constexpr(FIRST_COLUMN)
_PADDING = tl.constexpr(int(TokenType.PADDING))
_PROFILE = tl.constexpr(int(TokenType.PROFILE))
_HISTORY = tl.constexpr(int(TokenType.HISTORY))

_TYPES_AT_ONCE = 1024


@triton.jit(do_not_specialize=["n", "k"])
def segment_kernel(
    context,
    candidates,
    types,
    sequences,
    n,
    k,
    width: tl.constexpr,
    is_causal: tl.constexpr,
    block: tl.constexpr,
):
    """Copy the types of one sequence's tokens and count them."""
    sequence = tl.program_id(0)
    lanes = tl.arange(0, block)
    first_row = sequence * (n + k)
    static = tl.zeros([block], dtype=tl.int32)
    valid = tl.zeros([block], dtype=tl.int32)
    asked = tl.zeros([block], dtype=tl.int32)
    for start in range(0, n, block):
        present = start + lanes < n
        rows = (sequence * n + start + lanes).to(tl.int64)
        kinds = tl.load(context + rows * width + _TYPE, mask=present, other=_PADDING)
        tl.store(types + first_row + start + lanes, kinds, mask=present)
        static += ((kinds == _PROFILE) | (kinds == _HISTORY)).to(tl.int32)
        valid += (kinds != _PADDING).to(tl.int32)
    for start in range(0, k, block):
        present = start + lanes < k
        rows = (sequence * k + start + lanes).to(tl.int64)
        kinds = tl.load(candidates + rows * width + _TYPE, mask=present, other=_PADDING)
        tl.store(types + first_row + n + start + lanes, kinds, mask=present)
        asked += (kinds != _PADDING).to(tl.int32)
    out = sequences + sequence * 7
    num_static = tl.sum(static, axis=0)
    if is_causal:
        num_static = 0
    tl.store(out, num_static)
    tl.store(out + 1, tl.sum(valid, axis=0))
    tl.store(out + 2, tl.sum(asked, axis=0))
    tl.store(out + 3, first_row)
    tl.store(out + 4, first_row + n)
    tl.store(out + 5, first_row)
    tl.store(out + 6, first_row + n)


@triton.jit
def gather_kernel(
    rows,
    table,
    index,
    factor,
    offset,
    out,
    row_width: tl.constexpr,
    piece_width: tl.constexpr,
    out_width: tl.constexpr,
    padded_width: tl.constexpr,
):
    """All pieces of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, padded_width)
    inside = columns < out_width
    piece = columns // piece_width
    column = tl.load(index + piece, mask=inside, other=0)
    row = rows + token * row_width
    entry = tl.load(row + column, mask=inside, other=0)
    kind = tl.load(row + _TYPE)
    entry = tl.where((column == _FIRST) & (kind == _PROFILE), 0, entry)
    place = tl.load(offset + piece, mask=inside, other=0) + entry * tl.load(factor + piece, mask=inside, other=0)
    values = tl.load(table + place.to(tl.int64) * piece_width + columns % piece_width, mask=inside)
    tl.store(out + token * out_width + columns, values, mask=inside)


@triton.jit(do_not_specialize=["n", "k"])
def place_kernel(
    context,
    candidates,
    of_events,
    of_candidates,
    profile,
    positions,
    sequences,
    out,
    n,
    k,
    row_width: tl.constexpr,
    width: tl.constexpr,
    padded_width: tl.constexpr,
):
    """One token: its vector and its position's."""
    token = tl.program_id(0)
    sequence = tl.program_id(1)
    columns = tl.arange(0, padded_width)
    inside = columns < width
    if token < n:
        number = (sequence * n + token).to(tl.int64)
        row = context + number * row_width
        position = tl.load(row + _SLOT)
        source = of_events + number * width
        if tl.load(row + _TYPE) == _PROFILE:
            source = profile + tl.load(row + _FIRST).to(tl.int64) * width
    else:
        position = tl.load(sequences + sequence * 7 + 1)
        source = of_candidates + (sequence * k + token - n).to(tl.int64) * width
    x = tl.load(source + columns, mask=inside).to(tl.float32)
    x += tl.load(positions + position.to(tl.int64) * width + columns, mask=inside).to(tl.float32)
    target = out + (sequence * (n + k) + token).to(tl.int64) * width
    tl.store(target + columns, x.to(out.dtype.element_ty), mask=inside)


def segment_launch(context: Tensor, candidates: Tensor, types: Tensor, sequences: Tensor, *, is_causal: bool) -> Launch:
    """The launch that fills what ``mtgr.kernels.embedding.segment_rows`` returns."""
    batch, n, width = context.shape
    return Launch(
        kernel=segment_kernel,
        grid=(batch,),
        arguments=(context, candidates, types, sequences, n, candidates.shape[1]),
        options={"width": width, "is_causal": is_causal, "block": _TYPES_AT_ONCE, "num_warps": 8},
    )


def gather_launch(rows: Tensor, table: Tensor, pieces: Pieces, out: Tensor) -> Launch:
    """The launch that fills what ``mtgr.kernels.embedding.gather_pieces`` returns."""
    return Launch(
        kernel=gather_kernel,
        grid=(out.shape[0],),
        arguments=(rows, table, pieces.index, pieces.factor, pieces.offset, out),
        options={
            "row_width": rows.shape[2],
            "piece_width": table.shape[1],
            "out_width": out.shape[1],
            "padded_width": triton.next_power_of_2(out.shape[1]),
            "num_warps": 1 if out.shape[1] <= 256 else 4,
        },
    )


def place_launch(
    context: Tensor,
    candidates: Tensor,
    of_events: Tensor,
    of_candidates: Tensor,
    profile: Tensor,
    positions: Tensor,
    sequences: Tensor,
    out: Tensor,
) -> Launch:
    """The launch that fills what ``mtgr.kernels.embedding.place_tokens`` returns."""
    batch, n, row_width = context.shape
    k, width = candidates.shape[1], out.shape[1]
    return Launch(
        kernel=place_kernel,
        grid=(n + k, batch),
        arguments=(context, candidates, of_events, of_candidates, profile, positions, sequences, out, n, k),
        options={
            "row_width": row_width,
            "width": width,
            "padded_width": triton.next_power_of_2(width),
            "num_warps": min(8, max(1, width // 512)),
        },
    )
