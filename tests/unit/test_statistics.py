"""Intervals hold the true value as often as they say, on data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mtgr.errors import ConfigurationError
from perf.statistics import effective_size, mean_ratio, quantile_ratio, student_quantile, wilson_interval

Array = np.ndarray


def repeats(generator: np.random.Generator, scale: float, noise: Array, samples: int = 150) -> list[Array]:
    """Log-normal latencies; each repeat is slowed by a noise of its own."""
    return [scale * math.exp(one) * generator.lognormal(2.0, 0.4, samples) for one in noise]


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("quantile", [0.5, 0.99])
def test_ratio_intervals_over_repeats_hold_the_truth(count: int, quantile: float) -> None:
    generator = np.random.default_rng(count)
    held = 0
    for trial in range(200):
        # What slows the machine slows both; a part of the noise is each one's own.
        shared = generator.normal(0, 0.3, count)
        new = repeats(generator, 1.25, shared + generator.normal(0, 0.05, count))
        old = repeats(generator, 1.0, shared + generator.normal(0, 0.05, count))
        interval = quantile_ratio(new, old, quantile, seed=trial).interval()
        held += interval.low <= 1.25 <= interval.high
    assert 0.90 <= held / 200 <= 0.995


def test_repeats_measured_in_turn_are_compared_in_turn() -> None:
    generator = np.random.default_rng(0)
    shared = np.array([0.0, 1.0, -1.0])
    new, old = repeats(generator, 2.0, shared), repeats(generator, 1.0, shared)
    paired = quantile_ratio(new, old, 0.5).interval()
    crossed = quantile_ratio(new, [old[1], old[2], old[0]], 0.5).interval()
    assert paired.high / paired.low < 1.5 < 10 < crossed.high / crossed.low


def test_changes_of_ratios_hold_the_truth() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        ratios = []
        for scale in (1.3, 1.1):
            new = repeats(generator, scale, generator.normal(0, 0.1, 3))
            ratios.append(quantile_ratio(new, repeats(generator, 1.0, generator.normal(0, 0.1, 3)), 0.5, seed=trial))
        interval = (ratios[0] - ratios[1]).interval()
        held += interval.low <= 1.3 / 1.1 <= interval.high
    assert 0.90 <= held / 200 <= 0.995


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_one_repeat_holds_chance_within_it_also_where_neighbours_are_alike(quantile: float) -> None:
    generator = np.random.default_rng(2)

    def series() -> Array:
        """Latencies in runs of ten alike, as of requests that share a batch."""
        return np.exp(np.repeat(generator.normal(0, 0.4, 60), 10))

    held = 0
    for trial in range(200):
        interval = quantile_ratio([series()], [series()], quantile, seed=trial).interval()
        held += interval.low <= 1 <= interval.high
    assert 0.88 <= held / 200 <= 0.995


def test_effective_size_counts_runs_of_alike_samples_once() -> None:
    generator = np.random.default_rng(3)
    independent = generator.normal(size=4000)
    assert 3000 < effective_size(independent, 0.5) <= 4000
    assert 300 < effective_size(np.repeat(independent[:400], 10), 0.5) < 550
    assert effective_size(np.ones(10), 0.5) == 10


def test_more_repeats_make_an_interval_narrower() -> None:
    generator = np.random.default_rng(4)
    values = np.exp(generator.normal(0, 0.1, 24))
    widths = []
    for count in (3, 6, 24):
        interval = mean_ratio(values[:count], np.ones(count)).interval()
        widths.append(math.log(interval.high / interval.low))
    assert widths[0] > widths[1] > widths[2] > 0


def test_one_value_has_no_bounds() -> None:
    interval = mean_ratio([3.0], [2.0]).interval()
    assert (interval.estimate, interval.low, interval.high) == (pytest.approx(1.5), 0.0, math.inf)
    assert not interval.bounded


def test_two_runs_cannot_be_told_apart_by_one_repeat() -> None:
    repeated = mean_ratio([3.0, 3.1], [2.0, 2.0])
    assert (repeated - repeated).interval().bounded
    for alone in (mean_ratio([3.0], [2.0]), quantile_ratio([[3.0, 4.0, 5.0]], [[2.0, 3.0, 2.0]], 0.5)):
        assert not (alone - repeated).interval().bounded
        assert not (repeated - alone).interval().bounded


def test_the_same_seed_gives_the_same_interval() -> None:
    samples = [np.random.default_rng(5).lognormal(size=100)]
    other = [samples[0][::-1] * 1.5]
    assert quantile_ratio(samples, other, 0.9).interval() == quantile_ratio(samples, other, 0.9).interval()


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="at least one repeat"):
        quantile_ratio([], [[1.0]], 0.5)
    for samples in ([], [1.0, 0.0], [math.nan]):
        with pytest.raises(ConfigurationError, match="without answers"):
            quantile_ratio([samples], [[1.0]], 0.5)
    with pytest.raises(ConfigurationError, match="without answers"):
        mean_ratio([0.0], [1.0])


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(0, 100, 0.0, 0.0370), (1, 100, 0.0018, 0.0545), (50, 100, 0.4038, 0.5962), (10, 10, 0.7225, 1.0)],
)
def test_wilson_intervals_are_those_of_the_tables(hits: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(hits, trials) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("hits", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_what_is_no_share_is_refused(hits: int, trials: int) -> None:
    with pytest.raises(ConfigurationError, match="is no share"):
        wilson_interval(hits, trials)


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645), (0.95, 10, 1.81246), (0.975, 200, 1.97190)],
)
def test_students_quantiles_are_those_of_the_tables(probability: float, freedom: int, value: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(value, rel=1e-4)
