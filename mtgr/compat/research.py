"""Meta's research HSTU (arXiv 2402.17152, section 4.1.1): next-item retrieval with relative position and time bias.

    x_j   = (id_j != 0) * (item_embedding[id_j] * sqrt(D) + position_embedding[j])
    U V Q K = SiLU(LN(X) W)                                        no affine in the norm, no bias in W
    A_ij  = SiLU(q_i k_j + pos_w[j - i + N - 1] + ts_w[bucket(t_{i+1} - t_j)]) / N,   for j <= i
    Y     = (U * LN(A V)) W_o + b_o + X                            or [U, LN(A V), U * LN(A V)] W_o, with concat_ua
    score(item) = <y_last / |y_last|, e / |e|>

There is no 1 / sqrt(dqk). N is the size of the training's position table, a constant. The time bias of a token looks
from the moment of the *next* one: for the last token that is the moment of the request, and where it is not known (in
retrieval) the token's own, as the public code does at the end of its table.

Source: meta-recsys/generative-recommenders, generative_recommenders/research/modeling/sequential/hstu.py at
44b62c6b0911e4e2114d8e6aa92f360dfe7f93c4, and input_features_preprocessors.py beside it at
044c378d7c005cf904286c799f34e4b0b3feb07a.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtgr.compat.base import (
    ForeignConfig,
    ForeignModel,
    by_head,
    is_event,
    is_last_of,
    silu_attention,
    slots,
    token_types,
    unit_vectors,
)
from mtgr.errors import ConfigurationError
from mtgr.schema import FIRST_COLUMN, FIRST_ID, TokenType

_LOG_STEP = 0.301
_TIME_COLUMN = FIRST_COLUMN + 1


@dataclass(frozen=True)
class ResearchConfig(ForeignConfig):
    """Hyper-parameters.

    Attributes:
        num_positions: Rows of the position table.
        relative_bias: Whether the blocks have position and time bias.
        time_buckets: Largest bucket of the time bias.
        activation: What the merged projection goes through.
        concat_ua: Whether U and the normalised attention are given to the output projection beside their product.
        user_norm: How the last output becomes a query: unit length, or a layer norm without affine.
        normalise_items: Whether item embeddings are brought to unit length.
    """

    network: ClassVar[str] = "meta-research"

    num_positions: int = 211
    relative_bias: bool = True
    time_buckets: int = 128
    activation: Literal["silu", "none"] = "silu"
    concat_ua: bool = False
    user_norm: Literal["l2_norm", "layer_norm"] = "l2_norm"
    normalise_items: bool = True

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            ConfigurationError: If a value is not one of those allowed, or contexts exceed the position table.
        """
        super().__post_init__()
        for name, allowed in (("activation", ("silu", "none")), ("user_norm", ("l2_norm", "layer_norm"))):
            if getattr(self, name) not in allowed:
                raise ConfigurationError(
                    f"{self.network}: {name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}."
                )
        if self.max_history > min(self.num_positions, self.attention_norm_length):
            raise ConfigurationError(
                f"{self.network}: max_history is {self.max_history}, but the checkpoint has positions for "
                f"{min(self.num_positions, self.attention_norm_length)} events; lower it."
            )


class ResearchHSTU(ForeignModel):
    """The network; item ids of the checkpoint are 1 to ``num_items``, internal ids one more."""

    config: ResearchConfig

    def __init__(self, config: ResearchConfig) -> None:
        super().__init__(config)
        self.items = nn.Embedding(config.num_items + FIRST_ID, config.d_model)
        self.positions = nn.Embedding(config.num_positions, config.d_model)
        self.blocks = nn.ModuleList(ResearchBlock(config) for _ in range(config.num_layers))

    def forward(self, context: Tensor, candidates: Tensor) -> Tensor:
        """FP32 [B, k, 1]: the sigmoid of each candidate's similarity, which keeps the similarities' order."""
        # All candidates of a request have its moment.
        valid = token_types(candidates) == TokenType.CANDIDATE
        request_time = torch.where(valid, candidates[..., _TIME_COLUMN], 0).amax(dim=1, keepdim=True)
        query = self.query(context, request_time)
        items = self._vectors(self.items(candidates[..., FIRST_COLUMN]))
        return (items @ query.unsqueeze(-1)).float().sigmoid()

    def next_item_logits(self, context: Tensor) -> Tensor:
        """FP32 [B, I - 2]: similarities in [-1, 1], or products where vectors are not brought to unit length."""
        return (self.query(context) @ self._vectors(self.items.weight[FIRST_ID:]).T).float()

    def query(self, context: Tensor, request_time: Tensor | None = None) -> Tensor:
        """Float [B, D]: the normalised output of the last event, zeros where there is none.

        Args:
            context: INT32 [B, n, W].
            request_time: INT [B, 1], seconds; None takes the last event's own time.
        """
        valid = is_event(context)
        last_position = min(self.config.num_positions, self.config.attention_norm_length) - 1
        positions = (slots(context) - self.config.num_profile).clamp(0, last_position)
        last = is_last_of(valid, positions)
        times = context[..., _TIME_COLUMN]
        following = torch.where(last, times if request_time is None else request_time, _shifted(times))

        items = context[..., FIRST_COLUMN]
        known = (items >= FIRST_ID) & valid
        x = self.items(items) * self.config.d_model**0.5 + self.positions(positions)
        x = x * known.unsqueeze(-1).to(x.dtype)
        visible = (positions[:, None, :] <= positions[:, :, None]) & valid[:, None, :]
        distance = positions[:, None, :] - positions[:, :, None] + self.config.attention_norm_length - 1
        buckets = time_bucket(following[:, :, None] - times[:, None, :], self.config.time_buckets)
        for block in self.blocks:
            x = block(x, visible, distance, buckets)
        y = (x * last.unsqueeze(-1).to(x.dtype)).sum(dim=1)
        if self.config.user_norm == "layer_norm":
            return F.layer_norm(y, (self.config.d_model,), eps=1e-6)
        return unit_vectors(y)

    def _vectors(self, items: Tensor) -> Tensor:
        return unit_vectors(items) if self.config.normalise_items else items


class ResearchBlock(nn.Module):
    """One block."""

    def __init__(self, config: ResearchConfig) -> None:
        super().__init__()
        self.config = config
        value_width, query_width = config.num_heads * config.dv, config.num_heads * config.dqk
        self.split = [value_width, value_width, query_width, query_width]
        self.uvqk = nn.Linear(config.d_model, sum(self.split), bias=False)
        self.output = nn.Linear(value_width * (3 if config.concat_ua else 1), config.d_model)
        if config.relative_bias:
            self.position_bias = nn.Parameter(torch.zeros(2 * config.attention_norm_length - 1))
            self.time_bias = nn.Parameter(torch.zeros(config.time_buckets + 1))

    def forward(self, x: Tensor, visible: Tensor, distance: Tensor, buckets: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: Float [B, n, D].
            visible: BOOL [B, n, n].
            distance: INT [B, n, n], position of the key minus that of the query, plus N - 1.
            buckets: INT64 [B, n, n], of the time from the key to the token after the query.

        Returns:
            Float [B, n, D].
        """
        c = self.config
        projected = self.uvqk(F.layer_norm(x, (c.d_model,), eps=c.norm_epsilon))
        if c.activation == "silu":
            projected = F.silu(projected)
        u, v, q, k = projected.split(self.split, dim=-1)
        bias = None
        if c.relative_bias:
            bias = F.embedding(distance, self.position_bias.unsqueeze(-1)).squeeze(-1)
            bias = bias + F.embedding(buckets, self.time_bias.unsqueeze(-1)).squeeze(-1)
        q, k, v = (by_head(part, c.num_heads) for part in (q, k, v))
        attended = silu_attention(q, k, v, visible, 1.0, c.attention_norm_length, bias).transpose(1, 2).flatten(2)
        normal = F.layer_norm(attended, (self.split[0],), eps=c.norm_epsilon)
        gated = torch.cat([u, normal, u * normal], dim=-1) if c.concat_ua else u * normal
        y: Tensor = self.output(gated) + x
        return y


def time_bucket(difference: Tensor, buckets: int) -> Tensor:
    """INT64 bucket of a time difference in seconds: log(max(|dt|, 1)) / 0.301, rounded down; the logarithm in fp32."""
    seconds = difference.abs().to(torch.float32).clamp(min=1.0)
    return (torch.log(seconds) / _LOG_STEP).to(torch.int64).clamp(max=buckets)


def _shifted(times: Tensor) -> Tensor:
    """Each token's successor's time, INT [B, n]; the last row's is its own."""
    return torch.cat([times[:, 1:], times[:, -1:]], dim=1)
