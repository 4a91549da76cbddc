"""The router: takes a request's features to an engine that is ready, and its answer to a ranked result."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.features.candidates import CandidateState, candidate_rows
from mtgr.features.catalog import ItemCatalog
from mtgr.features.extract import Features
from mtgr.routing.batching import Inference, ShapeBatcher
from mtgr.routing.buckets import CANDIDATE_BUCKETS, CONTEXT_BUCKETS, bucket, pad
from mtgr.routing.strategies import AUTO, AUTO_ORDER, STRATEGIES, Strategy
from mtgr.schema import Schema

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]

FEWER_THAN_TOP_K = "fewer_than_top_k"
FALLBACK = "fallback"


class Engines(Inference, Protocol):
    """How the router reaches engines: BLS calls inside Triton, direct calls in process."""

    def unready_reason(self, model: str) -> str | None:
        """None if the model answers requests, else why not."""


@dataclass(frozen=True)
class RoutingConfig:
    """Settings of the router.

    Attributes:
        task_weights: Weight of each task in the final score; tasks without one count 0.
        default_top_k: Items recommended to a request that does not say how many.
        rank_limit: Retrieved items that are ranked, at least ``top_k``.
        remove_seen: Whether items the user already had an event with are never recommended.
        max_batch: Most requests merged into one call of a dense engine.
        max_running: Calls that a dense engine is given at a time: as many as it has instances.
        max_pending: Requests in flight; further ones are refused at once.
        max_tokens: Most tokens, padding included, in one call of a dense engine; bounds its memory.
        engine_timeout: Seconds for one call of an engine.
    """

    task_weights: Mapping[str, float] = field(
        default_factory=lambda: {"engagement": 1.0, "retention": 0.1, "monetization": 0.5}
    )
    default_top_k: int = 10
    rank_limit: int = 256
    remove_seen: bool = True
    max_batch: int = 32
    max_running: int = 1
    max_pending: int = 1024
    max_tokens: int = 16_384
    engine_timeout: float = 8.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        for name in ("default_top_k", "rank_limit", "max_batch", "max_running", "max_pending", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"routing: {name} is {getattr(self, name)}; it must be at least 1.")
        if not self.engine_timeout > 0:
            raise ConfigurationError(f"routing: engine_timeout is {self.engine_timeout}; it must be positive.")
        if not all(np.isfinite(weight) for weight in self.task_weights.values()):
            raise ConfigurationError("routing: task weights must be finite numbers.")


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
    """

    items: Int64Array
    scores: Float32Array
    task_scores: Float32Array
    strategy: str
    arm: str
    labels: tuple[str, ...]


class Router:
    """Serves requests; safe for any number of concurrent coroutines.

    Args:
        schema: The schema.
        catalog: The items.
        engines: How to reach engines.
        config: Settings.

    Raises:
        ConfigurationError: If a task weight names no task of the schema.
    """

    def __init__(
        self, schema: Schema, catalog: ItemCatalog, engines: Engines, config: RoutingConfig | None = None
    ) -> None:
        self.schema = schema
        self.catalog = catalog
        self.engines = engines
        self.config = config or RoutingConfig()
        self._pending = 0
        limits = self.config.max_tokens, self.config.engine_timeout
        self._callers = {
            True: ShapeBatcher(engines, self.config.max_batch, self.config.max_running, *limits),
            False: ShapeBatcher(engines, 1, self.config.max_pending, *limits),
        }
        unknown = set(self.config.task_weights) - set(schema.task_names)
        if unknown:
            raise ConfigurationError(
                f"routing: there is a weight for {sorted(unknown)[0]!r}, "
                f"but the tasks are {', '.join(schema.task_names)}."
            )
        self._weights = np.array([self.config.task_weights.get(name, 0.0) for name in schema.task_names])

    async def route(self, features: Features) -> Ranking:
        """Answer one request.

        Raises:
            UnavailableError: If the strategy asked for, or every one under ``auto``, cannot serve, or too many requests
                are in flight.
        """
        if self._pending >= self.config.max_pending:
            raise UnavailableError(f"{self._pending} requests are in flight, as many as are allowed; try again later.")
        self._pending += 1
        try:
            return await self._route(features)
        finally:
            self._pending -= 1

    async def _route(self, features: Features) -> Ranking:
        names = AUTO_ORDER if features.strategy == AUTO else (features.strategy,)
        reasons: list[str] = []
        labels = features.labels
        for name in names:
            strategy = STRATEGIES[name]
            reason = self._unready_reason(strategy, retrieves=not len(features.candidates))
            if reason is None:
                try:
                    return await self._serve(strategy, features, labels)
                except UnavailableError as error:
                    reason = str(error)
                    labels = (*features.labels, FALLBACK)
            reasons.append(f"{name}: {reason}")
        if features.strategy == AUTO:
            raise UnavailableError(
                f"no engine is ready ({'; '.join(reasons)}); run `make export` and restart the server."
            )
        raise UnavailableError(f"strategy {reasons[0]}.")

    def _unready_reason(self, strategy: Strategy, retrieves: bool) -> str | None:
        models = strategy.models if retrieves else (strategy.rank_model,)
        for model in models:
            reason = self.engines.unready_reason(model)
            if reason is not None:
                return reason
        return None

    async def _serve(self, strategy: Strategy, features: Features, labels: tuple[str, ...]) -> Ranking:
        state = CandidateState.from_array(features.candidate_state, self.schema.epoch)
        context = self._context(strategy, features.context)
        if len(features.candidates):
            raw = features.candidates
            items = self.catalog.to_internal(raw)
            wanted = features.top_k or len(raw)
        else:
            wanted = features.top_k or self.config.default_top_k
            items = await self._retrieve(strategy, context, state, max(wanted, self.config.rank_limit))
            raw = self.catalog.to_raw(items)
            if len(raw) < wanted:
                labels = (*labels, FEWER_THAN_TOP_K)
        task_scores = await self._rank(strategy, context, candidate_rows(self.schema, self.catalog, state, items))
        scores = (task_scores @ self._weights).astype(np.float32)
        order = np.lexsort((raw, -scores))[:wanted]
        return Ranking(raw[order], scores[order], task_scores[order], strategy.name, features.arm, labels)

    async def _infer(self, strategy: Strategy, model: str, inputs: Arrays, output: str) -> npt.NDArray[Any]:
        """One output of one call, without the batch dimension.

        Dense engines get batches of one shape; an engine with continuous batching gets every request at once.
        """
        answer = await self._callers[strategy.padded].infer(model, inputs, [output])
        result: npt.NDArray[Any] = answer[output][0]
        return result

    def _context(self, strategy: Strategy, rows: Int32Array) -> Int32Array:
        return pad(rows, bucket(len(rows), CONTEXT_BUCKETS)) if strategy.padded else rows[None]

    async def _retrieve(self, strategy: Strategy, context: Int32Array, state: CandidateState, limit: int) -> Int64Array:
        """Internal ids of at most ``limit`` items, best first."""
        answer = await self._infer(strategy, strategy.retrieve_model, {"context": context}, "items")
        items: Int64Array = answer.astype(np.int64)
        if self.config.remove_seen:
            items = items[~np.isin(items, state.seen_items)]
        return items[:limit]

    async def _rank(self, strategy: Strategy, context: Int32Array, rows: Int32Array) -> Float32Array:
        """FP32 [k, T] of candidate rows INT32 [k, W], in as many calls as the largest bucket makes necessary.

        An engine without buckets splits them itself: it has the context cached before it comes to the second part.
        """
        if not len(rows):
            return np.empty((0, len(self.schema.tasks)), dtype=np.float32)
        step = CANDIDATE_BUCKETS[-1] if strategy.padded else len(rows)
        parts = [rows[start : start + step] for start in range(0, len(rows), step)]
        answers = await asyncio.gather(*(self._rank_part(strategy, context, part) for part in parts))
        return np.concatenate(answers)

    async def _rank_part(self, strategy: Strategy, context: Int32Array, rows: Int32Array) -> Float32Array:
        padded = pad(rows, bucket(len(rows), CANDIDATE_BUCKETS)) if strategy.padded else rows[None]
        inputs: Arrays = {"context": context, "candidates": padded}
        answer = await self._infer(strategy, strategy.rank_model, inputs, "task_scores")
        scores: Float32Array = answer[: len(rows)]
        if not np.isfinite(scores).all():
            raise UnavailableError(f"{strategy.rank_model} returned scores that are not finite numbers")
        return scores
