"""Metrics against definitions written as loops, and bootstrap intervals against resampled data."""

from __future__ import annotations

import math
import time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtgr.data.dataset import Interactions
from mtgr.errors import ConfigurationError
from mtgr.evaluation.bootstrap import (
    auc_difference,
    gauc_difference,
    mean_difference,
    paired_bootstrap,
    resampled_auc,
    resampled_gauc,
    resampled_mean,
)
from mtgr.evaluation.metrics import (
    auc,
    gains_at_k,
    gauc,
    group_aucs,
    hit_rate_at_k,
    hits_at_k,
    item_columns,
    ndcg_at_k,
    seen_mask,
    target_ranks,
)

Array = npt.NDArray[np.float64]
events_strategy = st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=60)


def columns(rows: list[tuple[int, int, int]]) -> tuple[npt.NDArray[np.int8], Array, npt.NDArray[np.int64]]:
    array = np.array(rows)
    return array[:, 0].astype(np.int8), array[:, 1].astype(np.float64), array[:, 2].astype(np.int64)


def auc_by_pairs(labels: npt.NDArray[np.int8], scores: Array) -> float:
    wins = [float(p > n) + 0.5 * float(p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return float(np.mean(wins)) if wins else math.nan


@given(events_strategy)
def test_auc_counts_pairs(rows: list[tuple[int, int, int]]) -> None:
    labels, scores, _ = columns(rows)
    assert auc(labels, scores) == pytest.approx(auc_by_pairs(labels, scores), nan_ok=True)


def test_auc_by_hand() -> None:
    assert auc(np.array([0, 1, 1]), np.array([0.1, 0.1, 0.9])) == 0.75
    assert auc(np.array([1, 0]), np.array([0.0, 1.0])) == 0.0
    assert math.isnan(auc(np.array([1, 1]), np.array([0.0, 1.0])))
    assert math.isnan(auc(np.array([]), np.array([])))


@given(events_strategy)
def test_gauc_weighs_users_by_events(rows: list[tuple[int, int, int]]) -> None:
    labels, scores, groups = columns(rows)
    total = weight = 0.0
    for group in set(groups.tolist()):
        mine = groups == group
        value = auc_by_pairs(labels[mine], scores[mine])
        if not math.isnan(value):
            total, weight = total + value * mine.sum(), weight + mine.sum()
    assert gauc(labels, scores, groups) == pytest.approx(total / weight if weight else math.nan, nan_ok=True)


def test_group_aucs_names_groups_and_sizes() -> None:
    labels, scores = np.array([1, 0, 1, 1]), np.array([2.0, 1.0, 0.0, 5.0])
    names, aucs, sizes = group_aucs(labels, scores, np.array([9, 9, 9, 3]))
    assert names.tolist() == [3, 9]
    assert sizes.tolist() == [1, 3]
    assert math.isnan(aucs[0])
    assert aucs[1] == 0.5


@pytest.mark.parametrize(
    ("labels", "scores", "match"),
    [([0, 1], [0.0], "equal length"), ([0, 2], [0.0, 1.0], "0 or 1"), ([0, 1], [0.0, math.nan], "NaN")],
)
def test_bad_input_to_auc(labels: list[int], scores: list[float], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        auc(np.array(labels), np.array(scores))


def test_ranks_are_pessimistic_and_skip_excluded_items() -> None:
    scores = np.array([[3.0, 2.0, 2.0, 1.0]] * 3)
    target = np.array([2, 2, 0])
    assert target_ranks(scores, target).tolist() == [3, 3, 1]
    exclude = np.array([[True, False, False, True], [False, False, True, False], [False, True, True, True]])
    assert target_ranks(scores, target, exclude).tolist() == [2, math.inf, 1]
    assert target_ranks(np.zeros((1, 50)), np.array([7])).tolist() == [50]


@given(st.integers(1, 6), st.integers(1, 8), st.randoms(use_true_random=False))
def test_ranks_equal_a_sort(n: int, items: int, random: object) -> None:
    generator = np.random.default_rng(random.randint(0, 10**9))  # type: ignore[attr-defined]
    scores = generator.integers(0, 4, (n, items)).astype(np.float64)
    target = generator.integers(0, items, n)
    exclude = generator.random((n, items)) < 0.3
    exclude[np.arange(n), target] = False
    for row, rank in enumerate(target_ranks(scores, target, exclude)):
        shown = sorted((-scores[row, i], i == target[row]) for i in range(items) if not exclude[row, i])
        assert [is_target for _, is_target in shown].index(True) + 1 == rank


def test_ranks_refuse_what_does_not_fit() -> None:
    with pytest.raises(ConfigurationError, match="one target"):
        target_ranks(np.zeros((2, 3)), np.array([0]))
    with pytest.raises(ConfigurationError, match="mask"):
        target_ranks(np.zeros((1, 3)), np.array([0]), np.zeros((1, 2), dtype=bool))
    with pytest.raises(ConfigurationError, match="NaN"):
        target_ranks(np.array([[0.0, math.nan]]), np.array([0]))


def test_hit_rate_and_ndcg_by_hand() -> None:
    ranks = np.array([1.0, 3.0, 10.0, 11.0, math.inf])
    assert hit_rate_at_k(ranks, 10) == 0.6
    assert ndcg_at_k(ranks, 10) == pytest.approx((1 + 0.5 + 1 / math.log2(11)) / 5)
    assert hits_at_k(np.array([1, 2]), 1).tolist() == [1, 0]
    assert gains_at_k(np.array([3]), 3).tolist() == [0.5]
    assert math.isnan(hit_rate_at_k(np.array([]), 10))


def test_seen_mask_holds_strictly_earlier_items() -> None:
    known = Interactions(
        np.array([0, 0, 0, 1]), np.array([10, 30, 20, 20]), np.zeros(4, np.int32), np.array([1, 2, 2, 9])
    )
    mask = seen_mask(known, np.array([0, 0, 1]), np.array([2, 3, 9]), np.array([10, 20, 30]))
    assert mask.tolist() == [[True, False, False], [True, True, True], [False, False, False]]
    with pytest.raises(ConfigurationError, match="Item 30 is not in the catalogue"):
        item_columns(known.item, np.array([10, 20]))


def sample(
    seed: int, users: int = 60, size: int = 600
) -> tuple[npt.NDArray[np.int8], Array, Array, npt.NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    user = generator.integers(0, users, size)
    labels = (generator.random(size) < 0.4).astype(np.int8)
    noise = generator.normal(size=(2, size))
    return labels, np.round(labels + noise[0], 1), np.round(0.3 * labels + noise[1], 1), user


@pytest.mark.parametrize("rounded", [True, False])
def test_resampled_metrics_equal_the_metric_of_repeated_events(rounded: bool) -> None:
    labels, scores, _, user = sample(0)
    if not rounded:
        scores = scores + np.random.default_rng(9).normal(size=len(scores))
        assert len(np.unique(scores)) == len(scores)
    counts = np.random.default_rng(1).multinomial(60, [1 / 60] * 60)
    drawn = [np.flatnonzero(user == u) for u in range(60) for _ in range(counts[u])]
    copies = np.concatenate([np.full(len(rows), i) for i, rows in enumerate(drawn)])
    rows, weight = np.concatenate(drawn), counts.astype(np.float64)
    assert resampled_auc(labels, scores, user)(weight) == pytest.approx(auc(labels[rows], scores[rows]), abs=1e-12)
    assert resampled_gauc(labels, scores, user)(weight) == pytest.approx(
        gauc(labels[rows], scores[rows], copies), abs=1e-12
    )
    assert resampled_mean(scores, user)(weight) == pytest.approx(scores[rows].mean(), abs=1e-12)


def test_differences_of_all_events_are_the_metrics_differences() -> None:
    labels, a, b, user = sample(2)
    user = user * 7 + 3  # ids need not be dense
    result = auc_difference(labels, a, b, user, num_resamples=200)
    assert result.difference == pytest.approx(auc(labels, a) - auc(labels, b), abs=1e-12)
    assert 0 < result.low < result.difference < result.high
    result = gauc_difference(labels, a, b, user, num_resamples=200)
    assert result.difference == pytest.approx(gauc(labels, a, user) - gauc(labels, b, user), abs=1e-12)
    assert result.low < result.difference < result.high
    result = mean_difference(a, b, user, num_resamples=200)
    assert result.difference == pytest.approx(a.mean() - b.mean(), abs=1e-12)


def test_equal_sides_differ_by_exactly_nothing_and_seeds_repeat() -> None:
    labels, a, b, user = sample(3)
    same = auc_difference(labels, a, a, user, num_resamples=50)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    first, again, other = (auc_difference(labels, a, b, user, num_resamples=50, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_interval_covers_the_truth_and_users_are_the_unit() -> None:
    # 40 users, 25 equal values each: the standard error is that of 40 draws, not of 1,000.
    generator = np.random.default_rng(4)
    covered = 0
    for trial in range(100):
        values = np.repeat(generator.normal(size=40), 25)
        result = mean_difference(values, np.zeros(1000), np.repeat(np.arange(40), 25), num_resamples=300, seed=trial)
        covered += result.low <= 0 <= result.high
        assert 0.3 < result.high - result.low < 1.0
    assert covered >= 85


def test_a_resample_without_the_metric_is_left_out() -> None:
    # One of two users has the only positive: half of the resamples hold one class.
    labels, user = np.array([1, 0, 0, 0], dtype=np.int8), np.array([0, 0, 1, 1])
    result = auc_difference(labels, np.array([1.0, 0, 0, 0]), np.zeros(4), user, num_resamples=40)
    assert (result.difference, result.low, result.high) == (0.5, 0.5, 0.5)
    nothing = auc_difference(np.zeros(4), np.zeros(4), np.zeros(4), user, num_resamples=5)
    assert math.isnan(nothing.difference)
    assert math.isnan(nothing.low)


@pytest.mark.parametrize("bad", [{"num_resamples": 0}, {"confidence": 1.0}, {"num_users": 0}])
def test_bootstrap_refuses_bad_settings(bad: dict[str, float]) -> None:
    settings = {"num_users": 3, "num_resamples": 2, "confidence": 0.9} | bad
    with pytest.raises(ConfigurationError, match="bootstrap"):
        paired_bootstrap(lambda counts: 0.0, lambda counts: 0.0, **settings)  # type: ignore[arg-type]


def test_a_thousand_resamples_of_ten_thousand_events_are_fast() -> None:
    labels, a, b, user = sample(5, users=900, size=10_000)
    start = time.process_time()
    auc_difference(labels, a, b + 1e-6 * np.arange(10_000), user)
    assert time.process_time() - start < 3.0
