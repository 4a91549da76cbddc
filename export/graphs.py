"""The network as graphs to export: the reference's own modules, without what an answer does not need.

Only the last block differs from ``MTGR.trunk``. Ranking needs its output for candidates alone, retrieval for the last
context token alone; so queries, gates, output projections and rows of the attention of all other tokens are left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.last_token import LastToken
from mtgr.compat.base import ForeignModel
from mtgr.model import MTGR
from mtgr.model.hstu import HSTUBlock
from mtgr.model.mask import visible_by_order
from mtgr.schema import FIRST_ID, SLOT_COLUMN, TYPE_COLUMN, TokenType

_SMALLEST_NORM = 1e-12  # as in F.normalize


def rank_graph(model: MTGR | ForeignModel) -> nn.Module:
    """What ranks; foreign networks are exported as they are."""
    return RankGraph(model) if isinstance(model, MTGR) else model


def retrieve_graph(model: MTGR | ForeignModel, last: LastToken = "products") -> nn.Module:
    """What retrieves; foreign networks do it in one way only."""
    if not isinstance(model, MTGR):
        return ForeignRetrieveGraph(model)
    return RetrieveGraph(model) if last == "products" else PlainRetrieveGraph(model, last)


class RankGraph(nn.Module):
    """``context`` [B, n, W], ``candidates`` [B, k, W] -> ``task_scores`` [B, k, T]."""

    def __init__(self, model: MTGR) -> None:
        super().__init__()
        self.model = model
        self.last = LastBlock(model.blocks[-1])

    def forward(self, context: Tensor, candidates: Tensor) -> Tensor:
        """As ``MTGR.forward``."""
        model, n = self.model, context.shape[1]
        slots = torch.cat([context, candidates], dim=1)[..., SLOT_COLUMN]
        visible = visible_by_order(
            slots, context[..., TYPE_COLUMN], context[..., SLOT_COLUMN], model.config.static_attention
        )
        x, types, mask, biases, self_biases = model.trunk_inputs(context, candidates, visible)
        for block, bias, self_bias in zip(list(model.blocks)[:-1], biases, self_biases, strict=False):
            x = block(x, types, mask, bias, self_bias, n)
        bias = biases[-1]
        y = self.last(
            x[:, :n], types[:, :n], x[:, n:], types[:, n:], mask[:, :, n:],
            None if bias is None else bias[:, :, n:], self_biases[-1], own=True,
        )  # fmt: skip
        return model.task_logits(model.output_norm(y, types[:, n:]), candidates).sigmoid()


class RetrieveGraph(nn.Module):
    """``context`` [B, n, W] -> ``items`` [B, m], ``scores`` [B, m]."""

    def __init__(self, model: MTGR) -> None:
        super().__init__()
        self.model = model
        self.last = LastBlock(model.blocks[-1])

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """As ``MTGR.retrieve``; TopK breaks ties by index, as the reference's stable sort does."""
        model = self.model
        x, types, mask, bias, is_last = _before_last_block(model, context)
        last = _LastRow(is_last)
        y = self.last(
            x, types, last.of(x), last.of_types(types), last.of_pairs(mask),
            None if bias is None else last.of_pairs(bias), None, own=False,
        )  # fmt: skip
        logits = model.next_item_logits_of(model.output_norm(y, last.of_types(types))[:, 0])
        return _best(logits, model.retrieve_count)


class PlainRetrieveGraph(nn.Module):
    """As ``RetrieveGraph``, without an attention product of one query, and with the catalogue's vectors as constants.

    TensorRT 8.6 gives up at products with one query (``export.tensorrt_ways``). It also
    computes the vectors of all items anew in every request, if the graph tells how.
    """

    def __init__(self, model: MTGR, last: LastToken) -> None:
        super().__init__()
        self.model = model
        self.last = LastBlock(model.blocks[-1], sums=True) if last == "sums" else None
        self.company = last == "company"
        with torch.no_grad():
            self.register_buffer(
                "units", model.next_item_head.unit(model.embedding.item.all()[FIRST_ID:]), persistent=False
            )

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """As ``MTGR.retrieve``."""
        model = self.model
        if self.company:
            return self._best(
                _LastRow(_is_last(context, self.units.dtype)).of(self._query(_in_company(model, context)))
            )
        x, types, mask, bias, is_last = _before_last_block(model, context)
        last = _LastRow(is_last)
        if self.last is None:
            rows = model.blocks[-1](x, types, mask, bias, None, context.shape[1])
            query = last.of(self._query(model.output_norm(rows, types)))
        else:
            row_types = last.of_types(types)
            row = self.last(
                x, types, last.of(x), row_types, last.of_pairs(mask),
                None if bias is None else last.of_pairs(bias), None, own=False,
            )  # fmt: skip
            query = self._query(model.output_norm(row, row_types))
        return self._best(query)

    def _best(self, query: Tensor) -> tuple[Tensor, Tensor]:
        head = self.model.next_item_head
        logits = head.logits(query.squeeze(1), self.units, head.bias[FIRST_ID:]).float()
        return _best(logits, self.model.retrieve_count)

    def _query(self, x: Tensor) -> Tensor:
        """Unit vectors [B, q, d] by products, sums and a root, in fp32: squares of fp16 would overflow."""
        query = self.model.next_item_head.project(x).float()
        norm = (query * query).sum(dim=-1, keepdim=True).sqrt().clamp(min=_SMALLEST_NORM)
        return (query / norm).to(x.dtype)


class _LastRow:
    """Picks the row of the last context token, by sums: no gather with a computed index.

    Args:
        is_last: Float [B, n], 1 at that token.
    """

    def __init__(self, is_last: Tensor) -> None:
        self._is_last = is_last

    def of(self, x: Tensor) -> Tensor:
        """Float [B, 1, d] of [B, n, d]."""
        return (x * self._is_last.unsqueeze(-1)).sum(dim=1, keepdim=True)

    def of_types(self, types: Tensor) -> Tensor:
        """INT [B, 1] of [B, n]."""
        return (types * self._is_last.to(types.dtype)).sum(dim=1, keepdim=True)

    def of_pairs(self, pairs: Tensor) -> Tensor:
        """Float [B, h, 1, n] of [B, h, n, n]."""
        return (pairs * self._is_last[:, None, :, None]).sum(dim=2, keepdim=True)


def _before_last_block(model: MTGR, context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Tokens [B, n, d] before the last block, their types, its mask and bias, and which token is the last."""
    slots, types = context[..., SLOT_COLUMN], context[..., TYPE_COLUMN]
    visible = visible_by_order(slots, types, slots, model.config.static_attention)
    x, _, mask, biases, self_biases = model.trunk_inputs(context, context[:, :0], visible)
    for block, bias, self_bias in zip(list(model.blocks)[:-1], biases, self_biases, strict=False):
        x = block(x, types, mask, bias, self_bias, context.shape[1])
    return x, types, mask, biases[-1], _is_last(context, x.dtype)


def _is_last(context: Tensor, dtype: torch.dtype) -> Tensor:
    """Float [B, n], 1 at the last token of each user."""
    slots, types = context[..., SLOT_COLUMN], context[..., TYPE_COLUMN]
    return ((types != TokenType.PADDING) & (slots == slots.amax(dim=1, keepdim=True))).to(dtype)


def _in_company(model: MTGR, context: Tensor) -> Tensor:
    """Normalised outputs of the context, float [B, n, d], from ranking's network with two blank candidates."""
    blank = context[:, :1] * 0
    candidates = torch.cat([blank, blank], dim=1)
    slots = torch.cat([context, candidates], dim=1)[..., SLOT_COLUMN]
    visible = visible_by_order(
        slots, context[..., TYPE_COLUMN], context[..., SLOT_COLUMN], model.config.static_attention
    )
    return model.trunk(context, candidates, visible)[:, : context.shape[1]]


def _best(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """INT32 [B, m] items and FP32 [B, m] scores."""
    scores, items = logits.topk(count, dim=-1)
    return items.to(torch.int32) + FIRST_ID, scores


class ForeignRetrieveGraph(nn.Module):
    """``context`` [B, n, W] -> ``items`` [B, m], ``scores`` [B, m] of a foreign network."""

    def __init__(self, model: ForeignModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """As ``ForeignModel.retrieve``; TopK breaks ties by index, as its stable sort does."""
        return _best(self.model.next_item_logits(context), self.model.retrieve_count)


class LastBlock(nn.Module):
    """A block's output for some tokens only; its equations are ``HSTUBlock``'s.

    Args:
        block: The block.
        sums: Whether attention is written without matrix products; for a single token.
    """

    def __init__(self, block: HSTUBlock, sums: bool = False) -> None:
        super().__init__()
        self.block = block
        self.attend = _attend_by_sums if sums else block.attend

    def forward(
        self,
        context: Tensor,
        context_types: Tensor,
        x: Tensor,
        types: Tensor,
        visible: Tensor,
        bias: Tensor | None,
        self_bias: Tensor | None,
        own: bool,
    ) -> Tensor:
        """Apply the block.

        Args:
            context: Float [B, n, d], which keys and values come from.
            context_types: INT [B, n].
            x: Float [B, q, d], the tokens whose output is needed.
            types: INT [B, q].
            visible: Float [B, 1, q, n].
            bias: Float [B, 1, q, n] or None.
            self_bias: Scalar or None.
            own: Whether these tokens are candidates, which also see themselves.

        Returns:
            Float [B, q, d].
        """
        block = self.block
        k, v = self._keys_and_values(context, context_types)
        u, own_v, q, own_k = block.project(x, types)
        attended = self.attend(q, k, v, visible, bias)
        if own:
            attended = attended + block.attend_self(q, own_k, own_v, self_bias)
        return block.finish(x, attended, u, types)

    def _keys_and_values(self, x: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        block = self.block
        value, query = block.split[1], block.split[2]
        # The merged product has its rows in the order U, V, Q, K. Slices of constants are folded at load.
        weight = torch.cat([block.uvqk.weight[value : 2 * value], block.uvqk.weight[2 * value + query :]])
        bias = torch.cat([block.uvqk.bias[value : 2 * value], block.uvqk.bias[2 * value + query :]])
        v, k = F.silu(F.linear(block.input_norm(x, types), weight, bias)).split(
            [block.split[1], block.split[3]], dim=-1
        )
        return block.by_head(k), block.by_head(v)


def _attend_by_sums(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None) -> Tensor:
    """``HSTUBlock.attend`` for one query: Q [B, h, 1, dqk], output [B, h, 1, dv]."""
    logits = (q * k).sum(dim=-1, keepdim=True)
    if bias is not None:
        logits = logits + bias.transpose(-1, -2)
    weights = F.silu(logits) * visible.transpose(-1, -2)
    return (weights * v).sum(dim=2, keepdim=True)
