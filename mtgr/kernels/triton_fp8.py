# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
"""Rounding queries, keys and values to FP8 in Triton's language: one program 128 tokens of a head."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mtgr.kernels.dense_fp8 import LARGEST, SCALE_ROWS, QuantisedHeads
from mtgr.kernels.dense_segments import Segments
from mtgr.kernels.launch import Launch

_LARGEST = tl.constexpr(LARGEST)

# Added to a number below 2^-6 and taken off again, it leaves a multiple of 2^-9: e4m3's smallest step.
_SMALL_STEPS = tl.constexpr(1.5 * 2.0**14)
_SMALLEST_NORMAL = tl.constexpr(2.0**-6)


@triton.jit
def to_e4m3(x, interpreted: tl.constexpr):
    """FP32 rounded to the nearest e4m3, ties to even, beyond 448 to 448.

    Triton's interpreter loses the carry where rounding reaches the next power of two: there the number is rounded
    before it is converted.
    """
    if interpreted:
        bits = x.to(tl.int32, bitcast=True)
        near = ((bits + (0x7FFFF + ((bits >> 20) & 1))) & -0x100000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < _SMALLEST_NORMAL, (x + _SMALL_STEPS) - _SMALL_STEPS, near)
        x = tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)
    return x.to(tl.float8e4nv)


@triton.jit
def quantise_kernel(
    q,
    k,
    v,
    q_out,
    k_out,
    v_out,
    scales,
    sequences,
    aligned,
    context_blocks,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_scale_kind,
    stride_scale_head,
    stride_v_out,
    num_heads: tl.constexpr,
    head_size: tl.constexpr,
    padded_size: tl.constexpr,
    rows: tl.constexpr,
    interpreted: tl.constexpr,
):
    """Round one block of q, of k or of v."""
    kind = tl.program_id(2) % 3
    sequence = tl.program_id(2) // 3
    head = tl.program_id(1)
    block = tl.program_id(0)
    is_candidate = block >= context_blocks
    if is_candidate:
        first = (block - context_blocks) * rows
        length = tl.load(sequences + sequence * 7 + 2)
        source = tl.load(sequences + sequence * 7 + 4) + first
        target = tl.load(aligned + sequence * 7 + 4) + first
    else:
        first = block * rows
        length = tl.load(sequences + sequence * 7 + 1)
        source = tl.load(sequences + sequence * 7 + 3) + first
        target = tl.load(aligned + sequence * 7 + 3) + first
    lanes = tl.arange(0, rows)
    columns = tl.arange(0, padded_size)
    present = (first + lanes < length)[:, None] & (columns < head_size)[None, :]
    source_rows = (source + lanes).to(tl.int64)
    # One address for three tensors of one type: the branch is taken before anything is read.
    source_pointer = q
    stride_row = stride_q_row
    stride_head = stride_q_head
    if kind == 1:
        source_pointer = k
        stride_row = stride_k_row
        stride_head = stride_k_head
    elif kind == 2:
        source_pointer = v
        stride_row = stride_v_row
        stride_head = stride_v_head
    x = tl.load(
        source_pointer + source_rows[:, None] * stride_row + head * stride_head + columns[None, :],
        mask=present,
        other=0.0,
    )
    x = x.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x)), 1e-12) / _LARGEST
    tl.store(scales + kind * stride_scale_kind + head * stride_scale_head + target // rows, scale)
    rounded = to_e4m3(x / scale, interpreted)
    inside = (columns < head_size)[None, :]
    if kind == 2:
        # Within each sixteen, token 8 h + 2 t + b stands at 4 t + 2 h + b.
        low = lanes % 16
        place = lanes - low + (low % 8) // 2 * 4 + low // 8 * 2 + low % 2
        across = v_out + (head * head_size + columns).to(tl.int64)[None, :] * stride_v_out + (target + place)[:, None]
        tl.store(across, rounded, mask=inside & (lanes >= 0)[:, None])
    else:
        along = (target + lanes).to(tl.int64)[:, None] * (num_heads * head_size) + head * head_size + columns[None, :]
        if kind == 0:
            tl.store(q_out + along, rounded, mask=inside & (lanes >= 0)[:, None])
        else:
            tl.store(k_out + along, rounded, mask=inside & (lanes >= 0)[:, None])


def quantise_launch(q: Tensor, k: Tensor, v: Tensor, segments: Segments, made: QuantisedHeads) -> Launch:
    """The launch that fills what ``mtgr.kernels.dense_fp8.quantise`` returns."""
    _, num_heads, head_size = q.shape
    context_blocks = triton.cdiv(segments.max_context, SCALE_ROWS)
    blocks = context_blocks + triton.cdiv(segments.max_candidates, SCALE_ROWS)
    return Launch(
        kernel=quantise_kernel,
        grid=(blocks, num_heads, 3 * segments.sequences.shape[0]),
        arguments=(
            q,
            k,
            v,
            made.q,
            made.k,
            made.v,
            made.scales,
            segments.sequences,
            made.segments.sequences,
            context_blocks,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            made.scales.stride(0),
            made.scales.stride(1),
            made.v.stride(0),
        ),
        options={
            "num_heads": num_heads,
            "head_size": head_size,
            "padded_size": max(16, triton.next_power_of_2(head_size)),
            "rows": SCALE_ROWS,
            "interpreted": triton.knobs.runtime.interpret,
            "num_warps": 8,
        },
    )
