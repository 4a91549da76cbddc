"""Meta's DLRMv3 and TorchEasyRec's DlrmHSTU in plain loops, on their own ids: one pair of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.oracles.arithmetic import Array, Parameters, State, layer_norm, sigmoid, silu, unit

CONTEXTUAL, EVENT, CANDIDATE = "contextual", "event", "candidate"


@dataclass(frozen=True)
class Event:
    item: int
    time: int
    action: int  # bits


@dataclass(frozen=True)
class Settings:
    num_heads: int
    norm_length: int
    item_tables: tuple[str, ...]
    contextual_tables: tuple[str, ...] = ()
    min_lengths: tuple[int, ...] = ()
    easy_rec: bool = False
    max_attention_length: int = 0
    offset_positions: bool = True


def sees(kinds: Sequence[str], i: int, j: int, merged: bool, window: int) -> bool:
    """Whether token i sees token j: the rule, told case by case.

    ``merged`` contextual tokens stand in one place, the first, and what stands there sees the whole context. A window
    counts places: candidates all stand in the one after the context's last.
    """
    if i == j:
        return True
    if kinds[j] == CANDIDATE:
        return False
    if merged and kinds[i] == CONTEXTUAL:
        return True
    contextual = kinds.count(CONTEXTUAL)
    length = len(kinds) - kinds.count(CANDIDATE)

    def place(index: int) -> int:
        where = length if kinds[index] == CANDIDATE else index
        return max(where - (contextual - 1), 0) if merged and contextual else where

    if place(j) >= place(i):
        return False
    return window == 0 or place(i) - place(j) <= window


def time_row(seconds: int, rows: int) -> int:
    """sqrt(max(dt, 1e-6) / 60), rounded down, at most the last."""
    return min(math.floor(math.sqrt(max(seconds, 1e-6) / 60.0)), rows - 1)


class STUOracle:
    def __init__(self, state: State, settings: Settings) -> None:
        self.p = Parameters(state)
        self.s = settings
        self.layers = sum(name.endswith("._uvqk_weight") for name in state)
        self.width = self.p["_hstu_transducer._stu_module._stu_layers.0._uvqk_weight"].shape[0]

    def scores(
        self, contextual: Sequence[int | None], events: Sequence[Event], candidates: Sequence[int], request: int
    ) -> Array:
        """Probabilities [k, T]; a contextual value of None is missing."""
        pre = "_hstu_transducer._input_preprocessor."
        kinds = [CONTEXTUAL] * len(contextual) + [EVENT] * len(events) + [CANDIDATE] * len(candidates)
        x: list[Array] = []
        for index, value in enumerate(contextual):
            table = self.p[self.s.contextual_tables[index]]
            long_enough = len(events) + len(candidates) >= self.s.min_lengths[index]
            known = table[value] if value is not None and long_enough else np.zeros(table.shape[1])
            bias = self.p[pre + "_batched_contextual_linear_bias"].reshape(len(contextual), -1)
            x.append(known @ self.p[pre + "_batched_contextual_linear_weights"][index] + bias[index])
        acting = pre + "_action_encoder._combined_action_weights" in self.p
        for event in events:
            y = self._content(event.item)
            if acting:
                y = y + self._mlp(pre + "_action_embedding_mlp", self._action(event.action))
            x.append(y)
        for item in candidates:
            y = self._content(item)
            if acting:
                target = self.p[pre + "_action_encoder._target_action_embedding_table"].reshape(-1)
                y = y + self._mlp(pre + "_action_embedding_mlp", target)
            x.append(y)

        times = [0] * len(contextual) + [event.time for event in events] + [request] * len(candidates)
        x = [
            y * math.sqrt(self.width) + self._position(kinds, index) + self._time(request - times[index])
            for index, y in enumerate(x)
        ]
        for layer in range(self.layers):
            x = self._block(f"_hstu_transducer._stu_module._stu_layers.{layer}.", x, kinds)
        first = len(kinds) - len(candidates)
        return np.array(
            [self._score(x[first + index], item, request) for index, item in enumerate(candidates)], dtype=np.float64
        )

    # Tokens

    def _embeddings(self, item: int) -> list[Array]:
        first, *others = self.s.item_tables
        rows = [self.p[first][item]]
        for table in others:
            name = table.split(".")[-2]
            rows.append(self.p[table][int(self.p[f"item_features.{name}"][item])])
        return rows

    def _content(self, item: int) -> Array:
        pre = "_hstu_transducer._input_preprocessor."
        first, *others = self._embeddings(item)
        y = self._mlp(pre + "_content_embedding_mlp", first)
        if others:
            y = y + self._mlp(pre + "_additional_embedding_mlp", np.concatenate(others))
        return y

    def _action(self, bits: int) -> Array:
        name = "_hstu_transducer._input_preprocessor._action_encoder."
        parts = []
        weights, table = self.p[name + "_combined_action_weights"], self.p[name + "_action_embedding_table"]
        for weight, row in zip(weights, table, strict=True):
            parts.append(row if bits & int(weight) else np.zeros(len(row)))
        return np.concatenate(parts)

    def _position(self, kinds: Sequence[str], index: int) -> Array:
        name = "_hstu_transducer._positional_encoder._position_embeddings_weight"
        if name not in self.p:
            return np.zeros(self.width)
        table = self.p[name]
        length = len(kinds) - kinds.count(CANDIDATE)
        if "_hstu_transducer._positional_encoder._timestamp_embeddings_weight" not in self.p:
            return table[min(index, length, len(table) - 1)]
        own = kinds.count(CONTEXTUAL) if self.s.offset_positions else 0
        if index < own:
            return table[index]
        return table[min(length - min(index, length) + own, len(table) - 1)]

    def _time(self, seconds: int) -> Array:
        name = "_hstu_transducer._positional_encoder._timestamp_embeddings_weight"
        if name not in self.p:
            return np.zeros(self.width)
        return self.p[name][time_row(seconds, len(self.p[name]))]

    # Blocks

    def _block(self, name: str, x: list[Array], kinds: Sequence[str]) -> list[Array]:
        heads = self.s.num_heads
        wide = self.p[name + "_output_weight"].shape[0] // 3
        narrow = self.p[name + "_uvqk_weight"].shape[1] // 2 - wide
        parts = []
        for y in x:
            normal = layer_norm(y, 1e-6, self.p[name + "_input_norm_weight"], self.p[name + "_input_norm_bias"])
            projected = normal @ self.p[name + "_uvqk_weight"] + self.p[name + "_uvqk_beta"]
            parts.append(np.split(projected, [wide, 2 * wide, 2 * wide + narrow]))
        result = []
        for i, y in enumerate(x):
            attended = np.zeros(wide)
            for head in range(heads):
                of_value = slice(head * wide // heads, (head + 1) * wide // heads)
                of_key = slice(head * narrow // heads, (head + 1) * narrow // heads)
                for j in range(len(x)):
                    if not sees(kinds, i, j, self.s.easy_rec, self.s.max_attention_length):
                        continue
                    logit = float(parts[i][2][of_key] @ parts[j][3][of_key]) / math.sqrt(narrow // heads)
                    weight = logit / (1.0 + math.exp(-logit)) / self.s.norm_length
                    attended[of_value] += weight * parts[j][1][of_value]
            u = silu(parts[i][0])
            gain, bias = self.p[name + "_output_norm_weight"], self.p[name + "_output_norm_bias"]
            if len(gain) == wide:
                normal = layer_norm(attended, 1e-6, gain, bias)
            else:
                per_head = zip(np.split(attended, heads), gain, bias, strict=True)
                normal = np.concatenate([layer_norm(part, 1e-6) * g + b for part, g, b in per_head])
            result.append(np.concatenate([u, attended, u * normal]) @ self.p[name + "_output_weight"] + y)
        return result

    # Outputs

    def _score(self, x: Array, item: int, request: int) -> Array:
        user = self._postprocess(x, request)
        y = user * self._mlp("_item_embedding_mlp", np.concatenate(self._embeddings(item)), inner="")
        if self.s.easy_rec:
            layer = 0
            while f"_multitask_module.tower_mlp.mlp.{layer}.perceptron.0.weight" in self.p:
                name = f"_multitask_module.tower_mlp.mlp.{layer}.perceptron."
                y = self.p.linear(name + "0", y)
                y = silu(layer_norm(y, 1e-5, self.p[name + "1.weight"], self.p[name + "1.bias"]))
                layer += 1
            return sigmoid(self.p.linear("_multitask_module.linear", y))
        name = "_multitask_module._prediction_module."
        y = self.p.linear(name + "0", y)
        y = y * sigmoid(layer_norm(y, 1e-5, self.p[name + "1.weight"], self.p[name + "1.bias"]))
        return sigmoid(self.p.linear(name + "2", y))

    def _postprocess(self, x: Array, request: int) -> Array:
        name = "_hstu_transducer._output_postprocessor."
        if name + "_layer_norm.weight" not in self.p:
            return unit(x)
        if name + "_time_feature_combiner.weight" in self.p:
            moment = int(np.float32(request))
            features = []
            lengths, counts = self.p[name + "_period_units"], self.p[name + "_units_per_period"]
            for seconds, units in zip(lengths.reshape(-1), counts.reshape(-1), strict=True):
                angle = (moment // int(seconds)) % int(units) / int(units) * 2 * 3.14
                features += [math.cos(angle), math.sin(angle)]
            x = self.p.linear(name + "_time_feature_combiner", np.concatenate([x, features]))
        return layer_norm(x, 1e-5, self.p[name + "_layer_norm.weight"], self.p[name + "_layer_norm.bias"])

    def _mlp(self, name: str, x: Array, inner: str | None = None) -> Array:
        """Linear, x * sigmoid(LN(x)), linear, LN."""
        inner = ("_mlp." if self.s.easy_rec else "") if inner is None else inner
        gain, bias = ("_weight", "_bias") if self.s.easy_rec else ("weight", "bias")
        y = self.p.linear(f"{name}.{inner}0", x)
        y = y * sigmoid(layer_norm(y, 1e-5, self.p[f"{name}.{inner}1.{gain}"], self.p[f"{name}.{inner}1.{bias}"]))
        y = self.p.linear(f"{name}.{inner}2", y)
        return layer_norm(y, 1e-5, self.p[f"{name}.{inner}3.{gain}"], self.p[f"{name}.{inner}3.{bias}"])
