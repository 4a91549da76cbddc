"""What the router tells whoever counts or logs; this one does neither."""

from __future__ import annotations

from mtgr.features.extract import Features
from mtgr.routing.breaker import CircuitBreaker
from mtgr.routing.ranker import Arrays, Ranking
from mtgr.routing.reasons import Reason
from mtgr.routing.shadow import Drift


class Observer:
    """Takes note of nothing; subclasses override what they care for. Called in the event loop: be quick."""

    def stage(self, name: str, seconds: float) -> None:
        """A stage of a request took so long: ``queue`` or ``engine``."""

    def answered(self, features: Features, ranking: Ranking, seconds: float) -> None:
        """A request was answered."""

    def refused(self, features: Features, reason: Reason, error: BaseException) -> None:
        """A request was not answered."""

    def engine_failed(self, strategy: str, reason: Reason) -> None:
        """An engine did not answer; under ``auto`` the next one is asked."""

    def rows(self, strategy: str, inputs: Arrays) -> None:
        """Rows, with a leading batch dimension of 1, go to an engine."""

    def breaker(self, breaker: CircuitBreaker) -> None:
        """A breaker changed its state."""

    def shadow(self, drift: Drift | None) -> None:
        """A shadow's answer was compared; None if there was none."""
