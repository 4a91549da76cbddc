"""Latencies: averages and percentiles against weighted samples, and what becomes of old ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtgr.routing.latency import LatencyTracker, MovingAverage

HALF_LIFE = 10.0
calls = st.lists(st.tuples(st.floats(0.0, 20.0), st.floats(2e-5, 50.0)), min_size=1, max_size=60)


class Clock:
    def __init__(self) -> None:
        self.now = 500.0

    def __call__(self) -> float:
        return self.now


def replay(events: list[tuple[float, float]]) -> tuple[LatencyTracker, np.ndarray, np.ndarray]:
    """The tracker after pauses and latencies, the latencies, and the weights that they should have."""
    clock = Clock()
    tracker = LatencyTracker(HALF_LIFE, clock=clock)
    times = []
    for pause, seconds in events:
        clock.now += pause
        times.append(clock.now)
        tracker.record("m", seconds)
    weights = 0.5 ** ((clock.now - np.array(times)) / HALF_LIFE)
    return tracker, np.array([seconds for _, seconds in events]), weights


@given(calls)
def test_the_mean_is_the_weighted_mean(events: list[tuple[float, float]]) -> None:
    tracker, seconds, weights = replay(events)
    assert tracker.mean("m") == pytest.approx(np.average(seconds, weights=weights))
    assert tracker.weight("m") == pytest.approx(weights.sum())


@given(calls, st.sampled_from((1, 50, 90, 99, 100)))
def test_a_percentile_is_at_most_a_quarter_too_high(events: list[tuple[float, float]], q: float) -> None:
    tracker, seconds, weights = replay(events)
    order = np.argsort(seconds)
    reached = np.cumsum(weights[order]) / weights.sum()
    found = tracker.percentile("m", q)
    assert found is not None
    # Rounding may decide between two neighbours where the weights meet the percentile exactly.
    low = seconds[order][min(np.searchsorted(reached, q / 100 - 1e-9), len(order) - 1)]
    high = seconds[order][min(np.searchsorted(reached, q / 100 + 1e-9), len(order) - 1)]
    assert low * (1 - 1e-6) <= found <= high * 1.25 * (1 + 1e-6)


def test_an_engine_that_got_slower_is_known_as_slow_after_a_few_half_lives() -> None:
    clock = Clock()
    tracker = LatencyTracker(HALF_LIFE, clock=clock)
    for _ in range(1000):
        tracker.record("m", 0.01)
    for _ in range(60):
        clock.now += 1.0
        tracker.record("m", 1.0)
    mean, median = tracker.mean("m"), tracker.percentile("m", 50)
    assert mean is not None
    assert median is not None
    assert mean > 0.4
    clock.now += 20.0
    for _ in range(60):
        clock.now += 1.0
        tracker.record("m", 1.0)
    late = tracker.percentile("m", 50)
    assert late is not None
    assert late >= 1.0


def test_what_is_too_old_is_not_known_any_more() -> None:
    clock = Clock()
    tracker = LatencyTracker(HALF_LIFE, clock=clock)
    assert (tracker.mean("m"), tracker.percentile("m", 99), tracker.weight("m")) == (None, None, 0.0)
    tracker.record("m", 0.5)
    clock.now += 5 * HALF_LIFE
    assert tracker.mean("m") == pytest.approx(0.5)
    clock.now += 2 * HALF_LIFE
    assert tracker.mean("m") is None
    assert tracker.percentile("m", 50) is None


def test_percentiles_survive_weeks_and_extremes() -> None:
    clock = Clock()
    tracker = LatencyTracker(HALF_LIFE, clock=clock)
    for _ in range(100):
        tracker.record("m", 100.0)
        clock.now += 1e5
        tracker.record("m", 0.02)
    found = tracker.percentile("m", 99)
    assert found is not None
    assert 0.02 <= found <= 0.025
    tracker.record("zero", 0.0)
    tracker.record("ages", 1e9)
    ages = tracker.percentile("ages", 50)
    assert tracker.percentile("zero", 50) == pytest.approx(1e-5)
    assert ages is not None
    assert math.isfinite(ages)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 7), max_size=60))
def test_keys_are_bounded_and_the_latest_are_kept(keys: list[int]) -> None:
    tracker = LatencyTracker(max_keys=5, clock=Clock())
    for key in keys:
        tracker.record(key, 0.1)
    latest = list(dict.fromkeys(reversed(keys)))[:5]
    assert len(tracker) == len(latest)
    assert all(tracker.mean(key) is not None for key in latest)


def test_an_average_of_errors_forgets_them() -> None:
    clock = Clock()
    errors = MovingAverage(HALF_LIFE, clock)
    assert errors.mean is None
    for _ in range(10):
        errors.add(1.0)
    for _ in range(40):
        clock.now += 1.0
        errors.add(0.0)
    ratio = errors.mean
    assert ratio is not None
    assert 0.0 < ratio < 0.06
