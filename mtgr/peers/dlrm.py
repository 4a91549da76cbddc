"""A DLRM-style ranker (Naumov et al., 2019, arXiv 1906.00091): pooled history, cross features, dot interactions.

    e_1 .. e_F = embeddings of the candidate's columns, the item, the profile and the pooled history, one width each
    logit_t    = MLP_t(e_1, .., e_F, e_i . e_j for i < j)

The history has no order: the mean of the events before the candidate, and of the latest ones. There are no dense
inputs, because every number is bucketed into an id. A two-tower head on the same history gives it a next item
(Covington et al., RecSys 2016), so that it can be compared in retrieval too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtgr.config import ModelConfig
from mtgr.model.embedding import TokenEmbedding
from mtgr.model.heads import NextItemHead, WideTerms
from mtgr.model.mask import visible_by_order, visible_by_time
from mtgr.schema import ABSENT, FIRST_COLUMN, FIRST_ID, SLOT_COLUMN, TIME, TYPE_COLUMN, Schema, TokenType

_LATEST = 5  # events that the second pool holds


class DLRM(nn.Module):
    """The ranker; shapes as in ``MTGR``.

    Args:
        config: Hyper-parameters; of the sizes ``d_model``, ``item_dim``, ``feature_dim`` and ``head_dim`` count.
        schema: Meaning and sizes of the columns.
        num_features: Static side features per item.
    """

    def __init__(self, config: ModelConfig, schema: Schema, num_features: int) -> None:
        super().__init__()
        self.config = config
        self.time_column = schema.time_column
        self.embedding = TokenEmbedding(config, schema, num_features)
        width = config.d_model
        columns = self.embedding.candidate_columns
        self.item_field = nn.Linear(config.item_dim, width)
        self.column_fields = nn.ModuleList(nn.Linear(config.feature_dim, width) for _ in columns)
        fields = 1 + len(columns) + 3
        self.register_buffer("pairs", torch.triu_indices(fields, fields, offset=1), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.top = nn.Sequential(
            nn.Linear(fields * width + fields * (fields - 1) // 2, 4 * config.head_dim),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(4 * config.head_dim, config.head_dim),
            nn.ReLU(),
            nn.Linear(config.head_dim, len(schema.tasks)),
        )
        self.wide_terms = WideTerms(
            [
                (index, schema.column_size(name))
                for index, name in enumerate(schema.candidate_columns, start=FIRST_COLUMN)
                if name != TIME
            ],
            len(schema.tasks),
        )
        self.user_tower = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU(), nn.Dropout(config.dropout))
        self.next_item_head = NextItemHead(config, schema.num_items)

    pairs: Tensor

    def training_outputs(
        self, context: Tensor, candidates: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Task logits FP32 [B, k, T] and queries [B, n, item_dim]; arguments as ``MTGR.training_outputs``."""
        types, slots = context[..., TYPE_COLUMN], context[..., SLOT_COLUMN]
        tokens = self.embedding.context(context)
        seen = visible_by_time(candidates[..., self.time_column], types, context[..., self.time_column])
        shown = candidates if hidden is None else candidates.masked_fill(hidden, ABSENT)
        logits = self.task_logits(tokens, types, seen, shown, candidates)
        queries = self._queries(tokens, types, visible_by_order(slots, types, slots, "causal"))
        return logits, queries

    def next_item_logits(self, context: Tensor) -> Tensor:
        """FP32 [B, I - 2]: logits of all items but the reserved ones, after the last context token."""
        types, slots = context[..., TYPE_COLUMN], context[..., SLOT_COLUMN]
        last = slots.masked_fill(types == TokenType.PADDING, -1).amax(dim=1, keepdim=True)
        visible = visible_by_order(last, types, slots, "causal")
        query = self._queries(self.embedding.context(context), types, visible)[:, 0]
        logits: Tensor = self.next_item_head(
            query, self.embedding.item.all()[FIRST_ID:], self.next_item_head.bias[FIRST_ID:]
        )
        return logits.float()

    def task_logits(self, tokens: Tensor, types: Tensor, seen: Tensor, shown: Tensor, candidates: Tensor) -> Tensor:
        """FP32 [B, k, T].

        Args:
            tokens: Float [B, n, d], embedded context.
            types: INT [B, n], types of the context's tokens.
            seen: BOOL [B, k, n], context that each candidate may use.
            shown: INT32 [B, k, W], rows as the network sees them.
            candidates: INT32 [B, k, W], rows as the wide terms see them.
        """
        embedding = self.embedding
        fields = [self.item_field(embedding.item(shown[..., FIRST_COLUMN]))]
        for project, (name, column) in zip(self.column_fields, embedding.candidate_columns.items(), strict=True):
            fields.append(project(embedding.tables[name](shown[..., column])))
        fields += self._pools(tokens, types, seen)
        stacked = self.dropout(torch.stack(fields, dim=-2))  # [B, k, F, d]
        dots = (stacked @ stacked.transpose(-1, -2))[..., self.pairs[0], self.pairs[1]]
        deep = self.top(torch.cat([stacked.flatten(-2), dots * stacked.shape[-1] ** -0.5], dim=-1))
        logits: Tensor = deep + self.wide_terms(candidates)
        return logits.float()

    def _queries(self, tokens: Tensor, types: Tensor, visible: Tensor) -> Tensor:
        """Unit vectors [B, q, item_dim] of queries that see BOOL [B, q, n] of the context."""
        pooled = torch.cat(self._pools(tokens, types, visible), dim=-1)
        return self.next_item_head.query(self.user_tower(pooled))

    def _pools(self, tokens: Tensor, types: Tensor, visible: Tensor) -> list[Tensor]:
        """Means, each [B, q, d], of the profile, of all visible events, and of the latest of them."""
        profile = visible & (types == TokenType.PROFILE)[:, None, :]
        events = visible & ~profile
        # Tokens ascend in time: of the visible ones the latest are those with fewest visible ones behind them.
        behind = events.flip(-1).cumsum(dim=-1).flip(-1)
        return [_mean(mask.to(tokens.dtype), tokens) for mask in (profile, events, events & (behind <= _LATEST))]


def _mean(weights: Tensor, tokens: Tensor) -> Tensor:
    return (F.normalize(weights, p=1.0, dim=-1)) @ tokens
