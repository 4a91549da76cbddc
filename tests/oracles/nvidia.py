"""NVIDIA's recsys-examples HSTU in plain loops, on its own ids: one pair of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.oracles.arithmetic import Array, Parameters, State, layer_norm, sigmoid, silu, unit

CONTEXTUAL, ITEM, ACTION, CANDIDATE = "contextual", "item", "action", "candidate"


@dataclass(frozen=True)
class Settings:
    num_heads: int
    norm_length: int
    item_table: str
    action_table: str = ""
    contextual_tables: tuple[str, ...] = ()
    by_head: bool = False  # native layers: U, V, Q, K of a head stand together
    residual: bool = True


def sees(kinds: Sequence[str], i: int, j: int) -> bool:
    """Whether token i sees token j: contextual tokens see the whole context, candidates it and themselves."""
    if i == j:
        return True
    if kinds[j] == CANDIDATE:
        return False
    return kinds[i] in (CONTEXTUAL, CANDIDATE) or j < i


class NvidiaOracle:
    def __init__(self, state: State, settings: Settings) -> None:
        self.p = Parameters(state)
        self.s = settings
        self.layers = sum(name.endswith("._output_layernorm_weight") for name in state)
        self.width = self.p[settings.item_table].shape[1]

    def scores(
        self, contextual: Sequence[int | None], events: Sequence[tuple[int, int]], candidates: Sequence[int]
    ) -> Array:
        """Probabilities [k, T]; events are pairs of item and action."""
        kinds, x = self._tokens(contextual, events)
        x += [self.p[self.s.item_table][item] for item in candidates]
        outputs = self._run(kinds + [CANDIDATE] * len(candidates), x)[len(kinds) :]
        return np.array([self._head(unit(y)) for y in outputs])

    def similarities(self, contextual: Sequence[int | None], events: Sequence[tuple[int, int]]) -> Array:
        """Of every item to what comes after the events."""
        kinds, x = self._tokens(contextual, events)
        if ITEM not in kinds:
            return np.zeros(len(self.p[self.s.item_table]))
        last = max(index for index, kind in enumerate(kinds) if kind == ITEM)
        query = unit(self._run(kinds, x)[last])
        return np.array([float(query @ unit(row)) for row in self.p[self.s.item_table]])

    def _tokens(
        self, contextual: Sequence[int | None], events: Sequence[tuple[int, int]]
    ) -> tuple[list[str], list[Array]]:
        kinds, x = [], []
        for name, value in zip(self.s.contextual_tables, contextual, strict=True):
            if value is not None:  # what is not known of a user is no token
                kinds.append(CONTEXTUAL)
                x.append(self.p[name][value])
        for item, action in events:
            kinds.append(ITEM)
            x.append(self.p[self.s.item_table][item])
            if self.s.action_table:
                kinds.append(ACTION)
                x.append(self.p[self.s.action_table][action])
        return kinds, x

    def _run(self, kinds: list[str], x: list[Array]) -> list[Array]:
        name = next((n for n in self.p._state if n.endswith("._position_embeddings_weight")), None)
        if name is not None:
            table = self.p[name]
            length = len(kinds) - kinds.count(CANDIDATE)
            x = [y * math.sqrt(self.width) + table[min(i, length, len(table) - 1)] for i, y in enumerate(x)]
        for layer in range(self.layers):
            x = self._block(f"_hstu_block._attention_layers.{layer}.", kinds, x)
        return x

    def _block(self, name: str, kinds: list[str], x: list[Array]) -> list[Array]:
        heads = self.s.num_heads
        fused = name + "_linear_uvqk_weight" in self.p
        wide = len(self.p[name + "_output_layernorm_weight"])
        one = wide // heads
        u, v, q, k = [], [], [], []
        for y in x:
            affine = name + "_input_layernorm_weight" in self.p
            gain = self.p[name + "_input_layernorm_weight"] if affine else None
            bias = self.p[name + "_input_layernorm_bias"] if affine else None
            normal = layer_norm(y, 1e-5, gain, bias)
            if fused:
                projected = silu(normal @ self.p[name + "_linear_uvqk_weight"] + self.p[name + "_linear_uvqk_bias"])
            else:
                projected = silu(self.p.linear(name + "_linear_uvqk", normal))
            for part, to in enumerate((u, v, q, k)):
                if self.s.by_head:
                    pieces = [projected[(4 * head + part) * one : (4 * head + part + 1) * one] for head in range(heads)]
                    to.append(np.concatenate(pieces))
                else:
                    to.append(projected[part * wide : (part + 1) * wide])
        result = []
        for i, y in enumerate(x):
            attended = np.zeros(wide)
            for head in range(heads):
                of = slice(head * one, (head + 1) * one)
                for j in range(len(x)):
                    if sees(kinds, i, j):
                        logit = float(q[i][of] @ k[j][of]) / math.sqrt(one)
                        attended[of] += logit / (1.0 + math.exp(-logit)) / self.s.norm_length * v[j][of]
            gain, bias = self.p[name + "_output_layernorm_weight"], self.p[name + "_output_layernorm_bias"]
            gated = u[i] * layer_norm(attended, 1e-5, gain, bias)
            if fused:
                output = gated @ self.p[name + "_linear_proj_weight"]
            else:
                output = self.p[name + "_linear_proj.weight"] @ gated
            result.append(output + y if self.s.residual else output)
        return result

    def _head(self, y: Array) -> Array:
        layer = 0
        while f"_mlp._mlp._mlp.{layer}._linear.weight" in self.p:
            y = self.p.linear(f"_mlp._mlp._mlp.{layer}._linear", y)
            layer += 1
            if f"_mlp._mlp._mlp.{layer}._linear.weight" in self.p:
                y = np.maximum(y, 0.0)
        return sigmoid(y)
