"""Meta's research HSTU in plain loops, on its own ids: from its equations, one pair of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.oracles.arithmetic import Array, Parameters, State, layer_norm, silu, unit


def time_bucket(seconds: int) -> int:
    """log(max(|dt|, 1)) / 0.301, rounded down, at most 128."""
    return min(math.floor(math.log(max(abs(seconds), 1)) / 0.301), 128)


@dataclass(frozen=True)
class Settings:
    num_heads: int
    concat_ua: bool = False
    activation: str = "silu"
    user_norm: str = "l2_norm"
    item_l2_norm: bool = True


class ResearchOracle:
    def __init__(self, state: State, settings: Settings) -> None:
        self.p = Parameters(state)
        self.s = settings
        self.width = self.p["_embedding_module._item_emb.weight"].shape[1]
        self.layers = sum(name.endswith("._uvqk") for name in state)

    def similarities(self, items: Sequence[int], times: Sequence[int], next_time: int | None = None) -> Array:
        """Of items 0, 1, 2, ... to what comes after ``items``; 0 stands for an item that is not known."""
        query = self._query(items, times, next_time)
        table = self.p["_embedding_module._item_emb.weight"]
        return np.array([float(query @ (unit(row) if self.s.item_l2_norm else row)) for row in table], dtype=np.float64)

    def _query(self, items: Sequence[int], times: Sequence[int], next_time: int | None) -> Array:
        if not items:
            return np.zeros(self.width)
        x = []
        for position, item in enumerate(items):
            y = self.p["_embedding_module._item_emb.weight"][item] * math.sqrt(self.width)
            y = y + self.p["_input_features_preproc._pos_emb.weight"][position]
            x.append(y if item != 0 else np.zeros(self.width))
        following = [*times[1:], times[-1] if next_time is None else next_time]
        for layer in range(self.layers):
            x = self._block(f"_hstu._attention_layers.{layer}.", x, times, following)
        return layer_norm(x[-1], 1e-6) if self.s.user_norm == "layer_norm" else unit(x[-1])

    def _block(self, name: str, x: list[Array], times: Sequence[int], following: Sequence[int]) -> list[Array]:
        heads = self.s.num_heads
        output = self.p[name + "_o.weight"].shape[1]
        wide = output // 3 if self.s.concat_ua else output
        narrow = self.p[name + "_uvqk"].shape[1] // 2 - wide
        parts = []
        for y in x:
            projected = layer_norm(y, 1e-6) @ self.p[name + "_uvqk"]
            if self.s.activation == "silu":
                projected = silu(projected)
            parts.append(np.split(projected, [wide, 2 * wide, 2 * wide + narrow]))
        bias = name + "_rel_attn_bias._pos_w" in self.p
        padded = len(self.p["_input_features_preproc._pos_emb.weight"])
        result = []
        for i, y in enumerate(x):
            attended = np.zeros(wide)
            for head in range(heads):
                of_value = slice(head * wide // heads, (head + 1) * wide // heads)
                of_key = slice(head * narrow // heads, (head + 1) * narrow // heads)
                for j in range(i + 1):
                    logit = float(parts[i][2][of_key] @ parts[j][3][of_key])
                    if bias:
                        logit += float(self.p[name + "_rel_attn_bias._pos_w"][padded - 1 - (i - j)])
                        logit += float(self.p[name + "_rel_attn_bias._ts_w"][time_bucket(following[i] - times[j])])
                    attended[of_value] += logit / (1.0 + math.exp(-logit)) / padded * parts[j][1][of_value]
            normal = layer_norm(attended, 1e-6)
            u = parts[i][0]
            gated = np.concatenate([u, normal, u * normal]) if self.s.concat_ua else u * normal
            result.append(self.p.linear(name + "_o", gated) + y)
        return result
