"""Drift of a shadow: against definitions written out, and where a comparison says nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mtgr.routing.ranker import Ranking
from mtgr.routing.shadow import drift

WEIGHTS = np.array([1.0, 0.1, 0.5])


def ranking(items: list[int], task_scores: np.ndarray) -> Ranking:
    """Best first, as the router gives it."""
    ids, tasks = np.array(items, dtype=np.int64), task_scores.astype(np.float32)
    scores = (tasks @ WEIGHTS).astype(np.float32)
    order = np.lexsort((ids, -scores))
    return Ranking(ids[order], scores[order], tasks[order], "onnx", "default", ())


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of ranks, each counted out."""

    def ranks(values: np.ndarray) -> list[float]:
        return [
            sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
            for value in values
        ]

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("ties", [False, True])
def test_each_figure_is_what_it_says(noise: float, ties: bool) -> None:
    generator = np.random.default_rng(0)
    items = generator.permutation(50).tolist()
    ours = generator.random((50, 3)).round(1 if ties else 6)
    theirs = (ours + noise * generator.standard_normal((50, 3))).round(1 if ties else 6)
    one, other = ranking(items, ours), ranking(items, theirs)
    found = drift(one, other)
    ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
    assert found.max_error == pytest.approx(np.abs(ours - theirs).max(), abs=1e-7)
    assert found.mean_error == pytest.approx(np.abs(ours - theirs).mean(), abs=1e-7)
    assert found.overlap == len(set(one.items[:10].tolist()) & set(other.items[:10].tolist())) / 10
    scores = [(tasks @ WEIGHTS).astype(np.float32) for tasks in (ours, theirs)]
    assert found.spearman == pytest.approx(spearman(*scores), abs=1e-9)
    if not noise:
        assert (found.max_error, found.mean_error, found.overlap) == (0, 0, 1)


def test_a_reversed_ranking_is_noticed() -> None:
    rising = np.linspace(0.1, 0.9, 30)[:, None].repeat(3, axis=1)
    found = drift(ranking(list(range(30)), rising), ranking(list(range(30)), rising[::-1]))
    assert found.spearman == pytest.approx(-1)
    assert found.overlap == 0
    assert found.max_error == pytest.approx(0.8)


def test_few_items_have_few_best() -> None:
    scores = np.array([[0.3] * 3, [0.2] * 3, [0.1] * 3])
    assert drift(ranking([5, 6, 7], scores), ranking([5, 6, 7], scores[[1, 0, 2]])).overlap == 1


@pytest.mark.parametrize("scores", [np.empty((0, 3)), np.full((1, 3), 0.5), np.full((4, 3), 0.5)])
def test_without_an_order_there_is_no_correlation(scores: np.ndarray) -> None:
    one = ranking(list(range(len(scores))), scores)
    found = drift(one, one)
    assert math.isnan(found.spearman)
    assert (found.max_error, found.mean_error, found.overlap) == (0, 0, 1)
