"""The network as graphs to export: the reference's own modules, without what an answer does not need.

Only the last block differs from ``MTGR.trunk``. Ranking needs its output for candidates alone, retrieval for the last
context token alone; so queries, gates, output projections and rows of the attention of all other tokens are left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtgr.compat.base import ForeignModel
from mtgr.model import MTGR
from mtgr.model.hstu import HSTUBlock
from mtgr.model.mask import visible_by_order
from mtgr.schema import FIRST_ID, SLOT_COLUMN, TYPE_COLUMN, TokenType


def rank_graph(model: MTGR | ForeignModel) -> nn.Module:
    """What ranks; foreign networks are exported as they are."""
    return RankGraph(model) if isinstance(model, MTGR) else model


def retrieve_graph(model: MTGR | ForeignModel) -> nn.Module:
    """What retrieves."""
    return RetrieveGraph(model) if isinstance(model, MTGR) else ForeignRetrieveGraph(model)


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
        slots, types = context[..., SLOT_COLUMN], context[..., TYPE_COLUMN]
        visible = visible_by_order(slots, types, slots, model.config.static_attention)
        x, _, mask, biases, self_biases = model.trunk_inputs(context, context[:, :0], visible)
        for block, bias, self_bias in zip(list(model.blocks)[:-1], biases, self_biases, strict=False):
            x = block(x, types, mask, bias, self_bias, context.shape[1])
        is_last = ((types != TokenType.PADDING) & (slots == slots.amax(dim=1, keepdim=True))).to(x.dtype)

        def at_last(rows: Tensor) -> Tensor:
            """The row of the last token, [B, h, 1, n]; no gather with a computed index."""
            return (rows * is_last[:, None, :, None]).sum(dim=2, keepdim=True)

        last_x = (x * is_last.unsqueeze(-1)).sum(dim=1, keepdim=True)
        last_types = (types * is_last.to(types.dtype)).sum(dim=1, keepdim=True)
        bias = biases[-1]
        y = self.last(
            x, types, last_x, last_types, at_last(mask), None if bias is None else at_last(bias), None, own=False
        )
        logits = model.next_item_logits_of(model.output_norm(y, last_types)[:, 0])
        scores, items = logits.topk(model.retrieve_count, dim=-1)
        return items.to(torch.int32) + FIRST_ID, scores


class ForeignRetrieveGraph(nn.Module):
    """``context`` [B, n, W] -> ``items`` [B, m], ``scores`` [B, m] of a foreign network."""

    def __init__(self, model: ForeignModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """As ``ForeignModel.retrieve``; TopK breaks ties by index, as its stable sort does."""
        scores, items = self.model.next_item_logits(context).topk(self.model.retrieve_count, dim=-1)
        return items.to(torch.int32) + FIRST_ID, scores


class LastBlock(nn.Module):
    """A block's output for some tokens only; its equations are ``HSTUBlock``'s."""

    def __init__(self, block: HSTUBlock) -> None:
        super().__init__()
        self.block = block

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
        attended = block.attend(q, k, v, visible, bias)
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
