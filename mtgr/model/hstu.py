"""The HSTU block with MTGR's GroupLN.

    X' = GroupLN(X)                                     [B, m, d]
    U, V, Q, K = SiLU(X' W + b)                         per head: U, V of dv columns, Q, K of dqk
    A = SiLU(Q K^T / sqrt(dqk) + bias), masked          [B, h, q, n]
    Y = X + GroupLN(A V / N) * U  W_o + b_o             [B, q, d]

HSTU: arXiv 2402.17152, equations 1 to 3; MTGR: arXiv 2505.18654, equations 3 to 5. The mask is applied after SiLU:
without a softmax, a masked pair simply contributes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtgr.config import ModelConfig
from mtgr.model.norm import GroupLayerNorm


class HSTUBlock(nn.Module):
    """One block over context tokens followed by candidates."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dqk = config.dqk
        self.dv = config.dv
        self.norm_length = config.attention_norm_length
        value_width, query_width = config.num_heads * config.dv, config.num_heads * config.dqk
        self.split = [value_width, value_width, query_width, query_width]
        self.input_norm = GroupLayerNorm(config.d_model, config.norm_epsilon)
        self.uvqk = nn.Linear(config.d_model, sum(self.split))
        self.output_norm = GroupLayerNorm(value_width, config.norm_epsilon)
        self.output = nn.Linear(value_width, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, types: Tensor, visible: Tensor, bias: Tensor | None, self_bias: Tensor | None, n: int
    ) -> Tensor:
        """Apply the block.

        Args:
            x: Float [B, n + k, d], n context tokens and k candidates.
            types: INT [B, n + k], token types.
            visible: Float [B, 1, n + k, n], 1 where a token sees a context token, else 0.
            bias: Float [B, 1, n + k, n] relative bias, or None.
            self_bias: Scalar relative bias of a token to itself, or None.
            n: Number of context tokens.

        Returns:
            Float [B, n + k, d].
        """
        u, v, q, k = self.project(x, types)
        attended = self.attend(q, k[:, :, :n], v[:, :, :n], visible, bias)
        attended_self = self.attend_self(q[:, :, n:], k[:, :, n:], v[:, :, n:], self_bias)
        attended = torch.cat([attended[:, :, :n], attended[:, :, n:] + attended_self], dim=2)
        return self.finish(x, attended, u, types)

    def project(self, x: Tensor, types: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U [B, m, h dv] and, by head, V [B, h, m, dv], Q and K [B, h, m, dqk]; Q carries 1 / sqrt(dqk)."""
        u, v, q, k = self.projected(self.input_norm(x, types))
        return u, self.by_head(v), self.by_head(q) * self.dqk**-0.5, self.by_head(k)

    def projected(self, normal: Tensor) -> tuple[Tensor, ...]:
        """U, V, Q, K of normalised tokens, float [..., d], heads side by side: [..., h dv] or [..., h dqk]."""
        parts: tuple[Tensor, ...] = F.silu(self.uvqk(normal)).split(self.split, dim=-1)
        return parts

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None) -> Tensor:
        """Masked A V, not yet divided by N: float [B, h, q, dv]."""
        logits = q @ k.transpose(-1, -2)
        if bias is not None:
            logits = logits + bias
        attended: Tensor = (F.silu(logits) * visible) @ v
        return attended

    def attend_self(self, q: Tensor, k: Tensor, v: Tensor, self_bias: Tensor | None) -> Tensor:
        """What each candidate takes from itself, float [B, h, k, dv]: the diagonal of A times V."""
        logits = (q * k).sum(dim=-1, keepdim=True)
        if self_bias is not None:
            logits = logits + self_bias
        attended: Tensor = F.silu(logits) * v
        return attended

    def finish(self, x: Tensor, attended: Tensor, u: Tensor, types: Tensor) -> Tensor:
        """Normalise by the constant N, gate by U, project, and add to the residual stream."""
        # N divides in fp32: A / N would underflow in fp16.
        merged = attended.transpose(1, 2).flatten(2).float() / self.norm_length
        return self.update(x, self.output_norm(merged, types) * u)

    def update(self, x: Tensor, gated: Tensor) -> Tensor:
        """Add the projection of what attention found, normalised and gated by U, to the residual stream."""
        update: Tensor = self.dropout(self.output(gated))
        return x + update

    def by_head(self, x: Tensor) -> Tensor:
        """Float [B, h, m, w] of [B, m, h w]."""
        heads: Tensor = x.unflatten(-1, (self.num_heads, x.shape[-1] // self.num_heads))
        return heads.transpose(1, 2)
