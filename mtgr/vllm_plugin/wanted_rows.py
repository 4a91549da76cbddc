"""The embedding and the heads of a wide network on a GPU, without products for rows that nobody reads.

A captured step may not depend on how many of its tokens are candidates, so that the candidates' MLP and the heads are
given all tokens. Here they leave out tiles that hold none; and the columns' embeddings are one gather.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mtgr.engines.compiled_embedding import MergedEmbedding
from mtgr.kernels.dense_segments import Segments
from mtgr.kernels.embedding import gather_pieces, place_tokens
from mtgr.kernels.rows_linear import rows_linear
from mtgr.model.embedding import TokenEmbedding
from mtgr.model.mtgr import MTGR
from mtgr.schema import SLOT_COLUMN

# Below this width cuBLAS takes next to nothing for all rows: the layers' operations grow with the width's square.
_WIDE = 2048

# Estimated, not measured: in smaller steps the weights' way through memory is most of a product, and candidates are
# most of the rows. At 8b cuBLAS takes about 0.09 ms for 512 rows of 8,192 x 8,192, and so do tiles of 256 wanted ones.
_MANY = 1024

# Of the embeddings of items and columns, which stand in memory twice: a million items of 512 numbers.
_MOST_TABLE_BYTES = 1 << 30


class WantedRows:
    """The embedding and the heads of a network.

    The merged table holds the embeddings of all items and columns a second time, which is why there is a limit to it.

    Args:
        network: Its weights must not change any more, and its constants must be kept.
    """

    def __init__(self, network: MTGR) -> None:
        self._network = network
        self._merged = MergedEmbedding(network.embedding)
        nobody = torch.zeros(1, 7, dtype=torch.int32, device=self._merged.table.device)
        self._segments = Segments(nobody, 0, 0)

    @classmethod
    def of(cls, network: MTGR) -> WantedRows | None:
        """Those of a network that it pays for: a wide one on a GPU in half precision, whose constants are kept.

        In FP32 our product would not use the tensor cores, and cuBLAS's may.
        """
        gain = network.output_norm.gain
        embedding = network.embedding
        pays = network.config.d_model >= _WIDE and gain.is_cuda and gain.dtype.itemsize == 2
        fits = sum(weight.nbytes for weight in _tables(embedding)) <= _MOST_TABLE_BYTES
        return cls(network) if pays and fits and embedding.profiles is not None else None

    def embed(self, rows: Tensor, visible: Tensor, is_candidate: Tensor) -> Tensor:
        """What ``TokenEmbedding`` makes of a step's tokens.

        Args:
            rows: INT32 [T, W].
            visible: INT32 [T], how many leading tokens of the sequence each sees: a candidate's position.
            is_candidate: BOOL [T].

        Returns:
            Float [T, d].
        """
        merged = self._merged
        # Each embedding is shown padding where the other's rows stand, whose ids are of other tables.
        of_events = gather_pieces(_only(rows, ~is_candidate), merged.table, merged.events)
        of_candidates = gather_pieces(_only(rows, is_candidate), merged.table, merged.candidates)
        # Events are most of the rows of a step that takes long: leaving out the others would save a tenth, and cuBLAS's
        # product was faster than tiles by a quarter (perf/results/h200-run-3/gpu-linear.txt, 768 deep).
        x = torch.where(
            is_candidate[:, None],
            _candidate_vectors(merged.candidate_mlp, of_candidates, is_candidate),
            merged.event_mlp(of_events),
        )
        # To the kernel that adds positions all tokens are one context: they say themselves where they stand.
        placed = rows.clone(memory_format=torch.contiguous_format)
        placed[:, SLOT_COLUMN] = torch.where(is_candidate, visible, rows[:, SLOT_COLUMN])
        one = placed[None]
        return place_tokens(one, one[:, :0], x, x[:0], merged.profile, merged.positions, self._segments)

    def task_logits(self, x: Tensor, rows: Tensor, is_candidate: Tensor) -> Tensor:
        """What ``MTGR.task_logits`` makes of candidates; other tokens get numbers that may be anything, NaN too.

        Args:
            x: Trunk outputs, float [T, d], contiguous.
            rows: INT32 [T, W], zeros where a token is no candidate.
            is_candidate: BOOL [T].

        Returns:
            FP32 [T, tasks].
        """
        if len(x) < _MANY:
            return self._network.task_logits(x, rows)
        heads, layer = self._network.task_heads, self._network.task_heads.widest
        hidden = rows_linear(x, layer.weight, layer.bias, is_candidate, is_silu=True)
        logits: Tensor = heads.finish(x, hidden) + self._network.wide_terms(rows)
        return logits.float()


def _tables(embedding: TokenEmbedding) -> Iterator[Tensor]:
    """What a merged table repeats."""
    yield embedding.item.table.weight
    yield from embedding.tables.parameters()


def _candidate_vectors(mlp: nn.Sequential, x: Tensor, is_candidate: Tensor) -> Tensor:
    """Float [T, d] of float [T, K]; in other rows than candidates' anything may stand."""
    if len(x) < _MANY:
        vectors: Tensor = mlp(x)
        return vectors
    for name, is_silu in (("0", True), ("2", False)):
        weight, bias = mlp.get_parameter(f"{name}.weight"), mlp.get_parameter(f"{name}.bias")
        x = rows_linear(x, weight, bias, is_candidate, is_silu=is_silu)
    return x


def _only(rows: Tensor, chosen: Tensor) -> Tensor:
    """Rows, INT32 [1, T, W], those that are not chosen zero."""
    return rows.masked_fill(~chosen[:, None], 0).contiguous()[None]
