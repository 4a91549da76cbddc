"""From INT32 rows to tokens: columns' embeddings side by side, what stands where, and the residual stream's start.

In PyTorch these are some forty small operations a batch, each longer to launch than to run; on a GPU they are four.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.kernels.dense_segments import CONTEXT, Segments, padded_segments
from mtgr.kernels.dispatch import use_triton
from mtgr.schema import FIRST_COLUMN, SLOT_COLUMN, TYPE_COLUMN, TokenType


@dataclass(frozen=True, eq=False)
class Pieces:
    """Which parts of a merged table make a token's vector: table[offset + id * factor] for each piece.

    Attributes:
        index: INT32 [P], the column that holds the id.
        factor: INT32 [P], pieces of one id.
        offset: INT32 [P], first piece of the column's table, and which of an id's pieces this is.
    """

    index: Tensor
    factor: Tensor
    offset: Tensor

    @property
    def count(self) -> int:
        """Pieces of a token, P."""
        return self.index.shape[0]


def segment_rows(context: Tensor, candidates: Tensor, *, is_causal: bool) -> tuple[Tensor, Segments]:
    """Token types and where each sequence's tokens stand, padded; nothing waits for the GPU.

    Args:
        context: INT32 [B, n, W], contiguous.
        candidates: INT32 [B, k, W], contiguous.
        is_causal: Whether static tokens see only earlier ones.

    Returns:
        INT32 [B * (n + k)], and segments as ``padded_segments`` makes them.
    """
    batch, n, _ = context.shape
    k = candidates.shape[1]
    if not use_triton(context):
        types = torch.cat([context[..., TYPE_COLUMN], candidates[..., TYPE_COLUMN]], dim=1)
        return types.flatten(), padded_segments(types, n, is_causal=is_causal)
    from mtgr.kernels.triton_embedding import segment_launch

    types = torch.empty(batch * (n + k), dtype=torch.int32, device=context.device)
    sequences = torch.empty(batch, 7, dtype=torch.int32, device=context.device)
    segment_launch(context, candidates, types, sequences, is_causal=is_causal).run()
    return types, Segments(sequences, n, k, n, k)


def gather_pieces(rows: Tensor, table: Tensor, pieces: Pieces) -> Tensor:
    """Embeddings of tokens' columns side by side; profile tokens, whose first column is no item, take item 0.

    Args:
        rows: INT32 [B, m, W], contiguous.
        table: Float [R, w], contiguous.
        pieces: P of them.

    Returns:
        Float [B * m, P * w].
    """
    batch, count, _ = rows.shape
    if use_triton(rows):
        from mtgr.kernels.triton_embedding import gather_launch

        out = torch.empty(batch * count, pieces.count * table.shape[1], dtype=table.dtype, device=table.device)
        if out.numel():
            gather_launch(rows, table, pieces, out).run()
        return out
    columns = rows.index_select(-1, pieces.index)
    is_profile = (rows[..., TYPE_COLUMN] == TokenType.PROFILE).unsqueeze(-1)
    columns = columns.masked_fill(is_profile & (pieces.index == FIRST_COLUMN), 0)
    ids = torch.addcmul(pieces.offset, columns, pieces.factor)
    return F.embedding(ids, table).view(batch * count, -1)


def place_tokens(
    context: Tensor,
    candidates: Tensor,
    of_events: Tensor,
    of_candidates: Tensor,
    profile: Tensor,
    positions: Tensor,
    segments: Segments,
) -> Tensor:
    """The blocks' input: each token's vector and its position's, candidates behind the context.

    Args:
        context: INT32 [B, n, W], contiguous.
        candidates: INT32 [B, k, W], contiguous.
        of_events: Float [B * n, d], vectors of context tokens; those of profile tokens are not read.
        of_candidates: Float [B * k, d].
        profile: Float [V, d], vectors of profile values.
        positions: Float [M, d]; a context token's is its slot, a candidate's the number of context tokens.
        segments: Of ``segment_rows``.

    Returns:
        Float [B * (n + k), d].
    """
    batch, n, _ = context.shape
    k, width = candidates.shape[1], positions.shape[1]
    if use_triton(context):
        from mtgr.kernels.triton_embedding import place_launch

        out = torch.empty(batch * (n + k), width, dtype=positions.dtype, device=positions.device)
        place_launch(context, candidates, of_events, of_candidates, profile, positions, segments.sequences, out).run()
        return out
    is_profile = context[..., TYPE_COLUMN] == TokenType.PROFILE
    values = F.embedding(context[..., FIRST_COLUMN].masked_fill(~is_profile, 0), profile)
    x = torch.where(is_profile.unsqueeze(-1), values, of_events.view(batch, n, width))
    x = torch.cat([x, of_candidates.view(batch, k, width)], dim=1)
    behind = segments.sequences[:, CONTEXT, None].expand(batch, k)
    return (x + F.embedding(torch.cat([context[..., SLOT_COLUMN], behind], dim=1), positions)).flatten(0, 1)
