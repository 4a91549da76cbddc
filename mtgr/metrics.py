"""What the models count, as Prometheus time series, without Triton's own types."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricSpec:
    """One time series.

    Attributes:
        name: Its name.
        description: What it counts, for the metrics page.
        counter: Whether it only grows; otherwise a gauge.
        labels: Names and values that tell it apart from others of this name.
    """

    name: str
    description: str
    counter: bool = True
    labels: tuple[tuple[str, str], ...] = ()
