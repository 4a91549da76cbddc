# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
"""Dense SiLU attention in Triton's language: one program a tile of queries of one sequence and head.

The keys that all queries of a tile see come first and need no mask; the tiles on the diagonal and at the end follow
with one; a candidate's own key comes last. A relative bias is made in the tile, of positions and times.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mtgr.kernels.dense_bias import DenseBias
from mtgr.kernels.dense_configs import DenseConfig
from mtgr.kernels.dense_fp8 import SCALE_ROWS, WEIGHT_SCALE, QuantisedHeads
from mtgr.kernels.dense_segments import Segments
from mtgr.kernels.launch import Launch
from mtgr.kernels.triton_bias import gather_integers, own_bias, relative_bias
from mtgr.kernels.triton_fp8 import to_e4m3

_LOG2_E = tl.constexpr(1.4426950408889634)
_INT32_MAX = tl.constexpr(2**31 - 1)
_SCALE_ROWS = tl.constexpr(SCALE_ROWS)
_WEIGHT_SCALE = tl.constexpr(WEIGHT_SCALE)


@triton.jit
def tanh(x):
    """Tanh in one operation of the special function unit, which bounds attention with small heads on Hopper."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def silu_of_double(half, fast: tl.constexpr):
    """SiLU(2 half), FP32: x sigmoid(x) = x / 2 + x / 2 tanh(x / 2); the error of ``fast`` is below 2^-11 |half|."""
    if fast:
        return half * tanh(half) + half
    return 2.0 * half / (1.0 + tl.exp2(half * (-2.0 * _LOG2_E)))


@triton.jit
def pair_keys(weights, block_m: tl.constexpr, block_n: tl.constexpr):
    """Reorder the keys of each sixteen as ``dense_fp8`` stores their values.

    What a thread holds of a product's result is then what it must hold as the next one's FP8 operand: nothing moves.
    """
    split = tl.reshape(weights, [block_m, block_n // 16, 2, 4, 2])
    return tl.reshape(tl.permute(split, [0, 1, 3, 2, 4]), [block_m, block_n])


@triton.jit
def _attend_tiles(
    attended,
    q,
    k,
    v,
    scales,
    first_row,
    first,
    end,
    seen,
    factor,
    value_factor,
    head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_scale_kind,
    stride_scale_head,
    query_positions,
    query_times,
    times,
    position_table,
    time_table,
    bucket_edges,
    limit,
    last_edge,
    kind: tl.constexpr,
    head_size: tl.constexpr,
    padded_size: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    use_descriptors: tl.constexpr,
    is_fp8: tl.constexpr,
    has_bias: tl.constexpr,
    staged: tl.constexpr,
    fast: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
):
    """Add the keys first .. end - 1, which stand from ``first_row`` on, to FP32 ``attended`` [block_m, padded_size].

    ``kind``: 0 all queries see all keys; 1 a query sees keys below its ``seen``; 2 it sees the key ``seen``, its own.
    """
    columns = tl.arange(0, padded_size)
    lanes = tl.arange(0, block_n)
    if has_bias and kind == 2:
        half_bias = 0.5 * own_bias(position_table, time_table, limit)
    for start in tl.range(first, end, block_n):
        row = first_row + start
        if use_descriptors:
            keys = k.load([row, head * stride_k_head])
        else:
            rows = (row + lanes).to(tl.int64)
            read = columns < head_size
            read = (lanes < end - start)[:, None] & read[None, :]
            if kind == 0 and head_size == padded_size:
                keys = tl.load(k + rows[:, None] * stride_k_row + head * stride_k_head + columns[None, :])
            else:
                keys = tl.load(
                    k + rows[:, None] * stride_k_row + head * stride_k_head + columns[None, :], mask=read, other=0.0
                )
        if widen:
            keys = keys.to(tl.float32)
        logits = tl.dot(q, tl.trans(keys), input_precision=precision)
        if is_fp8:
            block = scales + head * stride_scale_head + row // _SCALE_ROWS
            key_scale = tl.load(block + stride_scale_kind)
            value_scale = tl.load(block + 2 * stride_scale_kind) * value_factor
            half = logits * (factor * key_scale)
            weights = silu_of_double(half, fast) * value_scale
        elif has_bias:
            if kind != 2:
                key_times = gather_integers(times + row, tl.minimum(lanes, end - start - 1), staged)
                half_bias = 0.5 * relative_bias(
                    query_positions, query_times, start + lanes, key_times, position_table, time_table, bucket_edges,
                    limit, last_edge, staged,
                )  # fmt: skip
            weights = silu_of_double(logits * factor + half_bias, fast)
        else:
            weights = silu_of_double(logits * factor, fast)
        if kind == 1:
            weights = tl.where((start + lanes)[None, :] < seen[:, None], weights, 0.0)
        if kind == 2:
            weights = tl.where((start + lanes)[None, :] == seen[:, None], weights, 0.0)
        if is_fp8:
            weights = pair_keys(to_e4m3(weights, widen), block_m, block_n)
            values = v.load([head * head_size, row])
            if widen:
                weights, values = weights.to(tl.float32), values.to(tl.float32)
            attended = tl.dot(weights, tl.trans(values), attended)
        else:
            if use_descriptors:
                values = v.load([row, head * stride_v_head])
            elif kind == 0 and head_size == padded_size:
                values = tl.load(v + rows[:, None] * stride_v_row + head * stride_v_head + columns[None, :])
            else:
                values = tl.load(
                    v + rows[:, None] * stride_v_row + head * stride_v_head + columns[None, :], mask=read, other=0.0
                )
            weights = weights.to(values.dtype)
            if widen:
                weights, values = weights.to(tl.float32), values.to(tl.float32)
            attended = tl.dot(weights, values, attended, input_precision=precision)
    return attended


_VARYING = (
    "factor",
    "out_factor",
    "max_context",
    "padded_context",
    "padded_candidates",
    "limit",
    "last_edge",
    "stride_scale_kind",
    "stride_scale_head",
)
_VARYING_POINTERS = ("times", "position_table", "time_table", "bucket_edges")


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_VARYING_POINTERS)
def dense_attention_kernel(
    q,
    k,
    v,
    out,
    sequences,
    scales,
    times,
    position_table,
    time_table,
    bucket_edges,
    factor,
    out_factor,
    max_context,
    padded_context,
    padded_candidates,
    limit,
    last_edge,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_out_row,
    stride_out_head,
    stride_scale_kind,
    stride_scale_head,
    head_size: tl.constexpr,
    padded_size: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    scale_blocks: tl.constexpr,
    use_descriptors: tl.constexpr,
    is_fp8: tl.constexpr,
    has_bias: tl.constexpr,
    staged: tl.constexpr,
    fast: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
):
    """Attend for one tile of the context or of the candidates of one sequence, and one head."""
    # Late tiles see most: start with them, so that no long program starts when all others are done.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence = sequences + tl.program_id(2) * 7
    static = tl.load(sequence)
    context = tl.load(sequence + 1)
    context_row = tl.load(sequence + 3)
    context_tiles = tl.cdiv(max_context, block_m)
    is_candidate = tile >= context_tiles
    if is_candidate:
        first = (tile - context_tiles) * block_m
        length = tl.load(sequence + 2)
        row = tl.load(sequence + 4) + first
        out_row = tl.load(sequence + 6) + first
        padded = padded_candidates
    else:
        first = tile * block_m
        length = context
        row = context_row + first
        out_row = tl.load(sequence + 5) + first
        padded = padded_context
    written = tl.maximum(length, padded)
    if first >= written:
        return

    lanes = tl.arange(0, block_m)
    tokens = first + lanes
    columns = tl.arange(0, padded_size)
    attended = tl.zeros([block_m, padded_size], dtype=tl.float32)
    if first < length:
        present = tokens < length
        inside = present[:, None] & (columns < head_size)[None, :]
        rows = (row + lanes).to(tl.int64)
        q_tile = tl.load(
            q + rows[:, None] * stride_q_row + head * stride_q_head + columns[None, :], mask=inside, other=0.0
        )
        if widen:
            q_tile = q_tile.to(tl.float32)
        if is_candidate:
            seen = tl.where(present, context, 0)
        else:
            seen = tl.where(present, tl.maximum(tokens + 1, tl.minimum(static, context)), 0)
        num_keys = tl.max(seen)
        seen_by_all = tl.min(tl.where(present, seen, _INT32_MAX))
        middle = seen_by_all // block_n * block_n
        query_positions = tokens
        query_times = tokens
        if has_bias:
            if is_candidate:
                query_positions = tl.where(present, context, 0)
            query_times = tl.load(times + row + lanes, mask=present, other=0)
        value_factor = 1.0
        out_scale = out_factor
        if is_fp8:
            # Relative to the sequence's largest, value scales lie in (0, 1] and go into the weights.
            own = scales + head * stride_scale_head
            factor *= tl.load(own + row // _SCALE_ROWS)
            blocks = tl.arange(0, scale_blocks)
            value_scales = own + 2 * stride_scale_kind
            largest = tl.max(
                tl.load(
                    value_scales + context_row // _SCALE_ROWS + blocks,
                    mask=blocks < tl.cdiv(context, _SCALE_ROWS),
                    other=0.0,
                )
            )
            if is_candidate:
                largest = tl.maximum(largest, tl.load(value_scales + row // _SCALE_ROWS))
            value_factor = _WEIGHT_SCALE / largest
            out_scale = out_factor * largest / _WEIGHT_SCALE
        attended = _attend_tiles(
            attended, q_tile, k, v, scales, context_row, 0, middle, seen, factor, value_factor, head,
            stride_k_row, stride_k_head, stride_v_row, stride_v_head, stride_scale_kind, stride_scale_head,
            query_positions, query_times, times, position_table, time_table, bucket_edges, limit, last_edge,
            0, head_size, padded_size, block_m, block_n, use_descriptors, is_fp8, has_bias, staged,
            fast, precision, widen,
        )  # fmt: skip
        attended = _attend_tiles(
            attended, q_tile, k, v, scales, context_row, middle, num_keys, seen, factor, value_factor, head,
            stride_k_row, stride_k_head, stride_v_row, stride_v_head, stride_scale_kind, stride_scale_head,
            query_positions, query_times, times, position_table, time_table, bucket_edges, limit, last_edge,
            1, head_size, padded_size, block_m, block_n, use_descriptors, is_fp8, has_bias, staged,
            fast, precision, widen,
        )  # fmt: skip
        if is_candidate:
            attended = _attend_tiles(
                attended, q_tile, k, v, scales, row, 0, tl.minimum(block_m, length - first), lanes, factor,
                value_factor, head,
                stride_k_row, stride_k_head, stride_v_row, stride_v_head, stride_scale_kind, stride_scale_head,
                query_positions, query_times, times, position_table, time_table, bucket_edges, limit, last_edge,
                2, head_size, padded_size, block_m, block_n, use_descriptors, is_fp8, has_bias, staged,
                fast, precision, widen,
            )  # fmt: skip
        # What stands in the rows behind the last token may be anything.
        attended = tl.where(present[:, None], attended * out_scale, 0.0)
    out_rows = (out_row + lanes).to(tl.int64)
    tl.store(
        out + out_rows[:, None] * stride_out_row + head * stride_out_head + columns[None, :],
        attended.to(out.dtype.element_ty),
        mask=(tokens < written)[:, None] & (columns < head_size)[None, :],
    )


def dense_launch(
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
    bias: DenseBias | None = None,
    fast: bool | None = None,
) -> Launch:
    """The launch that makes ``mtgr.kernels.dense_attention``, in a ``pointers`` or ``descriptors`` configuration.

    Arguments are as there; with ``quantised``, q, k and v are its. ``fast`` says whether SiLU may lose what half
    precision has no place for; by default it may in half precision.
    """
    num_heads, head_size = out.shape[1:]
    interpreted = triton.knobs.runtime.interpret
    padded_size = max(16, triton.next_power_of_2(head_size))
    is_fp8 = quantised is not None
    use_descriptors = is_fp8 or config.variant == "descriptors"
    keys: Any = k
    values: Any = v
    if use_descriptors:
        keys = _descriptor(k, config.block_n, padded_size)
        if is_fp8:
            values = TensorDescriptor(v, list(v.shape), list(v.stride()), [padded_size, config.block_n])
        else:
            values = _descriptor(v, config.block_n, padded_size)
    tables: tuple[Any, ...] = (None,) * 4
    sizes = (0, 0)
    if bias is not None:
        tables = (bias.times, bias.position_table, bias.time_table, bias.bucket_edges)
        sizes = (bias.max_positions - 1, bias.bucket_edges.shape[0] - 1)
    tiles = triton.cdiv(segments.max_context, config.block_m) + triton.cdiv(segments.max_candidates, config.block_m)
    return Launch(
        kernel=dense_attention_kernel,
        grid=(tiles, num_heads, segments.sequences.shape[0]),
        arguments=(
            q,
            keys,
            values,
            out,
            segments.sequences,
            quantised.scales if quantised else None,
            *tables,
            scale / 2,
            1.0 / norm_length,
            segments.max_context,
            segments.padded_context,
            segments.padded_candidates,
            *sizes,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            0 if is_fp8 else v.stride(0),
            0 if is_fp8 else v.stride(1),
            out.stride(0),
            out.stride(1),
            quantised.scales.stride(0) if quantised else 0,
            quantised.scales.stride(1) if quantised else 0,
        ),
        options={
            "head_size": head_size,
            "padded_size": padded_size,
            "block_m": config.block_m,
            "block_n": config.block_n,
            # One kernel for all contexts but very long ones.
            "scale_blocks": triton.next_power_of_2(max(64, triton.cdiv(segments.max_context, SCALE_ROWS))),
            "use_descriptors": use_descriptors,
            "is_fp8": is_fp8,
            "has_bias": bias is not None,
            "staged": interpreted,
            "fast": not interpreted and (q.dtype != torch.float32 if fast is None else fast),
            "precision": "ieee",
            # The interpreter would multiply the bits of BF16 and FP8; FP32 gives the same products.
            "widen": interpreted and q.dtype not in (torch.float16, torch.float32),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles of [T, H, D], whose heads stand side by side, as a table."""
    width = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    return TensorDescriptor(x, [x.shape[0], width], [x.stride(0), 1], [rows, columns])
