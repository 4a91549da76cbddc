"""Serves one request on one strategy: retrieve where there are no candidates, score, blend, sort."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.errors import UnavailableError
from mtgr.features.candidates import candidate_rows
from mtgr.features.catalog import ItemCatalog
from mtgr.features.extract import Features
from mtgr.features.state import CandidateState
from mtgr.routing.buckets import CONTEXT_BUCKETS, bucket, pad
from mtgr.routing.config import RoutingConfig
from mtgr.routing.strategies import Strategy
from mtgr.schema import Schema

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]

# One output of one call of a model: (model, inputs, output) with a leading batch dimension of 1.
Call = Callable[[str, Arrays, str], Awaitable[npt.NDArray[Any]]]

FEWER_THAN_TOP_K = "fewer_than_top_k"


@dataclass(frozen=True)
class Ranking:
    """The answer to a request, best first; equal scores by ascending item id.

    Attributes:
        items: INT64 [m], raw item ids.
        scores: FP32 [m], weighted sums of the task scores.
        task_scores: FP32 [m, T], probabilities.
        strategy: The strategy that served.
        arm: Side of the experiment.
        labels: What the caller should know: ``cold_start``, ``fewer_than_top_k``, ``fallback``.
        explanation: Why this strategy served, for debugging.
    """

    items: Int64Array
    scores: Float32Array
    task_scores: Float32Array
    strategy: str
    arm: str
    labels: tuple[str, ...]
    explanation: str = ""


class Ranker:
    """Turns features into a ranking with whatever engine it is given.

    Args:
        schema: The schema.
        catalog: The items.
        config: Weights and limits.

    Raises:
        ConfigurationError: If a task weight names no task of the schema.
    """

    def __init__(self, schema: Schema, catalog: ItemCatalog, config: RoutingConfig) -> None:
        self.schema = schema
        self.catalog = catalog
        self.config = config
        self._weights = np.array(config.weights_of(schema.task_names))
        # No plan takes more, whatever buckets a policy names.
        self._longest = bucket(schema.max_context, CONTEXT_BUCKETS)

    async def serve(self, strategy: Strategy, features: Features, call: Call) -> Ranking:
        """Rank the request's candidates, or retrieve some and rank those.

        Raises:
            UnavailableError: If an engine fails, or gives scores that are no numbers.
        """
        state = CandidateState.from_array(features.candidate_state, self.schema.epoch)
        rows = features.context
        context = rows[None]
        if strategy.padded:
            length = bucket(len(rows), self.config.context_buckets)
            context = pad(rows, min(length, self._longest) if len(rows) <= self._longest else length)
        labels = features.labels
        if len(features.candidates):
            raw = features.candidates
            items = self.catalog.to_internal(raw)
            wanted = features.top_k or len(raw)
        else:
            wanted = features.top_k or self.config.default_top_k
            items = await self._retrieve(strategy, context, state, max(wanted, self.config.rank_limit), call)
            raw = self.catalog.to_raw(items)
            if len(raw) < wanted:
                labels = (*labels, FEWER_THAN_TOP_K)
        task_scores = await self._rank(strategy, context, candidate_rows(self.schema, self.catalog, state, items), call)
        scores = (task_scores @ self._weights).astype(np.float32)
        order = np.lexsort((raw, -scores))[:wanted]
        return Ranking(raw[order], scores[order], task_scores[order], strategy.name, features.arm, labels)

    async def rescore(self, strategy: Strategy, features: Features, items: Int64Array, call: Call) -> Ranking:
        """Score the very items of another strategy's answer, to compare with it."""
        return await self.serve(strategy, dataclasses.replace(features, candidates=items, top_k=len(items)), call)

    async def _retrieve(
        self, strategy: Strategy, context: Int32Array, state: CandidateState, limit: int, call: Call
    ) -> Int64Array:
        """Internal ids of at most ``limit`` items, best first."""
        answer = await call(strategy.retrieve_model, {"context": context}, "items")
        items: Int64Array = answer[0].astype(np.int64)
        if self.config.remove_seen:
            items = items[~np.isin(items, state.seen_items)]
        return items[:limit]

    async def _rank(self, strategy: Strategy, context: Int32Array, rows: Int32Array, call: Call) -> Float32Array:
        """FP32 [k, T] of candidate rows INT32 [k, W], in as many calls as the largest bucket makes necessary.

        An engine without buckets splits them itself: it has the context cached before it comes to the second part.
        """
        if not len(rows):
            return np.empty((0, len(self.schema.tasks)), dtype=np.float32)
        step = self.config.candidate_buckets[-1] if strategy.padded else len(rows)
        parts = [rows[start : start + step] for start in range(0, len(rows), step)]
        if len(parts) == 1:
            return await self._rank_part(strategy, context, rows, call)
        answers = await asyncio.gather(*(self._rank_part(strategy, context, part, call) for part in parts))
        return np.concatenate(answers)

    async def _rank_part(self, strategy: Strategy, context: Int32Array, rows: Int32Array, call: Call) -> Float32Array:
        padded = pad(rows, bucket(len(rows), self.config.candidate_buckets)) if strategy.padded else rows[None]
        answer = await call(strategy.rank_model, {"context": context, "candidates": padded}, "task_scores")
        scores: Float32Array = answer[0][: len(rows)]
        if not np.isfinite(scores).all():
            raise UnavailableError(f"{strategy.rank_model} returned scores that are not finite numbers")
        return scores
