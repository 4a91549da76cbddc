# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
# mypy: disable-error-code="attr-defined"

"""What the specialised kernels for Hopper share, in Gluon: Triton's language with explicit layouts.

One warp copies tiles with the tensor memory accelerator; two or three warpgroups of 64 queries each take them. While
the tensor cores add one tile's weights times values, a warpgroup computes the next tile's SiLU, and the warpgroups,
which nothing but the loads ties together, fill each other's gaps. Tiles stand in rings of buffers: ``full`` barriers
say that a copy has arrived, ``empty`` ones that all warpgroups are done with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mtgr.kernels.configs import LaunchConfig
from mtgr.kernels.dense_configs import DenseConfig
from mtgr.kernels.dense_fp8 import SCALE_ROWS

# Triton 3.7 calls it otherwise than 3.6.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

_SCALE_ROWS = gl.constexpr(SCALE_ROWS)

# Bytes of shared memory that a program's tiles may take; its barriers take the rest of 227 KiB.
_SHARED_BYTES = 226 << 10


@gluon.jit
def place_of(turn):
    """This program's item of a turn: forth and back, so that of items in order of size all get like amounts."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 1, programs - 1 - place, place)


@gluon.jit
def next_stage(stage, phase, stages: gl.constexpr):
    """The next buffer of a ring, and the parity of its barriers."""
    wraps = stage == stages - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def new_barriers(stages: gl.constexpr, q_stages: gl.constexpr, groups: gl.constexpr):
    """The barriers of a program, ready for all of its warps.

    Returns:
        order, by warpgroup; q_full, q_empty, k_full, k_empty, v_full, v_empty, by buffer of their rings.
    """
    q_full = gl.allocate_shared_memory(gl.int64, [q_stages, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [q_stages, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [groups, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(groups):
        mbarrier.init(order.index(part), count=1)
    for stage in gl.static_range(q_stages):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(q_empty.index(stage), count=groups)
    for stage in gl.static_range(stages):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=groups)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=groups)
    fence_async_shared()
    thread_barrier()
    return order, q_full, q_empty, k_full, k_empty, v_full, v_empty


@gluon.jit
def load_queries(q, row, head, head_columns, full, empty, buffers, stage, phase, groups: gl.constexpr):
    """Copy an item's queries into their ring as soon as its buffer is empty."""
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), groups * q.block_type.nbytes)
    for part in gl.static_range(groups):
        tma.async_copy_global_to_shared(
            q, [row + part * 64, head * head_columns], full.index(stage), buffers.index(stage * groups + part)
        )


@gluon.jit
def load_tile(x, row, column, full, empty, buffers, stage, phase):
    """Copy a tile of keys or values into the ring as soon as its buffer is empty."""
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), x.block_type.nbytes)
    tma.async_copy_global_to_shared(x, [row, column], full.index(stage), buffers.index(stage))


@gluon.jit
def tanh(x):
    """Tanh in one operation of the special function unit; its relative error is below 2^-11."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def silu_of_double(half):
    """SiLU(2 half), FP32; its error is below 2^-11 |half|."""
    return half * tanh(half) + half


@gluon.jit
def packed_weights(weights, block_n: gl.constexpr):
    """FP32 to e4m3, INT32 [64, block_n / 4]: the registers of an operand, in the order of ``dense_fp8``.

    What a loop hands on as bytes, the compiler would take apart at its end and put together at its beginning.
    """
    first, second = pair_keys(weights, block_n).reshape([64, block_n // 4, 2, 2]).split()
    a, c = first.split()
    b, d = second.split()
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f", [a, b, c, d], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def unpacked_weights(packed, block_n: gl.constexpr, operand: gl.constexpr):
    """The operand whose registers ``packed_weights`` made; no instruction."""
    twice = gl.join(packed, packed)
    copies = gl.join(twice, twice).reshape([64, block_n])
    copies = gl.convert_layout(copies, operand, assert_trivial=True)
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [copies], dtype=gl.float8e4nv, is_pure=True, pack=4
    )


@gluon.jit
def pair_keys(tile, block_n: gl.constexpr):
    """Keys in the order in which ``dense_fp8`` stores values: no number leaves its thread."""
    return tile.reshape([64, block_n // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([64, block_n])


@gluon.jit
def weights_of(logits, factor, value_factor, low, high, first_key, masked: gl.constexpr, is_fp8: gl.constexpr,
               packed: gl.constexpr, dtype: gl.constexpr, block_n: gl.constexpr, layout: gl.constexpr,
               operand: gl.constexpr):  # fmt: skip
    """SiLU of a tile, 0 where a key is not in a query's low .. high - 1: the second product's operand.

    With ``packed`` what ``packed_weights`` takes.
    """
    if masked:
        keys = first_key + gl.arange(0, block_n, gl.SliceLayout(0, layout))
        keys = gl.expand_dims(keys, 0)
        inside = (keys >= gl.expand_dims(low, 1)) & (keys < gl.expand_dims(high, 1))
        # SiLU of 0 is 0.
        logits = gl.where(inside, logits, 0.0)
    half = logits * factor
    if packed:
        weights = silu_of_double(half) * value_factor
    elif is_fp8:
        weights = pair_keys((silu_of_double(half) * value_factor).to(dtype), block_n)
        weights = gl.convert_layout(weights, operand, assert_trivial=True)
    else:
        weights = gl.convert_layout(silu_of_double(half).to(dtype), operand, assert_trivial=True)
    return weights


@gluon.jit
def clear_rows(values, first_absent, block_n: gl.constexpr, head_size: gl.constexpr):
    """Zero the rows of a tile from ``first_absent`` on: a page may hold anything behind its last key, also NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, layout)), 1)
    for piece in gl.static_range(block_n // 16):
        if first_absent < 16 * (piece + 1):
            part = values.slice(16 * piece, 16, 0)
            part.store(gl.where(rows + 16 * piece < first_absent, part.load(layout), 0.0).to(values.dtype))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def attend_item(q_buffers, k_buffers, v_buffers, barriers, part: gl.constexpr, groups: gl.constexpr,
                in_turn: gl.constexpr, order_phase, q_stage, q_phase, k_stage, k_phase, v_stage, v_phase,
                total, key_tiles, whole_tiles, first_key, num_keys, lanes, own_end, seen,
                factor, value_factor, scales, context_row, own_row, stride_scale_kind,
                head_size: gl.constexpr, block_n: gl.constexpr, stages: gl.constexpr, q_stages: gl.constexpr,
                is_fp8: gl.constexpr, packed: gl.constexpr, overlaps: gl.constexpr, clears: gl.constexpr):  # fmt: skip
    """What a warpgroup does for its 64 queries of one item, which has at least one tile.

    ``total`` tiles come out of the ring: ``key_tiles`` of the context, whose first key is ``first_key``, of which all
    queries see all keys of ``whole_tiles``; then the item's own. Query i sees keys below ``seen``, and of its own tiles
    the keys ``lanes`` .. ``own_end`` - 1. ``clears``: what stands behind ``num_keys`` may be anything. With ``in_turn``
    a warpgroup starts its products when the one before has started its own: one computes SiLU, another multiplies.

    Returns:
        FP32 [64, head_size], not scaled; order_phase, q_stage, q_phase, k_stage, k_phase, v_stage, v_phase.
    """
    order, q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    dtype: gl.constexpr = k_buffers.dtype
    summed: gl.constexpr = 256 // dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, summed])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_size, summed])
    operand: gl.constexpr = gl.DotOperandLayout(0, out_layout, 32 // dtype.primitive_bitwidth)
    nothing = gl.zeros([64, block_n], gl.float32, layout)
    attended = gl.zeros([64, head_size], gl.float32, out_layout)
    key_factor = factor
    tile_factor = value_factor
    if is_fp8:
        block = gl.where(key_tiles > 0, context_row, own_row) // _SCALE_ROWS
        key_factor = factor * gl.load(scales + stride_scale_kind + block)
        tile_factor = value_factor * gl.load(scales + 2 * stride_scale_kind + block)
    mbarrier.wait(q_full.index(q_stage), q_phase)
    q_tile = q_buffers.index(q_stage * groups + part)
    mbarrier.wait(k_full.index(k_stage), k_phase)
    logits = warpgroup_mma(q_tile, k_buffers.index(k_stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, deps=[logits])
    mbarrier.arrive(k_empty.index(k_stage), count=1)
    k_stage, k_phase = next_stage(k_stage, k_phase, stages)
    is_own = key_tiles == 0
    weights = weights_of(
        logits, key_factor, tile_factor, gl.where(is_own, lanes, 0), gl.where(is_own, own_end, seen),
        gl.where(is_own, 0, first_key), True, is_fp8, packed, dtype, block_n, layout, operand,
    )  # fmt: skip
    if packed:
        weights = packed_weights(weights, block_n)
    for index in range(1, whole_tiles):
        if is_fp8:
            block = (context_row + index * block_n) // _SCALE_ROWS
            key_factor = factor * gl.load(scales + stride_scale_kind + block)
            tile_factor = value_factor * gl.load(scales + 2 * stride_scale_kind + block)
        # Before any product is on its way: what is written after that, the assembler waits for.
        taken = unpacked_weights(weights, block_n, operand) if packed else weights
        mbarrier.wait(k_full.index(k_stage), k_phase)
        if in_turn:
            mbarrier.wait(order.index(part), order_phase ^ (part == 0))
        logits = warpgroup_mma(q_tile, k_buffers.index(k_stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        values = v_buffers.index(v_stage)
        if is_fp8:
            values = values.permute((1, 0))
        adding = warpgroup_mma(taken, values, attended, is_async=True)
        if in_turn:
            mbarrier.arrive(order.index((part + 1) % groups), count=1)
            order_phase ^= 1
        logits = warpgroup_mma_wait(1, deps=[logits])
        mbarrier.arrive(k_empty.index(k_stage), count=1)
        following = weights_of(
            logits, key_factor, tile_factor, lanes, seen, 0, False, is_fp8, packed, dtype, block_n, layout, operand
        )
        if overlaps:
            # It has passed. But without a branch the assembler would wait for the product before it computes SiLU.
            mbarrier.wait(v_full.index(v_stage), v_phase)
        attended = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        weights = packed_weights(following, block_n) if packed else following
        k_stage, k_phase = next_stage(k_stage, k_phase, stages)
        v_stage, v_phase = next_stage(v_stage, v_phase, stages)
    for index in range(gl.maximum(whole_tiles, 1), total):
        is_own = index >= key_tiles
        key = gl.where(is_own, index - key_tiles, index) * block_n
        if is_fp8:
            block = (gl.where(is_own, own_row, context_row) + key) // _SCALE_ROWS
            key_factor = factor * gl.load(scales + stride_scale_kind + block)
            tile_factor = value_factor * gl.load(scales + 2 * stride_scale_kind + block)
        # Before any product is on its way: what is written after that, the assembler waits for.
        taken = unpacked_weights(weights, block_n, operand) if packed else weights
        mbarrier.wait(k_full.index(k_stage), k_phase)
        if in_turn:
            mbarrier.wait(order.index(part), order_phase ^ (part == 0))
        logits = warpgroup_mma(q_tile, k_buffers.index(k_stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        values = v_buffers.index(v_stage)
        if clears:
            absent = num_keys - first_key - (index - 1) * block_n
            if (index <= key_tiles) & (absent < block_n):
                clear_rows(values, absent, block_n, head_size)
        if is_fp8:
            values = values.permute((1, 0))
        adding = warpgroup_mma(taken, values, attended, is_async=True)
        if in_turn:
            mbarrier.arrive(order.index((part + 1) % groups), count=1)
            order_phase ^= 1
        logits = warpgroup_mma_wait(1, deps=[logits])
        mbarrier.arrive(k_empty.index(k_stage), count=1)
        following = weights_of(
            logits, key_factor, tile_factor, gl.where(is_own, lanes, 0), gl.where(is_own, own_end, seen),
            gl.where(is_own, key, first_key + key), True, is_fp8, packed, dtype, block_n, layout, operand,
        )  # fmt: skip
        attended = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        weights = packed_weights(following, block_n) if packed else following
        k_stage, k_phase = next_stage(k_stage, k_phase, stages)
        v_stage, v_phase = next_stage(v_stage, v_phase, stages)
    mbarrier.arrive(q_empty.index(q_stage), count=1)
    q_stage, q_phase = next_stage(q_stage, q_phase, q_stages)
    mbarrier.wait(v_full.index(v_stage), v_phase)
    values = v_buffers.index(v_stage)
    if clears:
        absent = num_keys - first_key - (total - 1) * block_n
        if (total <= key_tiles) & (absent < block_n):
            clear_rows(values, absent, block_n, head_size)
    if is_fp8:
        values = values.permute((1, 0))
    taken = unpacked_weights(weights, block_n, operand) if packed else weights
    adding = warpgroup_mma(taken, values, attended, is_async=True)
    attended = warpgroup_mma_wait(0, deps=[adding])
    mbarrier.arrive(v_empty.index(v_stage), count=1)
    v_stage, v_phase = next_stage(v_stage, v_phase, stages)
    return attended, order_phase, q_stage, q_phase, k_stage, k_phase, v_stage, v_phase


def shared_layout(shape: list[int], dtype: torch.dtype) -> Any:
    """How a tile lies in shared memory, for the copies and the tensor cores."""
    names = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}
    return gl.NVMMASharedLayout.get_default_for(shape, names[dtype])


def programs_for(items: int, device: torch.device) -> int:
    """As many as there are processors: those of an H100 where there is no GPU."""
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(processors, items)


def query_stages(config: DenseConfig | LaunchConfig, head_size: int, itemsize: int) -> int:
    """How many items' queries a program holds: two where there is room, but in configurations of old."""
    is_old = not (config.overlaps or getattr(config, "packed", False) or getattr(config, "listed", False))
    rows = 2 * config.block_m + 2 * config.num_stages * config.block_n
    return 1 if is_old or rows * head_size * itemsize > _SHARED_BYTES else 2


def table_of(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of [T, H, D], whose heads stand side by side, as a table."""
    width = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    shape = [rows, x.shape[2]]
    return TensorDescriptor(x, [x.shape[0], width], [x.stride(0), 1], shape, shared_layout(shape, x.dtype))
