"""Meta's production STU (DLRMv3, MLPerf) and TorchEasyRec's DlrmHSTU, which grew out of it: rankers.

    tokens: contextual_1..C, events, candidates                     n context tokens, then k candidates
    x_c   = contextual_embedding W_c + b_c                          zeros for the embedding if the sequence is short
    x_j   = MLP(item embedding) + MLP(action embedding)             candidates: one learned action embedding for all
    x    <- x * sqrt(D) + position[min(n - j + offset, last)] + time[bucket(t_request - t_j)]
    U V Q K = LN(X) W + b,  U <- SiLU(U)                            SiLU on U alone
    A     = SiLU(alpha Q K^T) / N, masked after SiLU                alpha = 1 / sqrt(dqk)
    Y     = [U, A V, U * LN(A V)] W_o + X                           no bias in W_o
    score = sigmoid(MLP(postprocess(y_candidate) * MLP(item embedding)))

    time bucket: floor(sqrt(max(dt, 1e-6) / 60 s)), at most the last
    MLP with SwishLayerNorm(x) = x * sigmoid(LN(x)) inside and a LN at the end

Context tokens see themselves and earlier ones, candidates all of the context and themselves. In TorchEasyRec the
contextual tokens also see the whole context and share one place in the order. A layer norm with a gain per head
(``group_norm``) is the public code's F.group_norm.

The public code divides by the longest sequence of a batch unless told otherwise; here N is a constant. The contextual
embeddings are left out where events and candidates *together* are fewer than a feature's minimum, so with such a
minimum a short user's scores depend on how many candidates come along: that is how the checkpoint was trained.

Source: meta-recsys/generative-recommenders, generative_recommenders/modules: stu.py at
1cf745902c487c9582bf6b9723384ae335514271, dlrm_hstu.py at 3a8aa9348807e447d83996f0a5481442f2c3c28d, preprocessors.py at
d22ed93e2a47e78ca510f0268f7ddccfac6efb2e, postprocessors.py at 61e7fcec82ae658ee70071e9df4f3e6a27b766ad; and ops:
hstu_compute.py at 19bc4e07fc950909eac2ec60f588ad6465f8f868, pytorch/pt_hstu_linear.py at
32b8e675555fc899d45bf2792dd959cc344241b2, pytorch/pt_position.py at 59d0859bc4be03ee2df585fe1974186a5227cd1c.
alibaba/TorchEasyRec, tzrec/modules/gr: preprocessors.py at 1087b7aab2d94912f08ddd130c8edc7131457aae,
contextualize_mlps.py at 6773fdf9a0266f55cc79a98988e4e6caa271c117, hstu_transducer.py at
0a9bab0e54eeee663785f9ce8ccacffb4019e70c; tzrec/modules/task_tower.py at 249d84f5fe149ff97659de982f370957f5bc7b19;
tzrec/ops/_pytorch/pt_hstu_attention.py at 0c76d456d1a117c5abd51622699b8fede35c95f4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtgr.compat.base import (
    ForeignConfig,
    ForeignModel,
    Operation,
    by_head,
    is_event,
    silu_attention,
    silu_attention_to_self,
    slots,
    token_types,
    unit_vectors,
)
from mtgr.errors import ConfigurationError
from mtgr.schema import FIRST_COLUMN, FIRST_ID, TokenType

_TIME_COLUMN = FIRST_COLUMN + 1
_ACTION_COLUMN = FIRST_COLUMN + 2
_NORM_EPSILON = 1e-5  # of every norm outside the blocks


@dataclass(frozen=True)
class STUConfig(ForeignConfig):
    """Hyper-parameters.

    Attributes:
        tasks: Names of the outputs, probabilities all of them.
        item_widths: Width of each of an item's embeddings, its id's first.
        item_table_rows: Rows of the tables that go with them.
        content_hidden: Hidden width of the MLP of an item's id within the sequence.
        additional_hidden: That of its further features' MLP; 0 without any.
        item_hidden: That of the items' MLP beside the sequence.
        contextual_sizes: Values of each contextual feature.
        contextual_min_lengths: Events and candidates below which each of them is left out.
        contextual_attention: Whether contextual tokens see the whole context, both ways.
        contextual_positions: Whether contextual tokens have positions of their own, before the others'.
        alpha: Scale of the logits.
        group_norm: Whether the attention output is normalised head by head.
        max_attention_length: Tokens that a token sees backwards; 0 for all.
        position_rows: Rows of the position table; 0 without one.
        time_rows: Rows of the time table; without one, positions count forwards.
        time_step: Seconds of the first time bucket.
        time_scale: How buckets grow.
        action_masks: Each action as bits of the action types it stands for; empty without an action embedding.
        action_weights: The bit of each action type.
        action_width: Width of one action type's embedding.
        action_hidden: Hidden width of the actions' MLP.
        postprocess: What becomes of the candidates' outputs.
        num_periods: Periods of the ``time_layer_norm``.
        head_widths: Hidden widths of the last MLP.
        head_norm: What follows each of its hidden layers: x * sigmoid(LN(x)), or SiLU(LN(x)).
    """

    network: ClassVar[str] = "stu"

    tasks: tuple[str, ...] = ("task_0",)
    item_widths: tuple[int, ...] = (64,)
    item_table_rows: tuple[int, ...] = (1,)
    content_hidden: int = 256
    additional_hidden: int = 0
    item_hidden: int = 512
    contextual_sizes: tuple[int, ...] = ()
    contextual_min_lengths: tuple[int, ...] = ()
    contextual_attention: bool = False
    contextual_positions: bool = True
    alpha: float = 1.0
    group_norm: bool = False
    max_attention_length: int = 0
    position_rows: int = 0
    time_rows: int = 0
    time_step: float = 60.0
    time_scale: Literal["sqrt", "log"] = "sqrt"
    action_masks: tuple[int, ...] = ()
    action_weights: tuple[int, ...] = ()
    action_width: int = 8
    action_hidden: int = 256
    postprocess: Literal["l2_norm", "layer_norm", "time_layer_norm"] = "l2_norm"
    num_periods: int = 0
    head_widths: tuple[int, ...] = (512,)
    head_norm: Literal["swish_layer_norm", "layer_norm_silu"] = "swish_layer_norm"

    def __post_init__(self) -> None:
        """Check what fits together.

        Raises:
            ConfigurationError: If it does not.
        """
        super().__post_init__()
        if len(self.contextual_sizes) != len(self.contextual_min_lengths):
            raise ConfigurationError(f"{self.network}: give a minimum length for each contextual feature, or 0.")
        if len(self.item_widths) != len(self.item_table_rows) or not self.tasks:
            raise ConfigurationError(f"{self.network}: there must be a table for each item feature, and a task.")
        if not (math.isfinite(self.alpha) and self.alpha > 0 and self.time_step > 0):
            raise ConfigurationError(f"{self.network}: alpha and time_step must be positive.")
        for name, allowed in (
            ("time_scale", ("sqrt", "log")),
            ("postprocess", ("l2_norm", "layer_norm", "time_layer_norm")),
            ("head_norm", ("swish_layer_norm", "layer_norm_silu")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigurationError(
                    f"{self.network}: {name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}."
                )

    @property
    def operations(self) -> tuple[Operation, ...]:
        """It has no output for the next item."""
        return ("rank",)


class STUModel(ForeignModel):
    """The network; item ids of the checkpoint are 0 to ``num_items`` - 1, internal ids two more."""

    config: STUConfig
    item_rows: Tensor
    profile_min_lengths: Tensor
    action_bits: Tensor
    period_units: Tensor
    units_per_period: Tensor

    def __init__(self, config: STUConfig) -> None:
        super().__init__(config)
        c, d = config, config.d_model
        self.item_tables = nn.ModuleList(
            nn.Embedding(rows, width) for rows, width in zip(c.item_table_rows, c.item_widths, strict=True)
        )
        self.register_buffer("item_rows", torch.zeros(c.num_items + FIRST_ID, len(c.item_widths), dtype=torch.int64))
        self.content = mlp(c.item_widths[0], c.content_hidden, d)
        if c.additional_hidden:
            self.additional = mlp(sum(c.item_widths[1:]), c.additional_hidden, d)
        self.item_tower = mlp(sum(c.item_widths), c.item_hidden, d)
        profile_size = FIRST_ID + sum(1 + size for size in c.contextual_sizes)
        self.profile = nn.Embedding(profile_size, d)
        self.profile_bias = nn.Embedding(profile_size, d)
        self.register_buffer("profile_min_lengths", torch.zeros(profile_size, dtype=torch.int64))
        if c.action_weights:
            types = len(c.action_weights)
            self.action_table = nn.Parameter(torch.zeros(types, c.action_width))
            self.target_action = nn.Parameter(torch.zeros(types * c.action_width))
            self.register_buffer("action_bits", torch.zeros(FIRST_ID + len(c.action_masks), types))
            self.action = mlp(types * c.action_width, c.action_hidden, d)
        if c.position_rows:
            self.positions = nn.Embedding(c.position_rows, d)
        if c.time_rows:
            self.times = nn.Embedding(c.time_rows, d)
        self.blocks = nn.ModuleList(STUBlock(config) for _ in range(c.num_layers))
        if c.postprocess != "l2_norm":
            self.output_norm = nn.LayerNorm(d, eps=_NORM_EPSILON)
        if c.postprocess == "time_layer_norm":
            self.register_buffer("period_units", torch.ones(c.num_periods, dtype=torch.int64))
            self.register_buffer("units_per_period", torch.ones(c.num_periods, dtype=torch.int64))
            self.time_combiner = nn.Linear(d + 2 * c.num_periods, d)
        widths = (d, *c.head_widths)
        self.head_hidden = nn.ModuleList(nn.Linear(first, second) for first, second in pairwise(widths))
        self.head_norms = nn.ModuleList(nn.LayerNorm(width, eps=_NORM_EPSILON) for width in c.head_widths)
        self.head = nn.Linear(widths[-1], len(c.tasks))

    def forward(self, context: Tensor, candidates: Tensor) -> Tensor:
        """FP32 [B, k, T]."""
        n = context.shape[1]
        x, visible = self._inputs(context, candidates)
        for block in self.blocks:
            x = block(x, visible, n)
        user = self._postprocess(x[:, n:], candidates[..., _TIME_COLUMN])
        item = self.item_tower(torch.cat(self._item_embeddings(candidates[..., FIRST_COLUMN]), dim=-1))
        y = user * item
        for hidden, norm in zip(self.head_hidden, self.head_norms, strict=True):
            y = hidden(y)
            y = y * norm(y).sigmoid() if self.config.head_norm == "swish_layer_norm" else F.silu(norm(y))
        scores: Tensor = self.head(y).float().sigmoid()
        return scores

    def _inputs(self, context: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, float [B, n + k, D], and which of the context tokens each of them sees, BOOL [B, n + k, n]."""
        contextual = (token_types(context) == TokenType.PROFILE) & bool(self.config.contextual_sizes)
        events = is_event(context)
        targets = token_types(candidates) == TokenType.CANDIDATE
        valid = contextual | events
        # Without contextual features the profile token is none of the sequence, and the events begin at 0.
        first = 0 if self.config.contextual_sizes else self.config.num_profile
        index = slots(context) - first
        length = valid.sum(dim=1, keepdim=True)

        seen = events.sum(dim=1, keepdim=True) + targets.sum(dim=1, keepdim=True)
        x = torch.cat(
            [
                torch.where(contextual.unsqueeze(-1), self._contextual(context, seen), self._events(context)),
                self._content(candidates[..., FIRST_COLUMN]) + self._target_action(),
            ],
            dim=1,
        )
        x = x * self.config.d_model**0.5
        places = torch.cat([index, length.expand(-1, candidates.shape[1]).to(index.dtype)], dim=1)
        if self.config.position_rows:
            x = x + self.positions(self._position_rows(places, length))
        if self.config.time_rows:
            moments = torch.where(contextual, 0, context[..., _TIME_COLUMN])
            asked = candidates[..., _TIME_COLUMN]
            request = torch.where(targets, asked, 0).amax(dim=1, keepdim=True)
            elapsed = request - torch.cat([moments, asked], dim=1)
            x = x + self.times(time_row(elapsed, self.config.time_rows, self.config.time_step, self.config.time_scale))
        return x, self._visible(places, index, length, valid)

    def _contextual(self, rows: Tensor, length: Tensor) -> Tensor:
        ids = rows[..., FIRST_COLUMN].clamp(max=self.profile.num_embeddings - 1)
        long_enough = length >= F.embedding(ids, self.profile_min_lengths.unsqueeze(-1)).squeeze(-1)
        known: Tensor = self.profile(ids)
        x: Tensor = known * long_enough.unsqueeze(-1).to(known.dtype) + self.profile_bias(ids)
        return x

    def _events(self, rows: Tensor) -> Tensor:
        event = is_event(rows)
        x = self._content(torch.where(event, rows[..., FIRST_COLUMN], 0))
        if not self.config.action_weights:
            return x
        actions = torch.where(event, rows[..., _ACTION_COLUMN], 0)
        bits = F.embedding(actions, self.action_bits)
        embedded: Tensor = self.action((bits.unsqueeze(-1) * self.action_table).flatten(-2))
        return x + embedded

    def _content(self, items: Tensor) -> Tensor:
        first, *others = self._item_embeddings(items)
        x: Tensor = self.content(first)
        if others:
            x = x + self.additional(torch.cat(others, dim=-1))
        return x

    def _target_action(self) -> Tensor | float:
        if not self.config.action_weights:
            return 0.0
        x: Tensor = self.action(self.target_action)
        return x

    def _item_embeddings(self, items: Tensor) -> list[Tensor]:
        rows = F.embedding(items, self.item_rows)
        return [table(rows[..., column]) for column, table in enumerate(self.item_tables)]

    def _position_rows(self, places: Tensor, length: Tensor) -> Tensor:
        """INT [B, n + k]: backwards from the end of the context with a time table, forwards without."""
        c = self.config
        if not c.time_rows:
            return torch.minimum(places, length.to(places.dtype)).clamp(0, c.position_rows - 1)
        own = len(c.contextual_sizes) if c.contextual_positions else 0
        backwards = (length - places + own).clamp(0, c.position_rows - 1)
        return torch.where(places < own, places, backwards) if own else backwards

    def _visible(self, places: Tensor, index: Tensor, length: Tensor, valid: Tensor) -> Tensor:
        """BOOL [B, n + k, n]; a candidate's view of itself is not in here."""
        merged = max(len(self.config.contextual_sizes) - 1, 0) if self.config.contextual_attention else 0
        query = (places - merged).clamp(min=0)[:, :, None]
        key = (index - merged).clamp(min=0)[:, None, :]
        distance = query - key
        own = (places[:, :, None] == index[:, None, :]) & (distance == 0)
        visible = own | (distance > 0)
        if self.config.max_attention_length:
            visible = visible & (distance <= self.config.max_attention_length)
        if self.config.contextual_attention and self.config.contextual_sizes:
            visible = visible | ((query == 0) & (key < (length[:, :, None] - merged)))
        return visible & valid[:, None, :]

    def _postprocess(self, x: Tensor, times: Tensor) -> Tensor:
        if self.config.postprocess == "l2_norm":
            return unit_vectors(x)
        if self.config.postprocess == "time_layer_norm":
            # The public code takes the moment in fp32, where it has steps of 128 seconds today.
            moments = times.to(torch.float32).to(torch.int64).unsqueeze(-1)
            elapsed = (moments // self.period_units) % self.units_per_period
            angles = elapsed.to(x.dtype) / self.units_per_period.to(x.dtype) * 2 * 3.14
            x = self.time_combiner(
                torch.cat([x, torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(-2)], dim=-1)
            )
        normal: Tensor = self.output_norm(x)
        return normal


class STUBlock(nn.Module):
    """One block over context tokens followed by candidates."""

    def __init__(self, config: STUConfig) -> None:
        super().__init__()
        self.config = config
        value_width, query_width = config.num_heads * config.dv, config.num_heads * config.dqk
        self.split = [value_width, value_width, query_width, query_width]
        self.input_norm = nn.LayerNorm(config.d_model, eps=config.norm_epsilon)
        self.uvqk = nn.Linear(config.d_model, sum(self.split))
        norm_width = config.num_heads if config.group_norm else value_width
        self.norm_gain = nn.Parameter(torch.ones(norm_width))
        self.norm_bias = nn.Parameter(torch.zeros(norm_width))
        self.output = nn.Linear(3 * value_width, config.d_model, bias=False)

    def forward(self, x: Tensor, visible: Tensor, n: int) -> Tensor:
        """Float [B, n + k, D] of float [B, n + k, D] and BOOL [B, n + k, n], the first n tokens being the context."""
        c = self.config
        u, v, q, k = self.uvqk(self.input_norm(x)).split(self.split, dim=-1)
        u = F.silu(u)
        q, k, v = (by_head(part, c.num_heads) for part in (q, k, v))
        attended = silu_attention(q, k[:, :, :n], v[:, :, :n], visible, c.alpha, c.attention_norm_length)
        own = silu_attention_to_self(q[:, :, n:], k[:, :, n:], v[:, :, n:], c.alpha, c.attention_norm_length)
        attended = torch.cat([attended[:, :, :n], attended[:, :, n:] + own], dim=2).transpose(1, 2)  # [B, m, h, dv]
        merged = attended.flatten(2)
        y: Tensor = self.output(torch.cat([u, merged, u * self._normalise(attended)], dim=-1)) + x
        return y

    def _normalise(self, attended: Tensor) -> Tensor:
        c = self.config
        if not c.group_norm:
            return F.layer_norm(
                attended.flatten(2), (self.split[0],), self.norm_gain, self.norm_bias, eps=c.norm_epsilon
            )
        normal = F.layer_norm(attended, (c.dv,), eps=c.norm_epsilon)
        return (normal * self.norm_gain.unsqueeze(-1) + self.norm_bias.unsqueeze(-1)).flatten(2)


class SwishLayerNorm(nn.LayerNorm):
    """x * sigmoid(LN(x))."""

    def forward(self, x: Tensor) -> Tensor:
        """Float like ``x``, [..., width]."""
        return x * super().forward(x).sigmoid()


def mlp(width: int, hidden: int, output: int) -> nn.Sequential:
    """Linear, SwishLayerNorm, linear, layer norm: the public code's MLP, module by module."""
    return nn.Sequential(
        nn.Linear(width, hidden),
        SwishLayerNorm(hidden, eps=_NORM_EPSILON),
        nn.Linear(hidden, output),
        nn.LayerNorm(output, eps=_NORM_EPSILON),
    )


def time_row(elapsed: Tensor, rows: int, step: float, scale: str) -> Tensor:
    """INT64 row of the time table for INT seconds before the request; square root or logarithm in fp32."""
    units = elapsed.to(torch.float32).clamp(min=1e-6) / step
    grown = torch.log(units) if scale == "log" else torch.sqrt(units)
    return grown.clamp(min=0).to(torch.int64).clamp(max=rows - 1)
