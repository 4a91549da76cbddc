"""Token embedding with one gather: all tables stand in one, cut into pieces of a common width."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtgr.kernels.dense_segments import Segments
from mtgr.kernels.embedding import Pieces, gather_pieces, place_tokens
from mtgr.kernels.linear import linear_silu
from mtgr.model.embedding import TokenEmbedding
from mtgr.schema import FIRST_COLUMN

_ITEM = "item"


class MergedEmbedding:
    """What ``TokenEmbedding`` computes, from tables made of its weights once.

    An item's side features are projected and its parts summed beforehand, and so is the MLP of profile values, of
    which there are few: a profile token is one more gather instead of a product over all tokens.

    Args:
        embedding: The network's, whose weights must not change any more.
    """

    def __init__(self, embedding: TokenEmbedding) -> None:
        with torch.no_grad():
            items = embedding.item.all()
            device = items.device
            tables: dict[str, Tensor] = {_ITEM: items}
            for name in embedding.tables:
                tables[name] = embedding.tables.get_parameter(f"{name}.weight")
            width = math.gcd(*(table.shape[1] for table in tables.values()))
            starts: dict[str, int] = {}
            start = 0
            for name, table in tables.items():
                starts[name] = start
                start += table.numel() // width
            self.table = torch.cat([table.reshape(-1, width) for table in tables.values()])
        assert embedding.profiles is not None  # what weights alone decide was kept
        self.profile = embedding.profiles
        sizes = {name: table.shape[1] // width for name, table in tables.items()}
        self.events = _pieces(embedding.event_columns, starts, sizes, device)
        self.candidates = _pieces(embedding.candidate_columns, starts, sizes, device)
        self.positions = embedding.position_table.weight
        self.event_mlp, self.candidate_mlp = embedding.event_mlp, embedding.candidate_mlp

    def __call__(self, context: Tensor, candidates: Tensor, segments: Segments) -> Tensor:
        """Embed a batch.

        Args:
            context: INT32 [B, n, W], contiguous.
            candidates: INT32 [B, k, W], contiguous.
            segments: Of ``mtgr.kernels.embedding.segment_rows``.

        Returns:
            Float [B * (n + k), d].
        """
        of_events = _mlp(self.event_mlp, gather_pieces(context, self.table, self.events))
        of_candidates = of_events[:0]
        if candidates.shape[1]:
            of_candidates = _mlp(self.candidate_mlp, gather_pieces(candidates, self.table, self.candidates))
        return place_tokens(context, candidates, of_events, of_candidates, self.profile, self.positions, segments)


def _pieces(
    columns: Mapping[str, int], starts: Mapping[str, int], sizes: Mapping[str, int], device: torch.device
) -> Pieces:
    """Each column is read in as many pieces as its vectors have, the item's first."""
    names: dict[str, int] = {_ITEM: FIRST_COLUMN, **columns}
    index, factor, offset = [], [], []
    for name, column in names.items():
        for piece in range(sizes[name]):
            index.append(column)
            factor.append(sizes[name])
            offset.append(starts[name] + piece)
    return Pieces(*(torch.tensor(part, dtype=torch.int32, device=device) for part in (index, factor, offset)))


def _mlp(mlp: nn.Sequential, x: Tensor) -> Tensor:
    inner = linear_silu(x, mlp.get_parameter("0.weight"), mlp.get_parameter("0.bias"))
    return F.linear(inner, mlp.get_parameter("2.weight"), mlp.get_parameter("2.bias"))
