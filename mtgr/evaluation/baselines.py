"""What a model has to beat: popularity, smoothed rates of items, and item-based nearest neighbours.

A baseline is fitted on the training events and their labels. To score an event it may use all of the user's
events strictly before the event's time, validation and test events among them: that is what a server would
know. A past event's label is the one that was known at the query's time, computed from the user's events
until then. The label of the whole log would leak: the retention label of yesterday's event says whether the
user came back later.

Item by item matrices are dense: at MovieLens-100K's 1,682 items one takes 23 MB. A catalogue of 50,000 would
need sparse ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mtgr.data.dataset import Int8Array, Int64Array, Interactions, Task
from mtgr.data.split import history_bounds
from mtgr.errors import ConfigurationError
from mtgr.evaluation.metrics import item_columns

Float64Array = npt.NDArray[np.float64]
_State = TypeVar("_State")


class TaskBaseline(Protocol):
    """Scores whether a user's event with an item has a task's label 1."""

    def fit(self, train: Interactions, labels: Mapping[str, Int8Array]) -> None:
        """Learn from training events, sorted by (user, time), and their INT8 [E] labels by task."""

    def task_scores(
        self, user: Int64Array, item: Int64Array, time: Int64Array, known: Interactions
    ) -> dict[str, Float64Array]:
        """Scores by task.

        Args:
            user: INT64 [N].
            item: INT64 [N], the data set's item ids.
            time: INT64 [N], unix seconds; of ``known`` only the user's events strictly before it are used.
            known: The whole log, sorted by (user, time).

        Returns:
            FP64 [N] by task name, higher for likelier.
        """


class CatalogueBaseline(Protocol):
    """Scores every item as a user's next one."""

    def fit(self, train: Interactions, labels: Mapping[str, Int8Array]) -> None:
        """Learn from training events, sorted by (user, time), and their INT8 [E] labels by task."""

    def catalogue_scores(self, user: Int64Array, before: Int64Array, known: Interactions) -> Float64Array:
        """FP64 [N, num_items] scores of all items, columns in ascending order of item id.

        Args:
            user: INT64 [N].
            before: INT64 [N], unix seconds; of ``known`` only the user's events strictly before it are used.
            known: The whole log, sorted by (user, time).
        """


class Popularity:
    """The same ranking for everyone: counts of the training events.

    Args:
        item_ids: INT64 [num_items], all items in ascending order.
    """

    def __init__(self, item_ids: Int64Array) -> None:
        self._item_ids = item_ids
        self._events: Float64Array | None = None
        self._positives: dict[str, Float64Array] = {}

    def fit(self, train: Interactions, labels: Mapping[str, Int8Array]) -> None:
        """Count the events, and those with label 1 for each task, of every item."""
        column = item_columns(train.item, self._item_ids)
        self._events = np.bincount(column, minlength=len(self._item_ids)).astype(np.float64)
        self._positives = {
            task: np.bincount(column, y, len(self._item_ids)).astype(np.float64) for task, y in labels.items()
        }

    def task_scores(
        self, user: Int64Array, item: Int64Array, time: Int64Array, known: Interactions
    ) -> dict[str, Float64Array]:
        """The item's training events with label 1, for each task; users and times do not matter."""
        _fitted(self._events)
        column = item_columns(item, self._item_ids)
        return {task: positives[column] for task, positives in self._positives.items()}

    def catalogue_scores(self, user: Int64Array, before: Int64Array, known: Interactions) -> Float64Array:
        """The number of each item's training events, the same row for every query."""
        return np.tile(_fitted(self._events), (len(user), 1))


class ItemRate:
    """The share of an item's training events with label 1, drawn towards the mean of all items.

    Args:
        item_ids: INT64 [num_items], all items in ascending order.
        prior_events: How many events of the overall rate are added to every item's own. Tuned on validation.
    """

    def __init__(self, item_ids: Int64Array, prior_events: float = 2.0) -> None:
        self._item_ids = item_ids
        self._prior_events = prior_events
        self._rates: dict[str, Float64Array] | None = None

    def fit(self, train: Interactions, labels: Mapping[str, Int8Array]) -> None:
        """Compute every item's rate for each task."""
        column = item_columns(train.item, self._item_ids)
        events = np.bincount(column, minlength=len(self._item_ids))
        self._rates = {}
        for task, label in labels.items():
            overall = float(label.mean()) if len(label) else 0.0
            positives = np.bincount(column, label, len(self._item_ids))
            self._rates[task] = (positives + self._prior_events * overall) / (events + self._prior_events)

    @property
    def rates(self) -> dict[str, Float64Array]:
        """FP64 [num_items] by task, columns in ascending order of item id."""
        return _fitted(self._rates)

    def task_scores(
        self, user: Int64Array, item: Int64Array, time: Int64Array, known: Interactions
    ) -> dict[str, Float64Array]:
        """The item's smoothed rate, for each task; users and times do not matter."""
        column = item_columns(item, self._item_ids)
        return {task: rate[column] for task, rate in self.rates.items()}


class ItemKNN:
    """Item-based nearest neighbours on who rated what.

    Two items are similar if the same users have training events with both: c / sqrt(n_i n_j) x c / (c +
    shrinkage) for c common users and n_i users of item i.

    A task's score starts from the item's smoothed rate plus how much the user's known labels lie above the
    rates of their items, and adds the similarity-weighted mean of what that expectation missed on the user's
    most similar past items. With no similar item in the history it is the expectation alone, and without a
    history the item's rate. (The plain weighted mean of the neighbours' labels is clearly weaker: 0.767
    against 0.797 engagement AUC on validation.)

    A catalogue score is the sum of an item's similarities to the user's latest events. In MovieLens-100K what
    a user rates next follows from the last few ratings far more than from all of them.

    Defaults are tuned on the validation part: the history of catalogue scores by NDCG@10, the shrinkage by that and by
    the mean AUC of engagement and monetization, the others by that AUC.

    Args:
        item_ids: INT64 [num_items], all items in ascending order.
        tasks: The tasks to score; they label past events as known at a query's time.
        shrinkage: Common users at which a similarity is halved, so that few common users count for less.
        neighbours: Most similar past items that a task's score uses.
        prior_similarity: Similarity with which the expectation holds against the neighbours.
        user_prior_events: Events at which the user's deviation counts half.
        catalogue_history: Latest events of the user that catalogue scores use.
    """

    def __init__(
        self,
        item_ids: Int64Array,
        tasks: Sequence[Task],
        *,
        shrinkage: float = 1.0,
        neighbours: int = 20,
        prior_similarity: float = 5.0,
        user_prior_events: float = 20.0,
        catalogue_history: int = 5,
    ) -> None:
        self._item_ids = item_ids
        self._tasks = tuple(tasks)
        self._shrinkage = shrinkage
        self._neighbours = neighbours
        self._prior_similarity = prior_similarity
        self._user_prior_events = user_prior_events
        self._catalogue_history = catalogue_history
        self._item_rate = ItemRate(item_ids)
        self._popularity = Popularity(item_ids)
        self._similarity: Float64Array | None = None

    def fit(self, train: Interactions, labels: Mapping[str, Int8Array]) -> None:
        """Compute the item by item similarities and the items' rates."""
        missing = [task.name for task in self._tasks if task.name not in labels]
        if missing:
            raise ConfigurationError(f"Pass training labels for every task: {', '.join(missing)} is missing.")
        self._item_rate.fit(train, labels)
        self._popularity.fit(train, labels)
        num_users = int(train.user.max()) + 1 if len(train) else 0
        rated = np.zeros((num_users, len(self._item_ids)))
        rated[train.user, item_columns(train.item, self._item_ids)] = 1.0
        common = rated.T @ rated
        users = np.diag(common)
        norm = np.sqrt(np.outer(users, users))
        similarity = np.divide(common, norm, out=np.zeros_like(common), where=norm > 0)
        similarity *= np.divide(common, common + self._shrinkage, out=np.zeros_like(common), where=common > 0)
        np.fill_diagonal(similarity, 0.0)
        self._similarity = similarity

    def task_scores(
        self, user: Int64Array, item: Int64Array, time: Int64Array, known: Interactions
    ) -> dict[str, Float64Array]:
        """The expectation for user and item, corrected by the neighbours in the history, for each task."""
        similarity = _fitted(self._similarity)
        column, known_column = item_columns(item, self._item_ids), item_columns(known.item, self._item_ids)
        rates = self._item_rate.rates
        scores = {task.name: np.empty(len(item)) for task in self._tasks}
        start, end = history_bounds(known, user, time)
        # Queries with the same history are scored together: they share its labels. Its end names it if it is not empty.
        _, first, history_of_query = np.unique(np.where(end > start, end, -1), return_index=True, return_inverse=True)
        by_history = np.argsort(history_of_query, kind="stable")
        queries_of = np.split(by_history, np.cumsum(np.bincount(history_of_query, minlength=len(first)))[:-1])
        for query, queries in zip(first, queries_of, strict=True):
            span = slice(int(start[query]), int(end[query]))
            past = known_column[span]
            weight, neighbour = _largest(similarity[column[queries]][:, past], self._neighbours)
            history = Interactions(known.user[span], known.item[span], known.action[span], known.time[span])
            for task in self._tasks:
                rate = rates[task.name]
                surprise = task.label(history) - rate[past]
                deviation = surprise.sum() / (len(past) + self._user_prior_events)
                missed = (surprise - deviation)[neighbour]
                correction = (weight * missed).sum(axis=1) / (weight.sum(axis=1) + self._prior_similarity)
                scores[task.name][queries] = rate[column[queries]] + deviation + correction
        return scores

    def catalogue_scores(self, user: Int64Array, before: Int64Array, known: Interactions) -> Float64Array:
        """The sum of similarities to the user's latest events; popularity for a user without history."""
        similarity = _fitted(self._similarity)
        known_column = item_columns(known.item, self._item_ids)
        scores = self._popularity.catalogue_scores(user, before, known)
        for row, (start, end) in enumerate(zip(*history_bounds(known, user, before), strict=True)):
            if end > start:
                latest = known_column[max(start, end - self._catalogue_history) : end]
                scores[row] = similarity[latest].sum(axis=0)
        return scores


def _largest(values: Float64Array, count: int) -> tuple[Float64Array, Int64Array]:
    """The ``count`` largest of each row of [N, M], in no order, and their columns; all if M is smaller."""
    if values.shape[1] <= count:
        index = np.broadcast_to(np.arange(values.shape[1]), values.shape)
        return values, index
    index = np.argpartition(-values, count - 1, axis=1)[:, :count]
    return np.take_along_axis(values, index, axis=1), index


def _fitted(state: _State | None) -> _State:
    if state is None:
        raise ConfigurationError("The baseline is not fitted: call fit() with training events first.")
    return state
