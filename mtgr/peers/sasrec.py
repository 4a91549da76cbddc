"""SASRec (Kang and McAuley, ICDM 2018, arXiv 1808.09781) on this project's tokens.

    Q, K, V = LN(X) W_q, X W_k, X W_v                     equation 3, pre-norm as in the authors' code
    H = LN(X) + softmax(Q K^T / sqrt(d_head) + mask) V    equations 2 and 4
    Y = H' + W_2 ReLU(W_1 H' + b_1) + b_2, H' = LN(H)     equation 5

Tokens, positions, losses and heads are those of the other models, so that only the block differs. A candidate attends
to the context and to itself, as a token appended to the sequence would.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtgr.config import ModelConfig
from mtgr.model import MTGR
from mtgr.schema import Schema

_SASREC_EPSILON = 1e-8  # of the authors' layer norms


class SASRecBlock(nn.Module):
    """Softmax attention and a point-wise feed-forward network; takes what an HSTU block takes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(config.d_model, eps=_SASREC_EPSILON)
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key_value = nn.Linear(config.d_model, 2 * config.d_model)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, eps=_SASREC_EPSILON)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.d_model, config.d_model),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.d_model, config.d_model),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, types: Tensor, visible: Tensor, bias: Tensor | None, self_bias: Tensor | None, n: int
    ) -> Tensor:
        """Apply the block.

        Args:
            x: Float [B, n + k, d], n context tokens and k candidates.
            types: INT [B, n + k], token types; not used.
            visible: Float [B, 1, n + k, n], 1 where a token sees a context token, else 0.
            bias: Not used: positions are in the embeddings.
            self_bias: Not used.
            n: Number of context tokens.

        Returns:
            Float [B, n + k, d].
        """
        normal = self.attention_norm(x)
        q = self._by_head(self.query(normal)) * (x.shape[-1] // self.num_heads) ** -0.5
        k, v = (self._by_head(part) for part in self.key_value(x).chunk(2, dim=-1))
        # One more column for a candidate's own key; context tokens find theirs among the visible ones. A row of
        # padding sees nothing, so every row but a candidate's must keep a finite logit.
        own = (q * k).sum(dim=-1, keepdim=True)
        logits = torch.cat([q @ k[:, :, :n].transpose(-1, -2), own], dim=-1)
        is_candidate = (torch.arange(x.shape[1], device=x.device) >= n)[None, None, :, None].expand(len(x), 1, -1, 1)
        sees = torch.cat([visible > 0, is_candidate], dim=-1)
        weights = logits.masked_fill(~sees, torch.finfo(logits.dtype).min).softmax(dim=-1)
        attended = weights[..., :n] @ v[:, :, :n] + weights[..., n:] * is_candidate * v
        merged = attended.transpose(1, 2).flatten(2)
        hidden = self.feed_forward_norm(normal + self.dropout(merged))
        result: Tensor = hidden + self.dropout(self.feed_forward(hidden))
        return result

    def _by_head(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, x.shape[-1] // self.num_heads))
        return heads.transpose(1, 2)


class SASRec(MTGR):
    """SASRec with a ranking head: MTGR's tokens and heads around softmax blocks.

    Args:
        config: Hyper-parameters; ``static_attention`` must be ``causal`` and there is no relative bias.
        schema: Meaning and sizes of the columns.
        num_features: Static side features per item.
    """

    def __init__(self, config: ModelConfig, schema: Schema, num_features: int) -> None:
        super().__init__(config, schema, num_features)
        self.blocks = nn.ModuleList(SASRecBlock(config) for _ in range(config.num_layers))
