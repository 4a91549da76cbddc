"""Brings counts to Triton's metrics page, once a second and not per request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from mtgr.metrics import MetricSpec

SECONDS = 1.0
Changes = Callable[[], Iterable[tuple[MetricSpec, float]]]


class MetricReporter:
    """Adds to counters and sets gauges from a thread of its own.

    Args:
        pb_utils: Triton's module, which exists inside its stub only.
        changes: Gives what to add to each counter and the value of each gauge.
        seconds: Time between two reports.
    """

    def __init__(self, pb_utils: Any, changes: Changes, seconds: float = SECONDS) -> None:
        self._pb_utils = pb_utils
        self._changes = changes
        self._seconds = seconds
        self._families: dict[str, Any] = {}
        self._series: dict[MetricSpec, Any] = {}
        self._ended = threading.Event()
        self.report()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def report(self) -> None:
        """Bring the page up to date."""
        for spec, change in self._changes():
            known = spec in self._series
            if not known:
                self._series[spec] = self._metric(spec)
            elif spec.counter and not change:
                continue
            metric = self._series[spec]
            if spec.counter:
                metric.increment(change)
            else:
                metric.set(change)

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            self.report()

    def _metric(self, spec: MetricSpec) -> Any:
        family = self._pb_utils.MetricFamily
        if spec.name not in self._families:
            kind = family.COUNTER if spec.counter else family.GAUGE
            self._families[spec.name] = family(name=spec.name, description=spec.description, kind=kind)
        return self._families[spec.name].Metric(labels=dict(spec.labels))
