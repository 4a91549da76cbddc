"""What the models count, as Prometheus time series, without Triton's own types."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

# Bounds of a report: each observation costs the reporter's thread about 14 us.
MAX_OBSERVATIONS = 20_000


@dataclass(frozen=True)
class MetricSpec:
    """One time series.

    Attributes:
        name: Its name.
        description: What it counts, for the metrics page.
        counter: Whether it only grows; otherwise a gauge.
        labels: Names and values that tell it apart from others of this name.
        buckets: Upper bounds, ascending, which make it a histogram.
    """

    name: str
    description: str
    counter: bool = True
    labels: tuple[tuple[str, str], ...] = ()
    buckets: tuple[float, ...] = ()


DROPPED = MetricSpec("mtgr_metrics_dropped_total", "Observations left out of histograms, too many in one second")


class MetricRegistry:
    """Collects what happens until a reporter takes it; safe for threads.

    A value that is not a finite number changes nothing, and neither does a counter's step back: Triton 2.51 can die of
    an increment that it refuses.

    Args:
        max_observations: Most observations kept between two reports; further ones are only counted.
    """

    def __init__(self, max_observations: int = MAX_OBSERVATIONS) -> None:
        self._lock = threading.Lock()
        self._max_observations = max_observations
        self._added: dict[MetricSpec, float] = {}
        self._totals: dict[MetricSpec, float] = {}
        self._values: dict[MetricSpec, float] = {}
        self._observed: list[tuple[MetricSpec, float]] = []

    def increment(self, spec: MetricSpec, amount: float = 1.0) -> None:
        """Add to a counter; an amount of 0 makes it appear."""
        if 0 <= amount < math.inf:
            with self._lock:
                self._added[spec] = self._added.get(spec, 0.0) + amount

    def advance(self, spec: MetricSpec, total: float) -> None:
        """Bring a counter that somebody else keeps up to ``total``."""
        with self._lock:
            last = self._totals.get(spec, 0.0)
            if last <= total < math.inf:
                self._added[spec] = self._added.get(spec, 0.0) + total - last
                self._totals[spec] = total

    def set(self, spec: MetricSpec, value: float) -> None:
        """Set a gauge."""
        if math.isfinite(value):
            with self._lock:
                self._values[spec] = value

    def observe(self, spec: MetricSpec, value: float) -> None:
        """Add one value to a histogram."""
        if not math.isfinite(value):
            return
        with self._lock:
            if len(self._observed) < self._max_observations:
                self._observed.append((spec, value))
            else:
                self._added[DROPPED] = self._added.get(DROPPED, 0.0) + 1

    def changes(self) -> list[tuple[MetricSpec, float]]:
        """What to add to each counter since the last call, every gauge's value, and one pair for each observation."""
        with self._lock:
            changes = [*self._added.items(), *self._values.items(), *self._observed]
            self._added = {}
            self._observed = []
        return changes
