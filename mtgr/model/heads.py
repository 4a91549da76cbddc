"""Heads: multi-task towers on candidate outputs, and the next-item head on the last context token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtgr.config import ModelConfig


class WideTerms(nn.Module):
    """A term per task for each id in a candidate's columns: the wide half of Wide & Deep (Cheng et al., 2016).

    What an item or a bucket means by itself is learned here with one number, and the network is left with what depends
    on the context.

    Args:
        columns: Column index and number of ids of each column used.
        num_tasks: Tasks, T.
    """

    offsets: Tensor

    def __init__(self, columns: Sequence[tuple[int, int]], num_tasks: int) -> None:
        super().__init__()
        self.columns = [index for index, _ in columns]
        self.sizes = [size for _, size in columns]
        self.table = nn.Embedding(sum(self.sizes), num_tasks)
        nn.init.zeros_(self.table.weight)
        self.place(torch.get_default_device())

    def place(self, device: torch.device) -> None:
        """Say where each column begins: all share one table, so that a single gather serves them."""
        starts = torch.tensor([0, *self.sizes[:-1]], device=device).cumsum(0).to(torch.int32)
        self.register_buffer("offsets", starts, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Logits [..., T] of INT32 rows [..., W]."""
        ids = torch.stack([rows[..., index] for index in self.columns], dim=-1) + self.offsets
        logits: Tensor = self.table(ids).sum(dim=-2)
        return logits


class SharedBottomHeads(nn.Module):
    """One shared hidden layer, one linear tower per task."""

    def __init__(self, config: ModelConfig, num_tasks: int) -> None:
        super().__init__()
        self.bottom = nn.Linear(config.d_model, config.head_dim)
        self.towers = nn.Linear(config.head_dim, num_tasks)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., T] of float [..., d]."""
        return self.finish(x, F.silu(self.widest(x)))

    @property
    def widest(self) -> nn.Linear:
        """The layer that nearly all of the products are in."""
        return self.bottom

    def finish(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Logits [..., T] of float [..., d], its result by ``widest`` and SiLU given."""
        logits: Tensor = self.towers(hidden)
        return logits


class MMoEHeads(nn.Module):
    """Multi-gate mixture of experts (Ma et al., KDD 2018, equations 6 and 7): each task mixes experts its own way."""

    def __init__(self, config: ModelConfig, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks, self.num_experts, self.head_dim = num_tasks, config.num_experts, config.head_dim
        self.experts = nn.Linear(config.d_model, config.num_experts * config.head_dim)
        self.gates = nn.Linear(config.d_model, num_tasks * config.num_experts)
        self.tower = nn.Parameter(torch.empty(num_tasks, config.head_dim))
        self.tower_bias = nn.Parameter(torch.zeros(num_tasks))
        nn.init.normal_(self.tower, std=config.head_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., T] of float [..., d]."""
        return self.finish(x, F.silu(self.widest(x)))

    @property
    def widest(self) -> nn.Linear:
        """The layer that nearly all of the products are in."""
        return self.experts

    def finish(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Logits [..., T] of float [..., d], its result by ``widest`` and SiLU given."""
        experts = hidden.unflatten(-1, (self.num_experts, self.head_dim))
        gates = self.gates(x).unflatten(-1, (self.num_tasks, self.num_experts)).softmax(dim=-1)
        mixed = gates @ experts  # [..., T, head_dim]
        logits: Tensor = (mixed * self.tower).sum(dim=-1) + self.tower_bias
        return logits


class NextItemHead(nn.Module):
    """Cosine similarity of a token's output to every item, over a temperature."""

    def __init__(self, config: ModelConfig, num_items: int) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.bias = nn.Parameter(torch.zeros(num_items))
        self.project = nn.Linear(config.d_model, config.item_dim)

    def query(self, x: Tensor) -> Tensor:
        """Unit vectors [..., item_dim] of float [..., d]."""
        return F.normalize(self.project(x), dim=-1)

    def forward(self, query: Tensor, items: Tensor, bias: Tensor) -> Tensor:
        """Logits.

        Args:
            query: Float [..., item_dim], from ``query``.
            items: Float [I, item_dim], item vectors.
            bias: Float [I], the items' terms of ``bias``.

        Returns:
            Float [..., I].
        """
        return self.logits(query, self.unit(items), bias)

    def unit(self, items: Tensor) -> Tensor:
        """Unit vectors of item vectors, float [I, item_dim]."""
        return F.normalize(items, dim=-1)

    def logits(self, query: Tensor, units: Tensor, bias: Tensor) -> Tensor:
        """As ``forward``, with items from ``unit``."""
        logits: Tensor = query @ units.transpose(-1, -2) / self.temperature + bias
        return logits
