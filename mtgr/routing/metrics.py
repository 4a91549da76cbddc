"""What the router counts: requests, stages, refusals, fallbacks, breakers, padding, and a shadow's drift."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from mtgr.features.extract import Features
from mtgr.features.native import INT, array, compiled
from mtgr.metrics import SECONDS, MetricRegistry, MetricSpec, stage_seconds
from mtgr.routing.admission import Admission
from mtgr.routing.breaker import CircuitBreaker, State
from mtgr.routing.observer import Observer
from mtgr.routing.policy import Policy
from mtgr.routing.ranker import Arrays, Ranking
from mtgr.routing.reasons import Reason, unanswered
from mtgr.routing.router import FALLBACK
from mtgr.routing.shadow import Drift
from mtgr.schema import TYPE_COLUMN, UNKNOWN, TokenType

_PADDING = int(TokenType.PADDING)
_ITEMS = (1.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0)
_DRIFT = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_STATES = {State.CLOSED: 0.0, State.HALF_OPEN: 1.0, State.OPEN: 2.0}

_ALERTING = MetricSpec("mtgr_alerting", "Whether the policy lets alerts fire", counter=False)
_FALLBACKS = MetricSpec("mtgr_fallbacks_total", "Requests answered by another engine than the first that was asked")
_RELOADS = MetricSpec("mtgr_policy_reloads_total", "Changed policy files that were taken over")
_REFUSALS = MetricSpec("mtgr_policy_refusals_total", "Changed policy files that were wrong, so that the old one stays")
_RUNNING = MetricSpec("mtgr_router_running", "Requests that run", counter=False)
_WAITING = MetricSpec("mtgr_router_waiting", "Requests that wait to run", counter=False)
_LIMIT = MetricSpec("mtgr_router_limit", "Requests that may run at a time", counter=False)
_DRIFTS = MetricSpec("mtgr_shadow_max_error", "Largest difference of a shadow's probability", buckets=_DRIFT)
_OVERLAP = MetricSpec(
    "mtgr_shadow_top_overlap", "Part of the ten best items that a shadow shares", buckets=(0.5, 0.9, 1.0)
)
_SPEARMAN = MetricSpec(
    "mtgr_shadow_spearman",
    "Rank correlation of a shadow's scores with the returned ones",
    buckets=(0.9, 0.99, 0.999, 1.0),
)
_UNANSWERED = MetricSpec("mtgr_shadow_unanswered_total", "Shadow calls without an answer")
_UNKNOWN = MetricSpec("mtgr_unknown_items_total", "Candidates that the model does not know")
_SCORED = MetricSpec("mtgr_scored_items_total", "Candidates that were ranked")
_CANDIDATES = MetricSpec("mtgr_candidates", "Candidates of a request; none where items are retrieved", buckets=_ITEMS)


class RouterMetrics(Observer):
    """Counts into a registry.

    Args:
        registry: Where to.
        item_column: Column of the item id in candidate rows.
    """

    def __init__(self, registry: MetricRegistry, item_column: int) -> None:
        self.registry = registry
        self._item_column = item_column
        for spec in (_FALLBACKS, _RELOADS, _REFUSALS, _UNANSWERED, _UNKNOWN, _SCORED):
            registry.increment(spec, 0.0)

    def stage(self, name: str, seconds: float) -> None:
        """Observe a stage."""
        self.registry.observe(stage_seconds(name), seconds)

    def answered(self, features: Features, ranking: Ranking, seconds: float) -> None:
        """Count an answer by the strategy that was asked for, the one that served, and arm: an arm's exposures."""
        self.registry.increment(_answers(features.strategy, ranking.strategy, features.arm))
        self.registry.observe(_seconds(ranking.strategy), seconds)
        if len(features.candidates):
            self.registry.observe(_CANDIDATES, float(len(features.candidates)))
        if FALLBACK in ranking.labels:
            self.registry.increment(_FALLBACKS)

    def refused(self, features: Features, reason: Reason, error: BaseException) -> None:
        """Count an error by reason, by the strategy that was asked for, and by arm."""
        self.registry.increment(unanswered(features.strategy, features.arm, reason))

    def engine_failed(self, strategy: str, reason: Reason) -> None:
        """Count a failed call."""
        labels = (("strategy", strategy), ("reason", reason.value))
        self.registry.increment(MetricSpec("mtgr_engine_failures_total", "Engines' calls that failed", labels=labels))

    def rows(self, strategy: str, inputs: Arrays) -> None:
        """Count tokens and padding, and unknown candidates."""
        real = {name: _without_padding(rows[0]) for name, rows in inputs.items()}
        total = sum(rows.shape[1] for rows in inputs.values())
        tokens, padding = _tokens(strategy)
        self.registry.increment(tokens, total)
        self.registry.increment(padding, total - sum(real.values()))
        if "candidates" in inputs:
            self.registry.increment(_SCORED, real["candidates"])
            unknown = inputs["candidates"][0, : real["candidates"], self._item_column] == UNKNOWN
            self.registry.increment(_UNKNOWN, int(np.count_nonzero(unknown)))

    def breaker(self, breaker: CircuitBreaker) -> None:
        """Count the change and show the state."""
        labels = (("model", breaker.name),)
        description = "Breaker of an engine: 0 closed, 1 half-open, 2 open"
        state = MetricSpec("mtgr_breaker_state", description, counter=False, labels=labels)
        self.registry.set(state, _STATES[breaker.state])
        if breaker.state is State.OPEN:
            self.registry.increment(MetricSpec("mtgr_breaker_openings_total", "Times it opened", labels=labels))

    def shadow(self, drift: Drift | None) -> None:
        """Observe the drift."""
        if drift is None:
            self.registry.increment(_UNANSWERED)
            return
        self.registry.observe(_DRIFTS, drift.max_error)
        self.registry.observe(_OVERLAP, drift.overlap)
        self.registry.observe(_SPEARMAN, drift.spearman)

    def report(self, policy: Policy, admission: Admission, reloads: int, refusals: int) -> None:
        """Bring what others keep into the registry."""
        self.registry.set(_ALERTING, float(policy.alerting))
        self.registry.set(_RUNNING, admission.running)
        self.registry.set(_WAITING, admission.waiting)
        self.registry.set(_LIMIT, admission.limit)
        self.registry.advance(_RELOADS, reloads)
        self.registry.advance(_REFUSALS, refusals)


@compiled(INT, array("int32", 2))
def _without_padding(rows: npt.NDArray[np.int32]) -> int:
    """Rows before the padding, which is at the end: looked for by halves, not to touch them all."""
    low, high = 0, len(rows)
    while low < high:
        middle = (low + high) // 2
        if rows[middle, TYPE_COLUMN] == _PADDING:
            high = middle
        else:
            low = middle + 1
    return low


@functools.lru_cache(maxsize=1024)
def _answers(asked: str, strategy: str, arm: str) -> MetricSpec:
    labels = (("asked", asked), ("strategy", strategy), ("arm", arm))
    return MetricSpec("mtgr_requests_total", "Requests answered", labels=labels)


@functools.cache
def _seconds(strategy: str) -> MetricSpec:
    labels = (("strategy", strategy),)
    return MetricSpec("mtgr_request_seconds", "Time in the router", labels=labels, buckets=SECONDS)


@functools.cache
def _tokens(strategy: str) -> tuple[MetricSpec, MetricSpec]:
    """Tokens and padding among them, which are counted with every call of an engine."""
    labels = (("strategy", strategy),)
    return (
        MetricSpec("mtgr_tokens_total", "Tokens given to engines", labels=labels),
        MetricSpec("mtgr_padding_tokens_total", "Padding among them", labels=labels),
    )
