"""One cell of the comparison: scores of one model on held-out events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.data.dataset import BoolArray, Int64Array, Task
from mtgr.evaluation.baselines import ItemKNN, Popularity
from mtgr.evaluation.metrics import auc, gauc, hit_rate_at_k, item_columns, ndcg_at_k, target_ranks
from mtgr.peers.zoo import Trainable
from mtgr.training.predict import predict_next_items, predict_tasks
from mtgr.training.prepare import PreparedData

Float64Array = npt.NDArray[np.float64]

CUTOFFS = (10, 50, 200)
SEEN_WINDOW = 200  # the sequence length of Meta's MovieLens recipes
BASELINES = {"popularity": "popularity", "item-knn": "item-kNN"}


def score_trained(model: Trainable, data: PreparedData) -> dict[str, float]:
    """Scores of a trained model; see ``scores``."""
    predicted = predict_tasks(model, data.held_out_samples(), len(data.interactions))[~data.known]
    tasks = {name: predicted[:, index] for index, name in enumerate(data.schema.task_names)}
    return scores(data, tasks, predict_next_items(model, data))


def score_baseline(name: str, data: PreparedData, tasks: Sequence[Task]) -> dict[str, float]:
    """Scores of the baseline ``name`` of ``BASELINES``, fitted on the known events; see ``scores``."""
    ids = data.catalog.raw_ids
    baseline = Popularity(ids) if name == "popularity" else ItemKNN(ids, tasks)
    baseline.fit(data.interactions.take(data.known), data.known_labels)
    events, last = data.interactions.take(~data.known), data.interactions.take(data.last)
    return scores(
        data,
        baseline.task_scores(events.user, events.item, events.time, data.interactions),
        baseline.catalogue_scores(last.user, last.time, data.interactions),
    )


def scores(data: PreparedData, tasks: Mapping[str, Float64Array], catalogue: Float64Array) -> dict[str, float]:
    """AUC and GAUC of every task on the held-out events; HR and NDCG of each user's last item.

    The last item is ranked among the full catalogue without items that the user had before. With the leave-one-out
    protocol this is what Meta's generative-recommenders reports (``research/data/eval.py``): every user's last event in
    the table's order, and of the items before it only those of the latest ``SEEN_WINDOW`` events are left out.

    Args:
        data: The dataset.
        tasks: FP64 [held-out events] by task.
        catalogue: FP64 [users with a last event, items].
    """
    held_out = ~data.known
    users = data.interactions.user[held_out]
    columns = item_columns(data.interactions.item, data.catalog.raw_ids)
    ranks = target_ranks(catalogue, columns[data.last], _seen(data, columns))
    result = {}
    for cutoff in CUTOFFS:
        result[f"HR@{cutoff}"] = hit_rate_at_k(ranks, cutoff)
        result[f"NDCG@{cutoff}"] = ndcg_at_k(ranks, cutoff)
    for name, values in tasks.items():
        labels: npt.NDArray[Any] = data.labels[name][held_out]
        result[f"AUC {name}"] = auc(labels, values)
        result[f"GAUC {name}"] = gauc(labels, values, users)
    return result


def _seen(data: PreparedData, columns: Int64Array) -> BoolArray:
    """BOOL [users with a last event, items]: what is not recommended again."""
    seen = np.zeros((len(data.last), len(data.catalog.raw_ids)), dtype=np.bool_)
    for row, (start, end) in enumerate(zip(*data.last_histories(), strict=True)):
        first = max(start, end - SEEN_WINDOW) if data.protocol == "leave-one-out" else start
        seen[row, columns[first:end]] = True
    return seen
