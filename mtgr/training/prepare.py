"""From a dataset to a schema, a catalog, and samples, without looking past any user's cut.

Every user's events are cut into 70 % for training, 10 % for validation, and 20 % for testing. Settings are chosen on
validation by models and baselines fitted on the training part; the test events are cut off before anything is derived.
The final model and its baselines are fitted on training and validation together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mtgr.data.dataset import BoolArray, Dataset, Int8Array, Int64Array, Interactions, User
from mtgr.data.samples import Sample, build_samples
from mtgr.data.split import Protocol, history_bounds, leave_last_out, split_by
from mtgr.data.tasks import label_all
from mtgr.features.catalog import SNAPSHOT_PERIOD, ItemCatalog, build_catalog
from mtgr.schema import FIRST_COLUMN, TIME, ProfileField, Schema, TaskSpec

Part = Literal["validation", "test"]

_VALIDATION_FRACTION, _TEST_FRACTION = 0.1, 0.2
_NUMERIC_BUCKETS = 8
_FRONTIER_POWER = 16
_FRONTIER_WEIGHT = 0.3
# On MovieLens-100K the other columns that a schema may have made ranking within users no better, or worse.
_CANDIDATE_COLUMNS = (
    "item",
    TIME,
    "gap",
    "category_rate",
    "recency",
    "popularity",
    "events",
    "since_first",
    "sessions",
    "session_events",
    "user_deviation",
    "user_top_deviation",
    "similar_deviation",
    "similar_top_deviation",
)

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PreparedData:
    """A dataset made ready for training and evaluation.

    Attributes:
        part: Which events are held out, ``validation`` or ``test``.
        users: The users.
        interactions: The log: the whole one, or without the test part if that is not what is held out.
        known: BOOL [E], events to fit on; the others are held out, and come after the user's known ones.
        last: INT64 [U'], each user's last event if it is held out, for leave-last-out.
        known_labels: INT8 [K] of the known events by task, computed from known events alone.
        known_weights: FP32 [K] by task, for tasks whose events do not count alike.
        labels: INT8 [E] by task, computed from the log, for evaluation.
        schema: The schema.
        catalog: Items, with statistics of the known events.
        protocol: How the log was split.
    """

    part: Part
    users: list[User]
    interactions: Interactions
    known: BoolArray
    last: Int64Array
    known_labels: Mapping[str, Int8Array]
    known_weights: Mapping[str, Float32Array]
    labels: Mapping[str, Int8Array]
    schema: Schema
    catalog: ItemCatalog
    protocol: Protocol = "chronological"

    def last_histories(self) -> tuple[Int64Array, Int64Array]:
        """What is known when a user's last event is asked for: INT64 [U'] starts and ends, as ``history_bounds``.

        It is everything strictly before it in time; by the published leave-one-out protocol, everything before it in
        the table, events of the same second included.
        """
        users = self.interactions.user[self.last]
        if self.protocol == "leave-one-out":
            return self.interactions.offsets(len(self.users))[users], self.last.copy()
        return history_bounds(self.interactions, users, self.interactions.time[self.last])

    def with_schema(self, schema: Schema) -> PreparedData:
        """The same data in rows of another schema, on the same split."""
        return dataclasses.replace(self, schema=schema)

    def train_samples(self) -> list[Sample]:
        """Samples of the known events; no held-out event is in any context."""
        known = self.interactions.take(self.known)
        everything = np.ones(len(known), dtype=np.bool_)
        return build_samples(
            self.schema, self.catalog, self.users, known, self.known_labels, everything, self.known_weights
        )

    def held_out_samples(self) -> list[Sample]:
        """Samples whose candidates are the held-out events, each on what came strictly before it."""
        return build_samples(self.schema, self.catalog, self.users, self.interactions, self.labels, ~self.known)


def prepare(
    dataset: Dataset,
    liked_action: int,
    part: Part = "test",
    max_history: int = 1900,
    realtime_step: int = 100,
    protocol: Protocol = "chronological",
) -> PreparedData:
    """Split a dataset and derive everything else from the events before the held-out part.

    Args:
        dataset: The dataset.
        liked_action: Actions from this one on count as liked in cross features.
        part: Events to hold out. For ``validation`` the test events are left out of everything.
        max_history: Longest segment S, in events.
        realtime_step: R_max, in events.
        protocol: Which events are the test and the validation part; see ``mtgr.data.split.split_by``.
    """
    interactions, users, items, tasks = dataset.interactions(), dataset.users(), dataset.items(), dataset.tasks()
    split = split_by(protocol, interactions, len(users), _VALIDATION_FRACTION, _TEST_FRACTION)
    is_known = ~split.test
    if part == "validation":
        interactions, is_known = interactions.take(~split.test), split.train[~split.test]
    known = interactions.take(is_known)
    last = leave_last_out(interactions, len(users), by_order=protocol == "leave-one-out")
    categories = tuple(sorted({category for item in items for category in item.categories}))
    catalog = build_catalog(items, categories, known, liked_action)
    schema = Schema(
        name=dataset.name,
        epoch=int(known.time.min()) // SNAPSHOT_PERIOD * SNAPSHOT_PERIOD,
        profile=profile_fields(users),
        num_items=catalog.num_items,
        items_hash=catalog.hash,
        num_actions=int(known.action.max()) + 1,
        liked_action=liked_action,
        categories=categories,
        tasks=tuple(TaskSpec(task.name, task.definition) for task in tasks),
        width=FIRST_COLUMN + len(_CANDIDATE_COLUMNS),
        candidate_columns=_CANDIDATE_COLUMNS,
        max_history=max_history,
        realtime_step=realtime_step,
    )
    return PreparedData(
        part=part,
        users=users,
        interactions=interactions,
        known=is_known,
        last=last[~is_known[last]],
        known_labels=label_all(tasks, known),
        known_weights={task.name: frontier_weights(known, len(users)) for task in tasks if task.looks_ahead},
        labels=label_all(tasks, interactions),
        schema=schema,
        catalog=catalog,
        protocol=protocol,
    )


def frontier_weights(known: Interactions, num_users: int) -> Float32Array:
    """Weights for labels that look ahead: high where a user's known events end, as there a server will be asked.

    Earlier in the table, what is left of the user's events grows, and the share of positive labels with it, beyond what
    will ever be met. An event with a share s of the user's events strictly before it weighs s^16, and every user's
    weights have the same sum: such a label says something of the user rather than of the event.

    Returns:
        FP32 [E], mean ``_FRONTIER_WEIGHT``: few users make a label that the network could learn by heart.
    """
    start, end = history_bounds(known, known.user, known.time)
    count = np.bincount(known.user, minlength=num_users)[known.user]
    weights = ((end - start + 1) / count) ** _FRONTIER_POWER
    weights = weights / np.bincount(known.user, weights, num_users)[known.user]
    result: Float32Array = (_FRONTIER_WEIGHT * weights / weights.mean()).astype(np.float32)
    return result


def profile_fields(users: list[User]) -> tuple[ProfileField, ...]:
    """Profile fields of the users: quantile buckets for numbers, the values themselves for text."""
    fields = []
    for name in users[0].profile:
        values = [user.profile[name] for user in users if name in user.profile]
        numbers = [value for value in values if isinstance(value, int | float)]
        if len(numbers) == len(values):
            quantiles = np.quantile(numbers, np.arange(1, _NUMERIC_BUCKETS) / _NUMERIC_BUCKETS)
            fields.append(ProfileField(name, boundaries=tuple(sorted({float(value) for value in quantiles}))))
        else:
            fields.append(ProfileField(name, values=tuple(sorted({str(value) for value in values}))))
    return tuple(fields)
