"""The router's observer in production: counts what happens, and writes down what somebody should know."""

from __future__ import annotations

from mtgr.features.extract import Features
from mtgr.logs import EventLog, Level
from mtgr.metrics import MetricRegistry
from mtgr.routing.breaker import CircuitBreaker, State
from mtgr.routing.metrics import RouterMetrics
from mtgr.routing.ranker import Ranking
from mtgr.routing.reasons import Reason
from mtgr.tracing import TraceContext


class Journal(RouterMetrics):
    """Metrics, and a line for every refusal, breaker and failing engine; with ``debug``, for every answer.

    Attributes:
        log: Where lines go; exchanged when the policy changes.
    """

    def __init__(self, registry: MetricRegistry, item_column: int, log: EventLog) -> None:
        super().__init__(registry, item_column)
        self.log = log

    def answered(self, features: Features, ranking: Ranking, seconds: float) -> None:
        """Count an answer, and explain it where that is wanted."""
        super().answered(features, ranking, seconds)
        if not self.log.enabled(Level.DEBUG):
            return
        self.log.debug(
            "answered",
            **_request(features),
            strategy=ranking.strategy,
            arm=ranking.arm,
            milliseconds=round(seconds * 1e3, 2),
            items=len(ranking.items),
            context_tokens=len(features.context),
            labels=",".join(ranking.labels),
            explanation=ranking.explanation,
        )

    def refused(self, features: Features, reason: Reason, error: BaseException) -> None:
        """Count and write down a request that was not answered."""
        super().refused(features, reason, error)
        level = self.log.error if reason is Reason.INTERNAL else self.log.warning
        level("not_answered", **_request(features), asked=features.strategy, reason=reason.value, error=str(error))

    def engine_failed(self, strategy: str, reason: Reason) -> None:
        """Count and write down a failed call."""
        super().engine_failed(strategy, reason)
        self.log.warning("engine_failed", strategy=strategy, reason=reason.value)

    def breaker(self, breaker: CircuitBreaker) -> None:
        """Show and write down a change of state."""
        super().breaker(breaker)
        level = self.log.info if breaker.state is State.CLOSED else self.log.warning
        level("breaker", model=breaker.name, state=breaker.state.value, cause=breaker.cause)


def _request(features: Features) -> dict[str, str]:
    """What ties a line to a request and its trace."""
    fields = {"request_id": features.request_id} if features.request_id else {}
    trace = TraceContext.parse(features.trace) if features.trace else None
    if trace is not None:
        fields["trace_id"] = trace.trace_id
    return fields
