"""What the models count, as Prometheus time series, without Triton's own types."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import Counter
from dataclasses import dataclass

# Bound of a report: each observation costs the reporter's thread about 14 us.
MAX_OBSERVATIONS = 20_000
MAX_SERIES = 256
OTHER = "other"

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


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
        max_series: Most time series of one name; what would be a further one is labelled ``other``.
    """

    def __init__(self, max_observations: int = MAX_OBSERVATIONS, max_series: int = MAX_SERIES) -> None:
        self._lock = threading.Lock()
        self._max_observations = max_observations
        self._max_series = max_series
        self._series: set[MetricSpec] = set()
        self._names: Counter[str] = Counter()
        self._added: dict[MetricSpec, float] = {}
        self._totals: dict[MetricSpec, float] = {}
        self._values: dict[MetricSpec, float] = {}
        self._observed: list[tuple[MetricSpec, float]] = []

    def increment(self, spec: MetricSpec, amount: float = 1.0) -> None:
        """Add to a counter; an amount of 0 makes it appear."""
        if 0 <= amount < math.inf:
            with self._lock:
                self._add(spec, amount)

    def advance(self, spec: MetricSpec, total: float) -> None:
        """Bring a counter that somebody else keeps up to ``total``."""
        with self._lock:
            last = self._totals.get(spec, 0.0)
            if last <= total < math.inf:
                self._add(spec, total - last)
                self._totals[spec] = total

    def set(self, spec: MetricSpec, value: float) -> None:
        """Set a gauge."""
        if math.isfinite(value):
            with self._lock:
                self._values[self._bounded(spec)] = value

    def observe(self, spec: MetricSpec, value: float) -> None:
        """Add one value to a histogram."""
        if not math.isfinite(value):
            return
        with self._lock:
            if len(self._observed) < self._max_observations:
                self._observed.append((self._bounded(spec), value))
            else:
                self._add(DROPPED, 1.0)

    def changes(self) -> list[tuple[MetricSpec, float]]:
        """What to add to each counter since the last call, every gauge's value, and one pair for each observation."""
        with self._lock:
            changes = [*self._added.items(), *self._values.items(), *self._observed]
            self._added = {}
            self._observed = []
        return changes

    def _add(self, spec: MetricSpec, amount: float) -> None:
        spec = self._bounded(spec)
        self._added[spec] = self._added.get(spec, 0.0) + amount

    def _bounded(self, spec: MetricSpec) -> MetricSpec:
        if spec in self._series:
            return spec
        if self._names[spec.name] >= self._max_series:
            return dataclasses.replace(spec, labels=tuple((name, OTHER) for name, _ in spec.labels))
        self._series.add(spec)
        self._names[spec.name] += 1
        return spec


def stage_seconds(stage: str) -> MetricSpec:
    """The histogram of the time that requests spend in a stage; one family over all processes.

    Args:
        stage: ``intake`` (the wait for extraction), ``features``, ``cache``, ``queue`` (the wait for an engine),
            ``engine`` or ``blend``.
    """
    description = "Time that requests spend in a stage"
    return MetricSpec("mtgr_stage_seconds", description, labels=(("stage", stage),), buckets=SECONDS)
