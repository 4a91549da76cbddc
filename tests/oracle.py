"""The network once more, in NumPy float64 and plain loops, written from the equations instead of from the module.

One user, one token, one head, one key at a time. There is no mask: ``_sees`` answers for one pair of tokens by their
segments. There is no padding either: rows of type 0 are dropped before anything is computed. Slots are not read: a
context token's logical index is its place among the rows that remain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.config import ModelConfig
from mtgr.schema import Schema

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int32]

PADDING, PROFILE, HISTORY, REALTIME, CANDIDATE = range(5)
RESERVED_IDS = 2


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def silu_scalar(x: float) -> float:
    return x / (1.0 + math.exp(-x))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def time_bucket(seconds: int, buckets: int) -> int:
    """log(max(|dt|, 1)) / 0.301, rounded down, at most ``buckets``."""
    return min(math.floor(math.log(max(abs(seconds), 1)) / 0.301), buckets)


@dataclass(frozen=True)
class Token:
    """One valid token: what its row says and where it stands."""

    row: list[int]
    segment: int
    index: int  # among the context tokens; for a candidate, among the candidates
    time: int


class Oracle:
    """The reference's reference.

    Args:
        state: The network's parameters and buffers by name.
        config: Hyper-parameters.
        schema: Meaning of the columns.
    """

    def __init__(self, state: Mapping[str, npt.NDArray[Any]], config: ModelConfig, schema: Schema) -> None:
        self.state = {name: np.asarray(value, dtype=np.float64) for name, value in state.items()}
        self.config = config
        self.schema = schema
        self.used: set[str] = set()

    def scores(self, context: Rows, candidates: Rows) -> Array:
        """Probabilities [k, T] of the valid candidates, each of which comes after the whole context."""
        logits, _ = self._run(context, candidates, by_time=False)
        return np.array([[sigmoid(value) for value in row] for row in logits])

    def training_outputs(self, context: Rows, candidates: Rows) -> tuple[Array, Array]:
        """Task logits [k, T] where each candidate has a moment of its own, and a query vector per context token."""
        logits, outputs = self._run(context, candidates, by_time=True)
        return logits, np.array([self._query(x) for x in outputs])

    def next_item_logits(self, context: Rows) -> Array:
        """Logits [I - 2] of every item that is not reserved."""
        _, outputs = self._run(context, context[:0], by_time=False)
        query = self._query(outputs[-1])
        bias = self._get("next_item_head.bias")
        logits = []
        for item in range(RESERVED_IDS, self.schema.num_items):
            vector = self._item(item)
            cosine = float(query @ vector) / math.sqrt(float(vector @ vector))
            logits.append(cosine / self.config.temperature + bias[item])
        return np.array(logits)

    def retrieve(self, context: Rows, count: int) -> list[int]:
        """The ``count`` items of the highest logits, ties by id."""
        logits = self.next_item_logits(context)
        order = sorted(range(len(logits)), key=lambda index: (-logits[index], index))
        return [index + RESERVED_IDS for index in order[:count]]

    # The tokens

    def _run(self, context: Rows, candidates: Rows, by_time: bool) -> tuple[Array, list[Array]]:
        past = self._tokens(context)
        future = self._tokens(candidates)
        tokens = past + future
        seen = [[key for key in past if self._sees(token, key, by_time)] for token in tokens]
        positions = [token.index if token.segment != CANDIDATE else len(seen[i]) for i, token in enumerate(tokens)]
        x = [self._embed(token, position) for token, position in zip(tokens, positions, strict=True)]
        for layer in range(self.config.num_layers):
            x = self._block(layer, x, tokens, positions, seen)
        x = [self._norm("output_norm", y, token.segment) for y, token in zip(x, tokens, strict=True)]
        logits = [self._task_logits(y, token) for y, token in zip(x[len(past) :], future, strict=True)]
        return np.array(logits).reshape(len(future), len(self.schema.tasks)), x[: len(past)]

    def _tokens(self, rows: Rows) -> list[Token]:
        tokens: list[Token] = []
        for row in rows.tolist():
            if row[0] != PADDING:
                tokens.append(Token(row, row[0], len(tokens), row[3]))
        return tokens

    def _sees(self, query: Token, key: Token, by_time: bool) -> bool:
        """Whether ``query`` sees the context token ``key``; a candidate's view of itself is added elsewhere."""
        if query.segment == CANDIDATE:
            return key.segment != REALTIME or not by_time or key.time < query.time
        if query.segment == REALTIME:
            return key.segment != REALTIME or key.index <= query.index
        if key.segment == REALTIME:
            return False
        return self.config.static_attention == "full" or key.index <= query.index

    # Embedding

    def _embed(self, token: Token, position: int) -> Array:
        if token.segment == PROFILE:
            name, parts = "profile", [self._get("embedding.profile_table.weight")[token.row[2]]]
        else:
            candidate = token.segment == CANDIDATE
            name = "candidate" if candidate else "event"
            columns = self.schema.candidate_columns if candidate else self.schema.event_columns
            parts = []
            for column, column_name in enumerate(columns, start=2):
                if column_name == "item":
                    parts.append(self._item(token.row[column]))
                elif column_name != "time":
                    parts.append(self._get(f"embedding.tables.{column_name}.weight")[token.row[column]])
        hidden = silu(self._linear(f"embedding.{name}_mlp.0", np.concatenate(parts)))
        x: Array = self._linear(f"embedding.{name}_mlp.2", hidden)
        return np.add(x, self._get("embedding.position_table.weight")[position])

    def _item(self, item: int) -> Array:
        vector: Array = self._get("embedding.item.project.weight") @ self._get("embedding.item.features")[item]
        vector += self._get("embedding.item.table.weight")[item]
        return vector

    # Blocks

    def _block(
        self, layer: int, x: list[Array], tokens: list[Token], positions: list[int], seen: list[list[Token]]
    ) -> list[Array]:
        c = self.config
        name = f"blocks.{layer}"
        u, v, q, k = [], [], [], []
        for y, token in zip(x, tokens, strict=True):
            uvqk = silu(self._linear(f"{name}.uvqk", self._norm(f"{name}.input_norm", y, token.segment)))
            wide, narrow = c.num_heads * c.dv, c.num_heads * c.dqk
            u.append(uvqk[:wide])
            v.append(uvqk[wide : 2 * wide])
            q.append(uvqk[2 * wide : 2 * wide + narrow])
            k.append(uvqk[2 * wide + narrow :])

        result = []
        for i, token in enumerate(tokens):
            attended = np.zeros(c.num_heads * c.dv)
            keys = [key.index for key in seen[i]]
            if token.segment == CANDIDATE:
                keys.append(i)  # itself
            for head in range(c.num_heads):
                narrow_slice = slice(head * c.dqk, (head + 1) * c.dqk)
                wide_slice = slice(head * c.dv, (head + 1) * c.dv)
                for j in keys:
                    logit = float(q[i][narrow_slice] @ k[j][narrow_slice]) / math.sqrt(c.dqk)
                    logit += self._bias(layer, positions[i] - positions[j], token.time - tokens[j].time)
                    attended[wide_slice] += silu_scalar(logit) * v[j][wide_slice]
            gated = self._norm(f"{name}.output_norm", attended / c.attention_norm_length, token.segment) * u[i]
            result.append(x[i] + self._linear(f"{name}.output", gated))
        return result

    def _bias(self, layer: int, distance: int, seconds: int) -> float:
        c = self.config
        if not c.relative_bias:
            return 0.0
        limit = c.max_positions - 1
        by_position = self._get("relative_bias.position_table")[max(-limit, min(limit, distance)) + limit, layer]
        by_time = self._get("relative_bias.time_table")[time_bucket(seconds, c.time_buckets), layer]
        return float(by_position + by_time)

    def _norm(self, name: str, x: Array, segment: int) -> Array:
        mean = sum(x.tolist()) / len(x)
        variance = sum((value - mean) ** 2 for value in x.tolist()) / len(x)
        normal: Array = (x - mean) / math.sqrt(variance + self.config.norm_epsilon)
        normal *= self._get(f"{name}.gain")[segment]
        normal += self._get(f"{name}.bias")[segment]
        return normal

    # Heads

    def _task_logits(self, x: Array, token: Token) -> list[float]:
        tower = self._mmoe if self.config.heads == "mmoe" else self._shared_bottom
        return [tower(x, task) + self._wide(token, task) for task in range(len(self.schema.tasks))]

    def _shared_bottom(self, x: Array, task: int) -> float:
        hidden = silu(self._linear("task_heads.bottom", x))
        return float(self._linear("task_heads.towers", hidden)[task])

    def _mmoe(self, x: Array, task: int) -> float:
        c = self.config
        experts = silu(self._linear("task_heads.experts", x))
        gates = np.exp(self._linear("task_heads.gates", x)[task * c.num_experts : (task + 1) * c.num_experts])
        mixed = np.zeros(c.head_dim)
        for expert in range(c.num_experts):
            mixed += gates[expert] / gates.sum() * experts[expert * c.head_dim : (expert + 1) * c.head_dim]
        return float(self._get("task_heads.tower")[task] @ mixed + self._get("task_heads.tower_bias")[task])

    def _wide(self, token: Token, task: int) -> float:
        """A number for each id of the row: the columns' ids stand one column after the other in a single table."""
        total, offset = 0.0, 0
        for column, name in enumerate(self.schema.candidate_columns, start=2):
            if name != "time":
                total += float(self._get("wide_terms.table.weight")[offset + token.row[column], task])
                offset += self.schema.column_size(name)
        return total

    def _query(self, x: Array) -> Array:
        y = self._linear("next_item_head.project", x)
        return y / math.sqrt(float(y @ y))

    def _linear(self, name: str, x: Array) -> Array:
        y: Array = self._get(f"{name}.weight") @ x + self._get(f"{name}.bias")
        return y

    def _get(self, name: str) -> Array:
        self.used.add(name)
        return self.state[name]
