"""Where the tokens of each sequence of a batch stand, and whom they see: MTGR's mask as a few integers.

A context token sees a prefix of its context and a candidate all of it and itself (arXiv 2505.18654, section 3), so that
three lengths a sequence say everything and no mask is ever stored. With full attention among static tokens, token i of
the context sees max(i + 1, static) keys; plain HSTU is the case static = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from mtgr.errors import ConfigurationError
from mtgr.schema import TokenType

# Columns of ``Segments.sequences``.
STATIC, CONTEXT, CANDIDATES, CONTEXT_ROW, CANDIDATE_ROW, OUT_CONTEXT_ROW, OUT_CANDIDATE_ROW = range(7)


@dataclass(frozen=True, eq=False)
class Segments:
    """The sequences of a batch, whose tokens are rows of one table.

    Attributes:
        sequences: INT32 [B, 7], contiguous: leading context tokens that all context tokens see, context tokens,
            candidates, the rows of the first context token and of the first candidate in q, k and v, and both in the
            output.
        max_context: At least the longest context, in tokens.
        max_candidates: At least the most candidates.
        padded_context: Rows of every context that the output has, 0 if it has only those that are there.
        padded_candidates: The same for candidates.
    """

    sequences: Tensor
    max_context: int
    max_candidates: int
    padded_context: int = 0
    padded_candidates: int = 0

    def __post_init__(self) -> None:
        """Check the shape.

        Raises:
            ConfigurationError: If ``sequences`` is not as above.
        """
        if self.sequences.dtype != torch.int32 or self.sequences.ndim != 2 or self.sequences.shape[1] != 7:
            raise ConfigurationError(
                f"segments: sequences is {self.sequences.dtype} {list(self.sequences.shape)}; it must be INT32 [B, 7]."
            )


def padded_segments(types: Tensor, context: int, *, is_causal: bool = False) -> Segments:
    """Segments of sequences that are padded on the right, context and candidates each; nothing waits for the GPU.

    Args:
        types: INT [B, n + k], token types, 0 for padding; the rows of q, k and v are those of [B, n + k].
        context: n.
        is_causal: Whether static tokens see only earlier ones.
    """
    batch, length = types.shape
    first, second = types[:, :context], types[:, context:]
    static = torch.zeros_like(types[:, 0])
    if not is_causal:
        static = ((first == TokenType.PROFILE) | (first == TokenType.HISTORY)).sum(dim=1)
    start = torch.arange(batch, device=types.device) * length
    rows = [start, start + context] * 2
    counts = [static, (first != TokenType.PADDING).sum(dim=1), (second != TokenType.PADDING).sum(dim=1)]
    sequences = torch.stack([*counts, *rows], dim=1).to(torch.int32)
    return Segments(sequences, context, length - context, context, length - context)


def jagged_segments(
    static: Sequence[int],
    context: Sequence[int],
    candidates: Sequence[int],
    device: torch.device | str = "cpu",
) -> Segments:
    """Segments of sequences that follow on each other without padding, each one's candidates after its context."""
    lengths = [n + k for n, k in zip(context, candidates, strict=True)]
    starts = list(accumulate(lengths, initial=0))[:-1]
    rows = [[s, s + n] * 2 for s, n in zip(starts, context, strict=True)]
    table = [[s, n, k, *row] for s, n, k, row in zip(static, context, candidates, rows, strict=True)]
    sequences = torch.tensor(table, dtype=torch.int32).view(-1, 7).to(device)
    return Segments(sequences, max(context, default=0), max(candidates, default=0))


def by_head(segments: Segments, num_heads: int) -> Segments:
    """For q, k and v that lie as [B, H, M, D]: each head is a sequence of its own, of one head and B H M rows.

    ``segments`` counts rows as in [B, M], every sequence having M of them.
    """
    batch = segments.sequences.shape[0]
    length = segments.padded_context + segments.padded_candidates
    head = torch.arange(num_heads, device=segments.sequences.device)
    # Sequence b begins at row b M of its own head, and at (b H + h) M of all.
    index = torch.arange(batch, device=segments.sequences.device)
    shift = (index * (num_heads - 1))[:, None] * length + head * length
    sequences = segments.sequences.repeat_interleave(num_heads, dim=0)
    sequences[:, CONTEXT_ROW:] += shift.flatten()[:, None].to(torch.int32)
    return Segments(
        sequences,
        segments.max_context,
        segments.max_candidates,
        segments.padded_context,
        segments.padded_candidates,
    )
