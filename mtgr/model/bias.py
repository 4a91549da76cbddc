"""Relative attention bias by position and log time (HSTU, arXiv 2402.17152, section 3.2); MTGR itself has none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Meta's released model buckets |dt| by log(max(|dt|, 1)) / 0.301, about one bucket for each factor of 1.35.
_LOG_STEP = 0.301


class RelativeBias(nn.Module):
    """bias[l] = position_table[clip(p_query - p_key)][l] + time_table[bucket(|t_query - t_key|)][l].

    The tables of all layers stand side by side, so that one gather serves every layer.
    """

    def __init__(self, num_layers: int, max_positions: int, time_buckets: int) -> None:
        super().__init__()
        self.max_positions = max_positions
        self.time_buckets = time_buckets
        self.position_table = nn.Parameter(torch.empty(2 * max_positions - 1, num_layers))
        self.time_table = nn.Parameter(torch.empty(time_buckets + 1, num_layers))
        nn.init.normal_(self.position_table, std=0.02)
        nn.init.normal_(self.time_table, std=0.02)

    def forward(
        self, query_positions: Tensor, key_positions: Tensor, query_times: Tensor, key_times: Tensor
    ) -> list[Tensor]:
        """Bias of every layer.

        Args:
            query_positions: INT [B, q].
            key_positions: INT [B, n].
            query_times: INT [B, q], seconds; 0 for profile tokens.
            key_times: INT [B, n], seconds.

        Returns:
            One float [B, 1, q, n] per layer, to be added to the logits of all heads.
        """
        limit = self.max_positions - 1
        distance = (query_positions[:, :, None] - key_positions[:, None, :]).clamp(-limit, limit) + limit
        bias = F.embedding(distance, self.position_table)
        bias = bias + F.embedding(self.time_bucket(query_times[:, :, None] - key_times[:, None, :]), self.time_table)
        return [layer.unsqueeze(1) for layer in bias.unbind(-1)]

    def self_bias(self) -> list[Tensor]:
        """The bias of a token to itself, one scalar tensor per layer."""
        return list((self.position_table[self.max_positions - 1] + self.time_table[0]).unbind(0))

    def time_bucket(self, difference: Tensor) -> Tensor:
        """INT64 bucket of a time difference in seconds; the logarithm is taken in fp32 in every precision."""
        seconds = difference.abs().to(torch.float32).clamp(min=1.0)
        return (torch.log(seconds) * (1.0 / _LOG_STEP)).to(torch.int64).clamp(max=self.time_buckets)
