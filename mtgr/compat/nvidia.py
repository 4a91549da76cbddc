"""NVIDIA's recsys-examples HSTU: a ranker, or with the same trunk a retriever.

    tokens: contextual_1..C, item_1, action_1, item_2, action_2, ..., candidates
    x    <- x * sqrt(D) + position[min(j, n, last)]                 n context tokens; only with a position table
    U V Q K = SiLU(LN(X) W + b)                                     SiLU on all four
    A     = SiLU(Q K^T / sqrt(d)) / N, masked after SiLU            N: ``scaling_seqlen``
    Y     = (U * LN(A V)) W_o + X                                   no bias in W_o
    z     = y / max(|y|, 1e-6)
    rank: sigmoid(MLP(z_candidate)); retrieve: <z_last item, e / |e|>

Contextual tokens see the whole context both ways, the others themselves, earlier ones and the contextual tokens;
candidates see the context and themselves. An item's token does not see its own action, which comes after it.

Source: NVIDIA/recsys-examples, examples/hstu/modules/fused_hstu_layer.py at 046f99910d3d6233af5f094bb0c6d86da9fa53ce,
native_hstu_layer.py at 42fa2b20ce9d3d2f0add143103f7062dedda8489, hstu_processor.py at
0219b1e462e370753657c7f8f8165c476f07c9cb, position_encoder.py at fb1a6ad5a01eafe0124ccd8067296c2306f8f6a9,
hstu_attention.py at 034a00edc158e39cc84a5188c4c63ce788fb0e25, and examples/hstu/model/{ranking_gr,retrieval_gr}.py at
0250e5b96bb35c213bb6f7ffe37e55d12c1ec78c.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtgr.compat.base import (
    ForeignConfig,
    ForeignModel,
    Operation,
    by_head,
    is_event,
    is_last_of,
    silu_attention,
    silu_attention_to_self,
    slots,
    token_types,
    unit_vectors,
)
from mtgr.errors import ConfigurationError
from mtgr.schema import FIRST_COLUMN, FIRST_ID, TokenType

_ACTION_COLUMN = FIRST_COLUMN + 2


@dataclass(frozen=True)
class NvidiaConfig(ForeignConfig):
    """Hyper-parameters.

    Attributes:
        tasks: Names of the outputs, probabilities all of them; none makes a retriever.
        contextual_sizes: Values of each contextual feature.
        num_actions: Rows of the action table; 0 without action tokens.
        position_rows: Rows of the position table; 0 without one.
        residual: Whether a block adds to its input.
        learnable_input_norm: Whether the input norm has a gain and a bias.
        head_widths: Hidden widths of the last MLP.
        head_activates_last: Whether the MLP's activation also follows its last layer.
    """

    network: ClassVar[str] = "nvidia"

    tasks: tuple[str, ...] = ()
    contextual_sizes: tuple[int, ...] = ()
    num_actions: int = 0
    position_rows: int = 0
    residual: bool = True
    learnable_input_norm: bool = True
    head_widths: tuple[int, ...] = ()
    head_activates_last: bool = False

    def __post_init__(self) -> None:
        """Check the head.

        Raises:
            ConfigurationError: If the widths of keys and values differ.
        """
        super().__post_init__()
        if self.dqk != self.dv:
            raise ConfigurationError(f"{self.network}: dqk and dv are one number in this format, kv_channels.")

    @property
    def operations(self) -> tuple[Operation, ...]:
        """With tasks it ranks, without it retrieves and ranks by similarity."""
        return ("rank",) if self.tasks else ("rank", "retrieve")


class NvidiaHSTU(ForeignModel):
    """The network; item ids of the checkpoint are 0 to ``num_items`` - 1, internal ids two more."""

    config: NvidiaConfig
    profile_known: Tensor

    def __init__(self, config: NvidiaConfig) -> None:
        super().__init__(config)
        c = config
        self.items = nn.Embedding(c.num_items + FIRST_ID, c.d_model)
        known = [False] * FIRST_ID
        for size in c.contextual_sizes:
            known += [False] + [True] * size
        self.profile = nn.Embedding(len(known), c.d_model)
        self.register_buffer("profile_known", torch.tensor(known), persistent=False)
        if c.num_actions:
            self.actions = nn.Embedding(FIRST_ID + c.num_actions, c.d_model)
        if c.position_rows:
            self.positions = nn.Embedding(c.position_rows, c.d_model)
        self.blocks = nn.ModuleList(NvidiaBlock(config) for _ in range(c.num_layers))
        widths = (c.d_model, *c.head_widths, len(c.tasks)) if c.tasks else ()
        self.head = nn.ModuleList(nn.Linear(first, second) for first, second in pairwise(widths))

    def forward(self, context: Tensor, candidates: Tensor) -> Tensor:
        """FP32 [B, k, T]; of a retriever, the sigmoid of each candidate's similarity."""
        if not self.config.tasks:
            items = unit_vectors(self.items(candidates[..., FIRST_COLUMN]))
            return (items @ self._query(context).unsqueeze(-1)).float().sigmoid()
        x, tokens = self._trunk(context, candidates)
        y = unit_vectors(x[:, tokens:])
        for index, layer in enumerate(self.head):
            y = layer(y)
            if index < len(self.head) - 1 or self.config.head_activates_last:
                y = F.relu(y)
        return y.float().sigmoid()

    def next_item_logits(self, context: Tensor) -> Tensor:
        """FP32 [B, I - 2]: similarities in [-1, 1].

        Raises:
            InvalidRequestError: If this is a ranker.
        """
        if self.config.tasks:
            return super().next_item_logits(context)
        return (self._query(context) @ unit_vectors(self.items.weight[FIRST_ID:]).T).float()

    def _query(self, context: Tensor) -> Tensor:
        """Float [B, D]: the output of the last event's item token, zeros where there is none."""
        x, tokens = self._trunk(context, context[:, :0])
        events = is_event(context)
        last = is_last_of(events, slots(context))
        if self.config.num_actions:
            x = x.unflatten(1, (tokens // 2, 2))[:, :, 0]
        return unit_vectors((x * last.unsqueeze(-1).to(x.dtype)).sum(dim=1))

    def _trunk(self, context: Tensor, candidates: Tensor) -> tuple[Tensor, int]:
        """Outputs of context tokens and candidates, float [B, m + k, D], and how many context tokens there are."""
        c = self.config
        events = is_event(context)
        ids = context[..., FIRST_COLUMN]
        profile_ids = torch.where(token_types(context) == TokenType.PROFILE, ids, 0)
        profile_ids = profile_ids.clamp(max=len(self.profile_known) - 1)  # networks without such features know no id
        contextual = F.embedding(profile_ids, self.profile_known.unsqueeze(-1)).squeeze(-1)
        x = torch.where(contextual.unsqueeze(-1), self.profile(profile_ids), self.items(torch.where(events, ids, 0)))
        valid = contextual | events
        # What is not known of the user is no token here, and what comes after it moves up.
        own = contextual.sum(dim=1, keepdim=True).to(ids.dtype)
        order = slots(context)
        earlier = contextual[:, None, :] & (order[:, None, :] < order[:, :, None])
        index = torch.where(events, order - c.num_profile + own, earlier.sum(dim=-1).to(order.dtype))
        if c.num_actions:
            # Each row becomes two tokens, of which the second is one for events only.
            actions = self.actions(torch.where(events, context[..., _ACTION_COLUMN], 0))
            x = torch.stack([x, actions], dim=2).flatten(1, 2)
            item_index = torch.where(contextual, index, 2 * index - own)
            index = torch.stack([item_index, item_index + 1], dim=2).flatten(1, 2)
            valid = torch.stack([valid, events], dim=2).flatten(1, 2)
        length = valid.sum(dim=1, keepdim=True).to(index.dtype)
        x = torch.cat([x, self.items(candidates[..., FIRST_COLUMN])], dim=1)
        places = torch.cat([index, length.expand(-1, candidates.shape[1])], dim=1)
        if c.position_rows:
            rows = torch.minimum(places, length).clamp(0, c.position_rows - 1)
            x = x * c.d_model**0.5 + self.positions(rows)
        visible = self._visible(places, index, own, valid)
        tokens = index.shape[1]
        for block in self.blocks:
            x = block(x, visible, tokens)
        return x, tokens

    @staticmethod
    def _visible(places: Tensor, index: Tensor, own: Tensor, valid: Tensor) -> Tensor:
        """BOOL [B, m + k, m], of INT [B, 1] contextual tokens; a candidate's view of itself is not in here."""
        visible = (index[:, None, :] <= places[:, :, None]) | (places < own)[:, :, None]
        return visible & valid[:, None, :]


class NvidiaBlock(nn.Module):
    """One block over context tokens followed by candidates."""

    def __init__(self, config: NvidiaConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_heads * config.dv
        self.input_norm = nn.LayerNorm(
            config.d_model, eps=config.norm_epsilon, elementwise_affine=config.learnable_input_norm
        )
        self.uvqk = nn.Linear(config.d_model, 4 * width)
        self.output_norm = nn.LayerNorm(width, eps=config.norm_epsilon)
        self.output = nn.Linear(width, config.d_model, bias=False)

    def forward(self, x: Tensor, visible: Tensor, n: int) -> Tensor:
        """Float [B, n + k, D] of float [B, n + k, D] and BOOL [B, n + k, n], the first n tokens being the context."""
        c = self.config
        u, v, q, k = F.silu(self.uvqk(self.input_norm(x))).chunk(4, dim=-1)
        q, k, v = (by_head(part, c.num_heads) for part in (q, k, v))
        alpha = c.dqk**-0.5
        attended = silu_attention(q, k[:, :, :n], v[:, :, :n], visible, alpha, c.attention_norm_length)
        own = silu_attention_to_self(q[:, :, n:], k[:, :, n:], v[:, :, n:], alpha, c.attention_norm_length)
        attended = torch.cat([attended[:, :, :n], attended[:, :, n:] + own], dim=2).transpose(1, 2).flatten(2)
        y: Tensor = self.output(self.output_norm(attended) * u)
        return y + x if c.residual else y
