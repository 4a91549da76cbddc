"""Brings counts to Triton's metrics page, once a second and not per request."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from typing import Any

from mtgr.metrics import MetricSpec

SECONDS = 1.0
Changes = Callable[[], Iterable[tuple[MetricSpec, float]]]


class MetricReporter:
    """Adds to counters and sets gauges from a thread of its own.

    Each of these is a call to the server of about 14 us. One that the server refuses can end the whole server (2.51),
    so that none is made that it might refuse.

    Args:
        pb_utils: Triton's module, which exists inside its stub only.
        changes: Gives what to add to each counter, and the value of each gauge.
        seconds: Time between two reports.
    """

    def __init__(self, pb_utils: Any, changes: Changes, seconds: float = SECONDS) -> None:
        self._pb_utils = pb_utils
        self._changes = changes
        self._seconds = seconds
        self._families: dict[str, Any] = {}
        self._series: dict[MetricSpec, Any] = {}
        self._problem = ""
        self._ended = threading.Event()
        self.report()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def report(self) -> None:
        """Bring the page up to date."""
        for spec, change in self._changes():
            metric = self._series.get(spec)
            if metric is None:
                metric = self._series[spec] = self._metric(spec)
            if not math.isfinite(change):
                continue
            if not spec.counter:
                metric.set(change)
            elif change > 0:
                metric.increment(change)

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self.report()
            except Exception as error:  # noqa: BLE001 - what cannot be counted must not end the counting
                problem = f"metrics: {type(error).__name__}: {error}"
                if problem != self._problem:
                    self._pb_utils.Logger.log_error(problem)
                self._problem = problem

    def _metric(self, spec: MetricSpec) -> Any:
        family = self._pb_utils.MetricFamily
        if spec.name not in self._families:
            kind = family.COUNTER if spec.counter else family.GAUGE
            self._families[spec.name] = family(name=spec.name, description=spec.description, kind=kind)
        return self._families[spec.name].Metric(labels=dict(spec.labels))
