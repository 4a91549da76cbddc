"""Baselines by hand on small tables, against the future, and on MovieLens-100K."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mtgr.data.dataset import Int64Array, Interactions
from mtgr.data.movielens import MovieLens100K
from mtgr.data.split import chronological_split, leave_last_out
from mtgr.data.tasks import engagement, label_all, retention
from mtgr.errors import ConfigurationError
from mtgr.evaluation.baselines import CatalogueBaseline, ItemKNN, ItemRate, Popularity, TaskBaseline
from mtgr.evaluation.metrics import auc, hit_rate_at_k, item_columns, seen_mask, target_ranks

ITEMS = np.array([10, 20, 30, 40])
TASKS = (engagement(1),)


def table(*rows: tuple[int, int, int, int]) -> Interactions:
    """Events from (user, item, action, time) rows."""
    array = np.array(sorted(rows, key=lambda row: (row[0], row[3])), dtype=np.int64).reshape(-1, 4)
    return Interactions(array[:, 0], array[:, 1], array[:, 2].astype(np.int32), array[:, 3])


# Items 10 and 20 share two users, 10 and 30 one; nobody rated 40.
TRAIN = table((0, 10, 1, 1), (0, 20, 1, 2), (1, 10, 0, 1), (1, 20, 0, 2), (2, 10, 1, 1), (2, 30, 0, 2))
LABELS = label_all(TASKS, TRAIN)


def one(value: int) -> Int64Array:
    return np.array([value], dtype=np.int64)


def test_popularity_counts() -> None:
    model = Popularity(ITEMS)
    model.fit(TRAIN, LABELS)
    assert model.catalogue_scores(np.array([0, 9]), np.array([5, 5]), TRAIN).tolist() == [[3, 2, 1, 0]] * 2
    scores = model.task_scores(np.zeros(4, np.int64), ITEMS, np.full(4, 9), TRAIN)
    assert scores["engagement"].tolist() == [2, 1, 0, 0]


def test_item_rate_is_smoothed_towards_the_mean() -> None:
    model = ItemRate(ITEMS, prior_events=2)
    model.fit(TRAIN, LABELS)
    scores = model.task_scores(np.zeros(4, np.int64), ITEMS, np.full(4, 9), TRAIN)
    assert scores["engagement"] == pytest.approx([3 / 5, 2 / 4, 1 / 3, 1 / 2])


def fitted_knn(**settings: float) -> ItemKNN:
    model = ItemKNN(ITEMS, TASKS, **settings)  # type: ignore[arg-type]
    model.fit(TRAIN, LABELS)
    return model


def test_knn_catalogue_scores_sum_similarities_of_the_latest_items() -> None:
    known = table((5, 20, 1, 1), (5, 10, 1, 2), (5, 30, 1, 3))
    similar_20, similar_30 = 2 / np.sqrt(6) * 2 / 3, 1 / np.sqrt(3) * 1 / 2  # to item 10, shrunk by 1
    model = fitted_knn(shrinkage=1.0)
    assert model.catalogue_scores(one(5), one(3), known)[0] == pytest.approx([similar_20, similar_20, similar_30, 0])
    assert model.catalogue_scores(one(5), one(2), known)[0] == pytest.approx([similar_20, 0, 0, 0])
    latest = fitted_knn(shrinkage=1.0, catalogue_history=1)
    assert latest.catalogue_scores(one(5), one(3), known)[0] == pytest.approx([0, similar_20, similar_30, 0])
    assert model.catalogue_scores(one(6), one(3), known)[0].tolist() == [3, 2, 1, 0]


def test_knn_task_score_by_hand() -> None:
    # The user liked item 10 and not item 30; the query is item 20, whose one neighbour in the history is item 10.
    known = table((5, 10, 1, 1), (5, 30, 0, 2))
    model = fitted_knn(shrinkage=0.0, prior_similarity=0.5, user_prior_events=2.0)
    rate = {10: 3.0 / 5, 20: 2.0 / 4, 30: 1.0 / 3}
    surprise = np.array([1 - rate[10], 0 - rate[30]])
    deviation = surprise.sum() / (2 + 2)
    weight = 2 / np.sqrt(6)
    expected = rate[20] + deviation + weight * (surprise[0] - deviation) / (weight + 0.5)
    assert model.task_scores(one(5), one(20), one(3), known)["engagement"][0] == pytest.approx(expected)


def test_knn_backs_off_to_user_and_item_then_to_the_item() -> None:
    model = fitted_knn(user_prior_events=1.0)
    known = table((5, 10, 1, 1), (5, 20, 1, 1))
    deviation = (1 - 3 / 5 + 1 - 2 / 4) / 3
    # Nobody rated item 40: it has no neighbour. User 6 has no history.
    scores = model.task_scores(np.array([5, 6]), np.array([40, 20]), np.array([3, 3]), known)["engagement"]
    assert scores == pytest.approx([1 / 2 + deviation, 2 / 4])


def test_knn_uses_the_nearest_neighbours_only() -> None:
    known = table((5, 20, 1, 1), (5, 30, 0, 2))
    near = fitted_knn(neighbours=1).task_scores(one(5), one(10), one(3), known)["engagement"]
    both = fitted_knn(neighbours=2).task_scores(one(5), one(10), one(3), known)["engagement"]
    assert near[0] > both[0] + 1e-4  # item 30, disliked, is the farther of the two


def test_knn_does_not_see_the_future_not_even_in_labels() -> None:
    tasks = (engagement(1), retention())
    model = ItemKNN(ITEMS, tasks)
    model.fit(TRAIN, label_all(tasks, TRAIN))
    past = [(5, 10, 1, 1), (5, 30, 0, 2)]
    # The later events give the past ones the retention label 1 and add likes; one is simultaneous with the query.
    later = [(5, 20, 1, 100), (5, 40, 1, 9000)]
    query = (one(5), one(20), one(100))
    blind, sighted = (model.task_scores(*query, table(*rows)) for rows in (past, past + later))
    assert {task: s.tolist() for task, s in blind.items()} == {task: s.tolist() for task, s in sighted.items()}
    assert np.array_equal(
        model.catalogue_scores(one(5), one(100), table(*past)),
        model.catalogue_scores(one(5), one(100), table(*past, *later)),
    )
    assert model.task_scores(one(5), one(20), one(101), table(*past, *later))["engagement"] != blind["engagement"]


def test_queries_in_any_order_and_company_score_alike() -> None:
    known = table((4, 10, 1, 1), (4, 20, 0, 5), (5, 10, 0, 1), (6, 30, 1, 1))
    model = fitted_knn()
    user, item, time = np.array([5, 4, 6, 4, 3, 4]), np.array([20, 30, 10, 20, 10, 40]), np.array([9, 9, 1, 5, 9, 9])
    together = model.task_scores(user, item, time, known)["engagement"]
    alone = [
        model.task_scores(user[i : i + 1], item[i : i + 1], time[i : i + 1], known)["engagement"][0] for i in range(6)
    ]
    assert together.tolist() == pytest.approx(alone)


def test_misuse_is_explained() -> None:
    with pytest.raises(ConfigurationError, match="fit"):
        Popularity(ITEMS).catalogue_scores(one(0), one(0), TRAIN)
    with pytest.raises(ConfigurationError, match="Item 99"):
        Popularity(ITEMS).fit(replace(TRAIN, item=np.full(6, 99)), LABELS)
    with pytest.raises(ConfigurationError, match="retention is missing"):
        ItemKNN(ITEMS, (retention(),)).fit(TRAIN, LABELS)


def test_personal_baselines_beat_popularity_on_movielens() -> None:
    dataset = MovieLens100K()
    events, tasks = dataset.interactions(), dataset.tasks()
    ids = np.array([item.id for item in dataset.items()])
    split = chronological_split(events, 943)
    train, test = events.take(split.train), events.take(split.test)
    labels = label_all(tasks, train)
    truth = label_all(tasks, events)["engagement"][split.test]
    popularity, rate, knn = Popularity(ids), ItemRate(ids), ItemKNN(ids, tasks)
    task_baselines: tuple[TaskBaseline, ...] = (popularity, rate, knn)
    aucs = []
    for model in task_baselines:
        model.fit(train, labels)
        aucs.append(auc(truth, model.task_scores(test.user, test.item, test.time, events)["engagement"]))
    assert aucs[0] + 0.01 < aucs[1]
    assert aucs[1] + 0.03 < aucs[2]

    last = leave_last_out(events, 943)
    assert len(last) == 943
    user, time = events.user[last], events.time[last]
    seen = seen_mask(events, user, time, ids)
    catalogue_baselines: tuple[CatalogueBaseline, ...] = (popularity, knn)
    hit_rates = []
    for ranker in catalogue_baselines:
        scores = ranker.catalogue_scores(user, time, events)
        hit_rates.append(hit_rate_at_k(target_ranks(scores, item_columns(events.item[last], ids), seen), 10))
    assert 0.02 < hit_rates[0] < hit_rates[1] - 0.03
