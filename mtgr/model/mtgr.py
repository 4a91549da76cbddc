"""MTGR (arXiv 2505.18654): rank candidates and retrieve items on one user context."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtgr.config import ModelConfig
from mtgr.errors import ConfigurationError
from mtgr.model.bias import RelativeBias
from mtgr.model.embedding import TokenEmbedding
from mtgr.model.heads import MMoEHeads, NextItemHead, SharedBottomHeads, WideTerms
from mtgr.model.hstu import HSTUBlock
from mtgr.model.mask import visible_by_order, visible_by_time
from mtgr.model.norm import GroupLayerNorm
from mtgr.schema import ABSENT, FIRST_COLUMN, FIRST_ID, SLOT_COLUMN, TIME, TYPE_COLUMN, Schema, TokenType

Biases = Sequence[Tensor | None]


class MTGR(nn.Module):
    """The network.

    Shapes below: B users, n context tokens, k candidates, W columns, d width, T tasks, I items, m retrieved items.
    Context and candidates may be padded on the right with rows of type 0, without any effect on the rest.

    Args:
        config: Hyper-parameters.
        schema: Meaning and sizes of the columns.
        num_features: Static side features per item (``ItemCatalog.features``).

    Raises:
        ConfigurationError: If the schema's contexts are longer than the position table.
    """

    catalogue: Tensor | None

    def __init__(self, config: ModelConfig, schema: Schema, num_features: int) -> None:
        super().__init__()
        if schema.max_context >= config.max_positions:
            raise ConfigurationError(
                f"max_positions is {config.max_positions}, but contexts of this schema reach {schema.max_context} "
                "tokens and candidates stand one further; raise max_positions or lower max_history."
            )
        self.config = config
        self.time_column = schema.time_column
        self.embedding = TokenEmbedding(config, schema, num_features)
        self.blocks = nn.ModuleList(HSTUBlock(config) for _ in range(config.num_layers))
        self.relative_bias = (
            RelativeBias(config.num_layers, config.max_positions, config.time_buckets) if config.relative_bias else None
        )
        self.output_norm = GroupLayerNorm(config.d_model, config.norm_epsilon)
        heads = MMoEHeads if config.heads == "mmoe" else SharedBottomHeads
        self.task_heads = heads(config, len(schema.tasks))
        self.wide_terms = WideTerms(
            [
                (index, schema.column_size(name))
                for index, name in enumerate(schema.candidate_columns, start=FIRST_COLUMN)
                if name != TIME
            ],
            len(schema.tasks),
        )
        self.next_item_head = NextItemHead(config, schema.num_items)
        self.retrieve_count = min(config.retrieve_count, schema.num_items - FIRST_ID)
        self.register_buffer("catalogue", None, persistent=False)

    def forward(self, context: Tensor, candidates: Tensor) -> Tensor:
        """Score candidates.

        Args:
            context: INT32 [B, n, W].
            candidates: INT32 [B, k, W].

        Returns:
            FP32 [B, k, T], probabilities.
        """
        visible = visible_by_order(
            _slots(torch.cat([context, candidates], dim=1)),
            _types(context),
            _slots(context),
            self.config.static_attention,
        )
        x = self.trunk(context, candidates, visible)
        return self.task_logits(x[:, context.shape[1] :], candidates).sigmoid()

    def retrieve(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The items most likely to come next.

        Args:
            context: INT32 [B, n, W], at least one valid token each.

        Returns:
            INT32 [B, m] item ids, best first, ties by id, none of them reserved; FP32 [B, m] logits.
        """
        return self.best_items(self.next_item_logits(context))

    def best_items(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """INT32 [B, m] item ids and their FP32 [B, m] logits out of FP32 [B, I - 2], ordered as ``retrieve`` says."""
        scores, items = logits.sort(dim=-1, descending=True, stable=True)
        return items[:, : self.retrieve_count].to(torch.int32) + FIRST_ID, scores[:, : self.retrieve_count]

    def next_item_logits(self, context: Tensor) -> Tensor:
        """FP32 [B, I - 2]: logits of all items but the reserved ones, after the last context token."""
        slots, types = _slots(context), _types(context)
        visible = visible_by_order(slots, types, slots, self.config.static_attention)
        x = self.trunk(context, context[:, :0], visible)
        valid = types != TokenType.PADDING
        # Slots ascend, so the last token is the one whose slot is the highest: no length input, no gather.
        last = valid & (slots == slots.amax(dim=1, keepdim=True))
        return self.next_item_logits_of((x * last.unsqueeze(-1)).sum(dim=1))

    def next_item_logits_of(self, x: Tensor) -> Tensor:
        """FP32 [B, I - 2] of trunk outputs, float [B, d]."""
        head = self.next_item_head
        units = self._units() if self.catalogue is None else self.catalogue
        logits: Tensor = head.logits(head.query(x), units, head.bias[FIRST_ID:])
        return logits.float()

    def keep_constants(self) -> None:
        """Compute once what weights alone decide: all items' unit vectors, and the vectors of profile values.

        Weights must not change any more.
        """
        with torch.no_grad():
            self.catalogue = self._units()
        self.embedding.keep_profiles()

    def _units(self) -> Tensor:
        return self.next_item_head.unit(self.embedding.item.all()[FIRST_ID:])

    def training_outputs(
        self, context: Tensor, candidates: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs for user-level samples, in which candidates of many moments share one context.

        Args:
            context: INT32 [B, n, W].
            candidates: INT32 [B, k, W]; each sees real-time tokens strictly earlier than itself.
            hidden: BOOL [B, k, W], ids that the trunk is to find absent, or None. The wide terms see them: they keep a
                column's own part of a logit, and the trunk does not learn to lean on any one column.

        Returns:
            FP32 [B, k, T] task logits, and float [B, n, item_dim] unit vectors for the next-item loss.
        """
        slots, types = _slots(context), _types(context)
        visible = torch.cat(
            [
                visible_by_order(slots, types, slots, self.config.static_attention),
                visible_by_time(candidates[..., self.time_column], types, context[..., self.time_column]),
            ],
            dim=1,
        )
        n = context.shape[1]
        shown = candidates if hidden is None else candidates.masked_fill(hidden, ABSENT)
        x = self.trunk(context, shown, visible)
        return self.task_logits(x[:, n:], candidates), self.next_item_head.query(x[:, :n])

    def task_logits(self, x: Tensor, candidates: Tensor) -> Tensor:
        """FP32 [B, k, T] of the trunk's outputs, float [B, k, d], for candidate rows INT32 [B, k, W]."""
        logits: Tensor = self.task_heads(x) + self.wide_terms(candidates)
        return logits.float()

    def trunk(self, context: Tensor, candidates: Tensor, visible: Tensor) -> Tensor:
        """Embeddings and blocks.

        Args:
            context: INT32 [B, n, W].
            candidates: INT32 [B, k, W].
            visible: BOOL [B, n + k, n], which context tokens each token sees.

        Returns:
            Normalised float [B, n + k, d].
        """
        x, types, mask, biases, self_biases = self.trunk_inputs(context, candidates, visible)
        for block, bias, self_bias in zip(self.blocks, biases, self_biases, strict=True):
            x = block(x, types, mask, bias, self_bias, context.shape[1])
        normal: Tensor = self.output_norm(x, types)
        return normal

    def trunk_inputs(
        self, context: Tensor, candidates: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Biases, Biases]:
        """What the blocks take; arguments as ``trunk``'s.

        Returns:
            Embedded tokens, float [B, n + k, d]; their types, INT [B, n + k]; the mask, float [B, 1, n + k, n];
            relative biases and biases of a token to itself, one or None per layer.
        """
        rows = torch.cat([context, candidates], dim=1)
        # A candidate comes right after the context tokens it sees; in serving these are all of them.
        positions = visible[:, context.shape[1] :].sum(dim=-1)
        x = torch.cat([self.embedding.context(context), self.embedding.candidates(candidates, positions)], dim=1)
        biases, self_biases = self._biases(context, rows, positions)
        return x, _types(rows), visible.unsqueeze(1).to(x.dtype), biases, self_biases

    def _biases(self, context: Tensor, rows: Tensor, candidate_positions: Tensor) -> tuple[Biases, Biases]:
        if self.relative_bias is None:
            return [None] * self.config.num_layers, [None] * self.config.num_layers
        positions = torch.cat([_slots(context), candidate_positions.to(torch.int32)], dim=1)
        times = rows[..., self.time_column]
        bias = self.relative_bias(positions, _slots(context), times, context[..., self.time_column])
        dtype = self.output_norm.gain.dtype
        return [layer.to(dtype) for layer in bias], self.relative_bias.self_bias()


def _types(rows: Tensor) -> Tensor:
    return rows[..., TYPE_COLUMN]


def _slots(rows: Tensor) -> Tensor:
    return rows[..., SLOT_COLUMN]
