"""Queries, keys and values of dense attention in FP8 (e4m3), one scale for every 128 tokens of a head.

A scale is the largest magnitude of its tokens over the largest e4m3 number. Values stand transposed, for Hopper's FP8
products need both operands with the summed dimension contiguous, and paired: within each sixteen tokens the order is
0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15, so that the weights of a thread are the operand it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtgr.kernels.dense_segments import CANDIDATE_ROW, CANDIDATES, CONTEXT, CONTEXT_ROW, Segments
from mtgr.kernels.dispatch import use_triton

# Tokens that share a scale. Tiles of queries and keys lie inside one.
SCALE_ROWS = 128

# Weights are multiplied by it before they are rounded to e4m3, whose steps below 2^-6 do not get finer: a weight, and
# with it a logit, may reach 448 / 16 = 28.
WEIGHT_SCALE = 16.0

LARGEST = 448.0

_PAIRED = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)


@dataclass(frozen=True, eq=False)
class QuantisedHeads:
    """FP8 operands of one layer.

    Attributes:
        q: e4m3 [T8, H, D]; every context and every sequence's candidates begin at a multiple of 128.
        k: e4m3 [T8, H, D].
        v: e4m3 [H * D, T8], tokens paired.
        scales: FP32 [3, H, T8 / 128], of q, k and v.
        segments: The rows of ``q``; those of the output are the ones it was made from.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scales: Tensor
    segments: Segments


def aligned_segments(segments: Segments) -> tuple[Segments, int]:
    """The same sequences with every part at a multiple of 128 rows, and how many rows that takes at most.

    Depends on shapes only and waits for nothing.
    """
    context = -(-segments.max_context // SCALE_ROWS) * SCALE_ROWS
    candidates = -(-segments.max_candidates // SCALE_ROWS) * SCALE_ROWS
    batch = segments.sequences.shape[0]
    start = torch.arange(batch, device=segments.sequences.device, dtype=torch.int32) * (context + candidates)
    sequences = segments.sequences.clone()
    sequences[:, CONTEXT_ROW] = start
    sequences[:, CANDIDATE_ROW] = start + context
    moved = Segments(
        sequences,
        segments.max_context,
        segments.max_candidates,
        segments.padded_context,
        segments.padded_candidates,
    )
    return moved, batch * (context + candidates)


def quantise(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> QuantisedHeads:
    """FP8 operands of ``dense_attention``.

    Args:
        q: Float [T, H, D], like k and v with the last dimension contiguous.
        k: Float [T, H, D].
        v: Float [T, H, D].
        segments: The rows of q, k and v.
    """
    aligned, rows = aligned_segments(segments)
    _, heads, size = q.shape
    made = QuantisedHeads(
        torch.empty(rows, heads, size, dtype=torch.float8_e4m3fn, device=q.device),
        torch.empty(rows, heads, size, dtype=torch.float8_e4m3fn, device=q.device),
        torch.empty(heads * size, rows, dtype=torch.float8_e4m3fn, device=q.device),
        torch.empty(3, heads, rows // SCALE_ROWS, dtype=torch.float32, device=q.device),
        aligned,
    )
    if use_triton(q):
        from mtgr.kernels.triton_fp8 import quantise_launch

        quantise_launch(q, k, v, segments, made).run()
        return made
    parts = []
    for index, part in enumerate((q, k, v)):
        spread = torch.zeros(rows, heads, size, device=q.device)
        for old, new in zip(segments.sequences.tolist(), aligned.sequences.tolist(), strict=True):
            for count, start in ((CONTEXT, CONTEXT_ROW), (CANDIDATES, CANDIDATE_ROW)):
                length = old[count]
                spread[new[start] : new[start] + length] = part[old[start] : old[start] + length].float()
        blocks = spread.unflatten(0, (-1, SCALE_ROWS))
        scales = blocks.abs().amax(dim=(1, 3)).clamp_(min=1e-12) / LARGEST
        made.scales[index] = scales.T
        parts.append((blocks / scales[:, None, :, None]).flatten(0, 1).to(torch.float8_e4m3fn))
    made.q.copy_(parts[0])
    made.k.copy_(parts[1])
    order = torch.tensor(_PAIRED, device=q.device)
    paired = parts[2].view(torch.uint8).unflatten(0, (-1, 16))[:, order].flatten(0, 1)
    made.v.view(torch.uint8).copy_(paired.flatten(1).T)
    return made


def dequantise(heads: QuantisedHeads) -> tuple[Tensor, Tensor, Tensor]:
    """FP32 [T8, H, D] of q, k and v: what the FP8 operands stand for."""
    size = heads.q.shape[2]
    q_scales, k_scales, v_scales = heads.scales.transpose(1, 2).repeat_interleave(SCALE_ROWS, dim=1).unsqueeze(-1)
    places = torch.tensor(_PAIRED, device=heads.q.device).argsort()
    plain = heads.v.view(torch.uint8).T.unflatten(0, (-1, 16))[:, places].flatten(0, 1).contiguous()
    v = plain.view(torch.float8_e4m3fn).unflatten(1, (-1, size))
    return heads.q.float() * q_scales, heads.k.float() * k_scales, v.float() * v_scales
