"""User-level samples: every training example of one window of a user's life shares one context.

Window w of a user holds the candidates whose strictly earlier events number at least w * R_max and less than
(w + 1) * R_max. Serving would give each of them the same segment S, ending at event w * R_max, and a part of the same
segment R; so one context, and a mask by time, serve them all (MTGR, arXiv 2505.18654: user-level aggregation).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mtgr.data.dataset import Interactions, User
from mtgr.features.candidates import candidate_columns, similar_sums
from mtgr.features.catalog import ItemCatalog
from mtgr.features.context import context_rows
from mtgr.features.state import NEVER, event_surprise, session_counts
from mtgr.schema import SLOT_COLUMN, TYPE_COLUMN, Schema, TokenType

Int8Array = npt.NDArray[np.int8]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

NO_LABEL = 0  # the padding id of items: no next item is known after this token


@dataclass(frozen=True)
class Sample:
    """One window of one user.

    Attributes:
        context: INT32 [n, W].
        candidates: INT32 [k, W].
        labels: INT8 [k, T].
        weights: FP32 [k, T], weights of the candidates in each task's loss.
        next_items: INT64 [n], internal id of the item after each token that may be asked for it, else ``NO_LABEL``.
        events: INT64 [k], index of each candidate's event in the interaction table.
    """

    context: Int32Array
    candidates: Int32Array
    labels: Int8Array
    weights: Float32Array
    next_items: Int64Array
    events: Int64Array


def event_rows(
    schema: Schema, catalog: ItemCatalog, items: Int64Array, actions: Int32Array, times: Int64Array
) -> Int32Array:
    """Candidate rows for each of a user's events, as they would have been built just before it happened.

    Args:
        schema: The schema.
        catalog: The items.
        items: INT64 [E], internal ids, ascending in time.
        actions: INT32 [E].
        times: INT64 [E], unix seconds.

    Returns:
        INT32 [E, W], types and slots still 0.
    """
    before = np.searchsorted(times, times, side="left")  # strictly earlier events
    last = np.maximum(before - 1, 0)
    sessions, session_events = session_counts(times)
    liked = actions >= schema.liked_action
    flags = catalog.categories[items].astype(np.int64)

    def so_far(values: Int64Array) -> Int64Array:
        """Sums over strictly earlier events."""
        sums = np.concatenate([np.zeros_like(values[:1]), values.cumsum(axis=0)])
        result: Int64Array = sums[before]
        return result

    surprise = event_surprise(schema, catalog, items, actions)
    item_last_time = np.full(len(items), NEVER, dtype=np.int64)
    similar_events, similar_surprise = np.zeros(len(items), dtype=np.int64), np.zeros_like(surprise)
    last_time = np.full(catalog.num_items, NEVER, dtype=np.int64)
    events_of = np.zeros(catalog.num_items, dtype=np.int64)
    surprise_of = np.zeros((catalog.num_items, surprise.shape[1]), dtype=np.int64)
    # Second by second: rows are built before the events of their own second count.
    for start, end in pairwise([*np.unique(before).tolist(), len(items)]):
        moment = slice(start, end)
        now = items[moment]
        item_last_time[moment] = last_time[now]
        similar_events[moment], similar_surprise[moment] = similar_sums(
            catalog.similarity[now], catalog.neighbours[now], events_of, surprise_of
        )
        last_time[now] = times[start]
        np.add.at(events_of, now, 1)
        np.add.at(surprise_of, now, surprise[moment])
    return candidate_columns(
        schema,
        catalog,
        items,
        request_time=times,
        first_time=np.where(before > 0, times[0], NEVER),
        last_time=np.where(before > 0, times[last], NEVER),
        num_events=before,
        num_liked=so_far(liked.astype(np.int64)),
        num_sessions=np.where(before > 0, sessions[last], 0),
        session_events=np.where(before > 0, session_events[last], 0),
        category_events=so_far(flags),
        category_liked=so_far(flags * liked[:, None]),
        item_last_time=item_last_time,
        surprise=so_far(surprise),
        similar_events=similar_events,
        similar_surprise=similar_surprise,
    )


def build_samples(
    schema: Schema,
    catalog: ItemCatalog,
    users: list[User],
    interactions: Interactions,
    labels: Mapping[str, Int8Array],
    targets: BoolArray,
    weights: Mapping[str, Float32Array] | None = None,
) -> list[Sample]:
    """Samples of all users.

    Args:
        schema: The schema.
        catalog: The items.
        users: The users that ``interactions.user`` indexes.
        interactions: What may be in contexts.
        labels: INT8 [E] by task name.
        targets: BOOL [E], events that become candidates.
        weights: FP32 [E] loss weights by task name; 1 for tasks that are not named.
    """
    offsets = interactions.offsets(len(users))
    all_labels = np.stack([labels[name] for name in schema.task_names], axis=1)
    all_weights = np.ones(all_labels.shape, dtype=np.float32)
    for name, values in (weights or {}).items():
        all_weights[:, schema.task_names.index(name)] = values
    samples: list[Sample] = []
    for index, user in enumerate(users):
        low, high = int(offsets[index]), int(offsets[index + 1])
        if targets[low:high].any():
            samples += _user_samples(schema, catalog, user, interactions, all_labels, all_weights, targets, low, high)
    return samples


def _user_samples(
    schema: Schema,
    catalog: ItemCatalog,
    user: User,
    interactions: Interactions,
    labels: Int8Array,
    weights: Float32Array,
    targets: BoolArray,
    low: int,
    high: int,
) -> Iterator[Sample]:
    step = schema.realtime_step
    items = catalog.to_internal(interactions.item[low:high])
    actions, times = interactions.action[low:high], interactions.time[low:high]
    rows = event_rows(schema, catalog, items, actions, times)
    windows = np.searchsorted(times, times, side="left") // step
    for window in np.unique(windows[targets[low:high]]).tolist():
        static_events = window * step
        end = min(static_events + step, high - low)
        context = context_rows(schema, user.profile, items[:end], actions[:end], times[:end], static_events)
        chosen = np.flatnonzero((windows == window) & targets[low:high])
        candidates = rows[chosen]
        candidates[:, TYPE_COLUMN] = TokenType.CANDIDATE
        candidates[:, SLOT_COLUMN] = len(context) + np.arange(len(chosen))
        yield Sample(
            context=context,
            candidates=candidates,
            labels=labels[low + chosen],
            weights=weights[low + chosen],
            next_items=_next_items(context, items, static_events, end),
            events=low + chosen,
        )


def _next_items(context: Int32Array, items: Int64Array, static_events: int, end: int) -> Int64Array:
    """Next-item labels of the last static token and of R tokens; tokens of S see each other and must not be asked."""
    next_items = np.full(len(context), NO_LABEL, dtype=np.int64)
    following = items[static_events:end]  # the first follows the last static token, the others a token of R
    first = len(context) - (end - static_events) - 1
    next_items[first : first + len(following)] = following
    return next_items
