"""From INT32 rows to vectors: per segment, the columns' embeddings are concatenated and put through an MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtgr.config import Modality, ModelConfig
from mtgr.model.modalities import ItemModalities
from mtgr.schema import FIRST_COLUMN, SLOT_COLUMN, TIME, TYPE_COLUMN, Schema, TokenType


class ItemEmbedding(nn.Module):
    """An item's vector: a learned embedding plus projections of static side features, which live in the model."""

    features: Tensor

    def __init__(self, num_items: int, num_features: int, width: int, modalities: Sequence[Modality] = ()) -> None:
        super().__init__()
        self.table = nn.Embedding(num_items, width)
        self.project = nn.Linear(num_features, width, bias=False)
        nn.init.normal_(self.table.weight, std=0.05)
        self.register_buffer("features", torch.zeros(num_items, num_features))
        self.modalities = ItemModalities(modalities, num_items, width) if modalities else None

    def forward(self, items: Tensor) -> Tensor:
        """Float [..., item_dim] of INT [...] item ids."""
        vectors: Tensor = self.table(items) + self.project(F.embedding(items, self.features))
        return vectors if self.modalities is None else vectors + self.modalities(items)

    def all(self) -> Tensor:
        """Vectors of the whole catalogue, float [I, item_dim]."""
        vectors: Tensor = self.table.weight + self.project(self.features)
        return vectors if self.modalities is None else vectors + self.modalities.all()


class TokenEmbedding(nn.Module):
    """Embeds context and candidate rows.

    History and real-time rows are the same kind of thing and share one MLP; GroupLN and the mask tell them apart.
    Columns of the same name share one table.
    """

    profiles: Tensor | None

    def __init__(self, config: ModelConfig, schema: Schema, num_features: int) -> None:
        super().__init__()
        self.register_buffer("profiles", None, persistent=False)
        self.event_columns = _embedded(schema.event_columns)
        self.candidate_columns = _embedded(schema.candidate_columns)
        self.item = ItemEmbedding(schema.num_items, num_features, config.item_dim, config.modalities)
        names = {**self.event_columns, **self.candidate_columns}
        tables = {name: nn.Embedding(schema.column_size(name), config.feature_dim) for name in names}
        self.tables = nn.ModuleDict(tables)
        self.profile_table = nn.Embedding(schema.profile_size, config.feature_dim)
        self.position_table = nn.Embedding(config.max_positions, config.d_model)
        for table in (*tables.values(), self.profile_table, self.position_table):
            nn.init.normal_(table.weight, std=0.05)

        self.dropout = nn.Dropout(config.embedding_dropout)

        def mlp(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, config.d_model), nn.SiLU(), nn.Linear(config.d_model, config.d_model))

        self.profile_mlp = mlp(config.feature_dim)
        self.event_mlp = mlp(config.item_dim + config.feature_dim * len(self.event_columns))
        self.candidate_mlp = mlp(config.item_dim + config.feature_dim * len(self.candidate_columns))

    def context(self, rows: Tensor) -> Tensor:
        """Embed context rows.

        Args:
            rows: INT32 [B, n, W].

        Returns:
            Float [B, n, d]; a token's position is its slot.
        """
        is_profile = rows[..., TYPE_COLUMN] == TokenType.PROFILE
        first = rows[..., FIRST_COLUMN]
        # The first column names a profile value or an item; each table is asked for id 0 where it does not apply.
        values = torch.where(is_profile, first, 0)
        if self.profiles is None or self.training:
            profile = self.profile_mlp(self.profile_table(values))
        else:
            profile = F.embedding(values, self.profiles)
        events = self._concatenate(torch.where(is_profile, 0, first), rows, self.event_columns)
        x = torch.where(is_profile.unsqueeze(-1), profile, self.event_mlp(events))
        embedded: Tensor = self.dropout(x + self.position_table(rows[..., SLOT_COLUMN]))
        return embedded

    def keep_profiles(self) -> None:
        """Put every profile value through its MLP once instead of every token's; weights must not change any more."""
        with torch.no_grad():
            self.profiles = self.profile_mlp(self.profile_table.weight)

    def candidates(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Embed candidate rows.

        Args:
            rows: INT32 [B, k, W].
            positions: INT [B, k], logical positions.

        Returns:
            Float [B, k, d].
        """
        x = self.dropout(self._concatenate(rows[..., FIRST_COLUMN], rows, self.candidate_columns))
        embedded: Tensor = self.dropout(self.candidate_mlp(x) + self.position_table(positions))
        return embedded

    def _concatenate(self, items: Tensor, rows: Tensor, columns: dict[str, int]) -> Tensor:
        parts = [self.item(items)]
        parts += [self.tables[name](rows[..., column]) for name, column in columns.items()]
        return torch.cat(parts, dim=-1)


def _embedded(columns: tuple[str, ...]) -> dict[str, int]:
    """Column index by name, without the item (it has an embedding of its own) and the time (not embedded)."""
    return {name: index for index, name in enumerate(columns, start=FIRST_COLUMN) if name not in ("item", TIME)}
