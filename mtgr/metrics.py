"""What the models count, as Prometheus time series, without Triton's own types."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

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
        buckets: Upper bounds, ascending, which make it a histogram: counters of its own name and ``_bucket``, ``_sum``
            and ``_count``.
    """

    name: str
    description: str
    counter: bool = True
    labels: tuple[tuple[str, str], ...] = ()
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Hash once: series are looked up some ten times a request."""
        object.__setattr__(self, "_hash", hash((self.name, self.labels)))

    def __hash__(self) -> int:
        """Of what usually differs."""
        return self._hash  # type: ignore[attr-defined, no-any-return]


@dataclass
class _Observed:
    """What a histogram was given since the last report: how many values up to each bound, not counting others'."""

    counts: list[int]
    total: float = 0.0


@functools.cache
def _counters_of(spec: MetricSpec) -> tuple[MetricSpec, ...]:
    """A histogram's counters: one for each bucket, then the sum and the count."""
    bounds = (*(f"{bound:g}" for bound in spec.buckets), "+Inf")
    return (
        *(MetricSpec(f"{spec.name}_bucket", spec.description, True, (*spec.labels, ("le", one))) for one in bounds),
        MetricSpec(f"{spec.name}_sum", spec.description, True, spec.labels),
        MetricSpec(f"{spec.name}_count", spec.description, True, spec.labels),
    )


class MetricRegistry:
    """Collects what happens until a reporter takes it; safe for threads.

    A value that is not a finite number changes nothing, and neither does a counter's step back: Triton 2.51 can die of
    an increment that it refuses.

    Histograms are counted here, in buckets: Triton's own take every observation by itself, each a message that costs
    the server as much as a small piece of a request.

    Args:
        max_series: Most time series of one name; what would be a further one is labelled ``other``.
    """

    def __init__(self, max_series: int = MAX_SERIES) -> None:
        self._lock = threading.Lock()
        self._max_series = max_series
        self._series: set[MetricSpec] = set()
        self._names: Counter[str] = Counter()
        self._added: dict[MetricSpec, float] = {}
        self._totals: dict[MetricSpec, float] = {}
        self._values: dict[MetricSpec, float] = {}
        self._observed: dict[MetricSpec, _Observed] = {}

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
        """Add one value to a histogram; of negative ones, the sum knows nothing."""
        if not math.isfinite(value):
            return
        with self._lock:
            spec = self._bounded(spec)
            observed = self._observed.get(spec)
            if observed is None:
                observed = self._observed[spec] = _Observed([0] * (len(spec.buckets) + 1))
            observed.counts[bisect_left(spec.buckets, value)] += 1
            observed.total += max(value, 0.0)

    def changes(self) -> list[tuple[MetricSpec, float]]:
        """What to add to each counter since the last call, and every gauge's value."""
        with self._lock:
            added, observed, values = self._added, self._observed, list(self._values.items())
            self._added, self._observed = {}, {}
        changes = [*added.items(), *values]
        for spec, found in observed.items():
            *buckets, total, count = _counters_of(spec)
            reached = list(accumulate(found.counts))
            changes += zip(buckets, map(float, reached), strict=True)
            changes += [(total, found.total), (count, float(reached[-1]))]
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


@functools.cache
def stage_seconds(stage: str) -> MetricSpec:
    """The histogram of the time that requests spend in a stage; one family over all processes.

    Args:
        stage: ``intake`` (the wait for extraction), ``features``, ``cache``, ``queue`` (the wait for an engine),
            ``engine`` or ``blend``.
    """
    description = "Time that requests spend in a stage"
    return MetricSpec("mtgr_stage_seconds", description, labels=(("stage", stage),), buckets=SECONDS)
