"""Candidate rows and the user state they are built from.

What changes with the request (its time, the gap since the last event, cross features) stands in candidate rows only,
so that a context's rows and the keys and values cached for them stay the same from request to request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.data.tasks import SESSION_GAP_SECONDS
from mtgr.errors import ConfigurationError
from mtgr.features.buckets import deviation_bucket, hour_bucket, log_bucket, rate_bucket
from mtgr.features.catalog import SIMILARITY, STRENGTH, ItemCatalog, strength
from mtgr.features.context import relative_time
from mtgr.schema import (
    DEVIATION_SIZE,
    FIRST_COLUMN,
    LOG_COUNT_SIZE,
    LOG_SECONDS_SIZE,
    RATE_SIZE,
    SLOT_COLUMN,
    TYPE_COLUMN,
    Schema,
    TokenType,
)

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_TABLE_ITEMS = 1 << 18  # up to so many, a table of all items is quicker than a search
STATE_VERSION = 4
NEVER = -1  # stands for a time that does not exist
_HEADER = 10
_PRIOR_EVENTS = 20
_PRIOR_SIMILARITY = 5 * SIMILARITY
# Widths of buckets for the two kinds of strength; the first reach from about -0.37 and -0.19 to the opposite.
_USER_STEPS = np.array([STRENGTH // 42, STRENGTH // 32])
_SIMILAR_STEPS = np.array([STRENGTH // 85, STRENGTH // 64])
# Ids of the columns that are computed together: of the user's moment, and of each item.
_MOMENT_SIZES = np.array([[LOG_SECONDS_SIZE]] * 2 + [[LOG_COUNT_SIZE]] * 3)
_ITEM_SIZES = np.array([[LOG_SECONDS_SIZE], [LOG_COUNT_SIZE]])
_INT32_MAX = np.iinfo(np.int32).max
_INT64_MAX = np.iinfo(np.int64).max


@dataclass(frozen=True)
class CandidateState:
    """What candidate rows need to know of a user at one moment.

    Attributes:
        request_time: Unix seconds.
        first_time: Unix seconds of the first event, or ``NEVER``.
        last_time: Unix seconds of the last event, or ``NEVER``.
        num_events: Events so far.
        num_liked: Liked events so far.
        num_sessions: Sessions so far.
        session_events: Events of the last session.
        context_length: Tokens of the context: the first candidate's slot.
        category_events: INT64 [G], events with items of each category.
        category_liked: INT64 [G], liked ones among them.
        seen_items: INT64 [M], internal ids of items the user had an event with, ascending.
        seen_times: INT64 [M], unix seconds of the last event with each.
        seen_events: INT64 [M], events with each.
        seen_surprise: INT64 [M, 2], how much stronger the actions on each were than is usual for it, summed.
    """

    request_time: int
    first_time: int
    last_time: int
    num_events: int
    num_liked: int
    num_sessions: int
    session_events: int
    context_length: int
    category_events: Int64Array
    category_liked: Int64Array
    seen_items: Int64Array
    seen_times: Int64Array
    seen_events: Int64Array
    seen_surprise: Int64Array

    def last_seen(self, items: Int64Array) -> Int64Array:
        """INT64 like ``items``: unix seconds of the user's last event with each item, or ``NEVER``."""
        if not len(self.seen_items):
            return np.full(items.shape, NEVER, dtype=np.int64)
        index = np.minimum(self.seen_items.searchsorted(items), len(self.seen_items) - 1)
        return np.where(self.seen_items[index] == items, self.seen_times[index], NEVER).astype(np.int64)

    def to_array(self, epoch: int) -> Int32Array:
        """The state as the INT32 ``candidate_state`` tensor; times become seconds since ``epoch``."""
        # An earlier time than the epoch is kept as the epoch: rows clip it the same way.
        times = np.concatenate([(self.request_time, self.first_time, self.last_time), self.seen_times])
        seconds = np.where(times == NEVER, NEVER, np.minimum(np.maximum(times - epoch, 0), _INT32_MAX))
        header = [
            STATE_VERSION,
            *seconds[:3],
            self.num_events,
            self.num_liked,
            self.num_sessions,
            self.session_events,
            self.context_length,
            len(self.category_events),
        ]
        seen = [self.seen_items, seconds[3:], self.seen_events, *self.seen_surprise.T]
        parts = [header, self.category_events, self.category_liked, *seen]
        return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])

    @classmethod
    def from_array(cls, array: Int32Array, epoch: int) -> CandidateState:
        """Read a tensor written by ``to_array``.

        Raises:
            ConfigurationError: If the tensor is of another version or damaged.
        """
        values = array.astype(np.int64)
        if len(values) < _HEADER or values[0] != STATE_VERSION:
            raise ConfigurationError("candidate_state is of another version; restart the server with one release.")
        request_time, first_time, last_time, *counts, num_categories = (int(v) for v in values[1:_HEADER])
        num_events, num_liked, num_sessions, session_events, context_length = counts
        rest = values[_HEADER + 2 * num_categories :]
        if num_categories < 0 or len(values) < _HEADER + 2 * num_categories or len(rest) % 5:
            raise ConfigurationError("candidate_state has a wrong length; restart the server with one release.")
        seen_items, seen_times, seen_events, *seen_surprise = rest.reshape(5, -1)
        return cls(
            request_time=request_time + epoch,
            first_time=NEVER if first_time == NEVER else first_time + epoch,
            last_time=NEVER if last_time == NEVER else last_time + epoch,
            num_events=num_events,
            num_liked=num_liked,
            num_sessions=num_sessions,
            session_events=session_events,
            context_length=context_length,
            category_events=values[_HEADER : _HEADER + num_categories],
            category_liked=values[_HEADER + num_categories : _HEADER + 2 * num_categories],
            seen_items=seen_items,
            seen_times=np.where(seen_times == NEVER, NEVER, seen_times + epoch),
            seen_events=seen_events,
            seen_surprise=np.stack(seen_surprise, axis=-1),
        )


def build_candidate_state(
    schema: Schema,
    catalog: ItemCatalog,
    items: Int64Array,
    actions: Int32Array,
    times: Int64Array,
    request_time: int,
    context_length: int,
) -> CandidateState:
    """The state after a user's events.

    Args:
        schema: The schema.
        catalog: The items.
        items: INT64 [E], internal ids of all of the user's events, ascending in time.
        actions: INT32 [E], actions from 0.
        times: INT64 [E], unix seconds.
        request_time: Unix seconds.
        context_length: Tokens of the user's context.
    """
    liked = actions >= schema.liked_action
    flags = catalog.categories[items].astype(np.int64)
    # Events grouped by item, in a stable order: the last of a group is the latest.
    order = np.argsort(items, kind="stable")
    grouped = items[order]
    starts = np.flatnonzero(np.diff(grouped, prepend=-1))
    ends = np.append(starts[1:], len(items))
    surprise = event_surprise(schema, catalog, items, actions)[order]
    sessions, session_events = session_counts(times)
    return CandidateState(
        request_time=request_time,
        first_time=int(times[0]) if len(times) else NEVER,
        last_time=int(times[-1]) if len(times) else NEVER,
        num_events=len(items),
        num_liked=int(liked.sum()),
        num_sessions=int(sessions[-1]) if len(times) else 0,
        session_events=int(session_events[-1]) if len(times) else 0,
        context_length=context_length,
        category_events=flags.sum(axis=0),
        category_liked=flags[liked].sum(axis=0),
        seen_items=grouped[starts],
        seen_times=times[order[ends - 1]] if len(items) else times,
        seen_events=ends - starts if len(items) else times,
        seen_surprise=np.add.reduceat(surprise, starts, axis=0) if len(items) else surprise,
    )


def event_surprise(schema: Schema, catalog: ItemCatalog, items: Int64Array, actions: Int32Array) -> Int64Array:
    """INT64 [E, 2]: how much stronger each action is than is usual for its item, in 1 / ``STRENGTH``."""
    return strength(actions, schema.num_actions) - catalog.expected[items]


def similar_sums(
    similarity: Int32Array, index: npt.NDArray[np.integer[Any]], events: Int64Array, surprise: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """What a user did with the neighbours of some items.

    Args:
        similarity: INT32 [k, N], similarities of each item's neighbours.
        index: INT [k, N], where to find each neighbour in the next two.
        events: INT64 [M], the user's events by item.
        surprise: INT64 [M, 2], their surprise, summed by item.

    Returns:
        INT64 [k] and INT64 [k, 2]: events and surprise of the neighbours, weighted by similarity and summed.
    """
    weights = similarity.astype(np.int64)
    return (weights * events[index]).sum(axis=1), np.einsum("kn,knc->kc", weights, surprise[index])


def seen_sums(catalog: ItemCatalog, items: Int64Array, state: CandidateState) -> tuple[Int64Array, Int64Array]:
    """``similar_sums`` of one user: of the neighbours only those that the user knows, most often few, are looked at."""
    count, width = len(items), catalog.neighbours.shape[1]
    neighbours = catalog.neighbours.take(items, axis=0).reshape(-1)
    num_items = len(catalog.neighbours)
    if num_items <= _TABLE_ITEMS:
        known = np.zeros(num_items, dtype=np.bool_)
        known[state.seen_items] = True
        (hits,) = known.take(neighbours).nonzero()
    else:
        # A table of the catalogue's size would cost a large one dearly.
        (hits,) = _is_among(neighbours, state.seen_items).nonzero()
    place = state.seen_items.searchsorted(neighbours[hits])
    which = hits // width
    weights = catalog.similarity[items[which], hits - which * width].astype(np.float64)

    def summed(values: Int64Array) -> Int64Array:
        # Floats, which NumPy sums by group: exact, for no sum comes near 2^53.
        return np.bincount(which, weights * values[place], count).astype(np.int64)

    surprise = np.stack([summed(column) for column in state.seen_surprise.T], axis=1)
    return summed(state.seen_events), surprise


def session_counts(times: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Sessions up to each event, and the events of its session up to it.

    Args:
        times: INT64 [E], unix seconds, ascending.

    Returns:
        INT64 [E] and INT64 [E], both counted from 1.
    """
    starts = np.diff(times, prepend=times[:1]) > SESSION_GAP_SECONDS
    starts[:1] = True
    sessions = starts.cumsum().astype(np.int64)
    return sessions, np.arange(1, len(times) + 1) - np.flatnonzero(starts)[sessions - 1]


def candidate_columns(
    schema: Schema,
    catalog: ItemCatalog,
    items: Int64Array,
    *,
    request_time: npt.ArrayLike,
    first_time: npt.ArrayLike,
    last_time: npt.ArrayLike,
    num_events: npt.ArrayLike,
    num_liked: npt.ArrayLike,
    num_sessions: npt.ArrayLike,
    session_events: npt.ArrayLike,
    category_events: Int64Array,
    category_liked: Int64Array,
    item_last_time: Int64Array,
    surprise: Int64Array,
    similar_events: Int64Array,
    similar_surprise: Int64Array,
) -> Int32Array:
    """Everything in candidate rows but type and slot, for one moment (serving) or a moment per item (training).

    Args:
        schema: The schema.
        catalog: The items.
        items: INT64 [k], internal ids.
        request_time: Unix seconds, one or [k]; the other counts and times likewise.
        first_time: Unix seconds of the user's first event, or ``NEVER``.
        last_time: Unix seconds of the user's last event, or ``NEVER``.
        num_events: The user's events so far.
        num_liked: The user's liked events so far.
        num_sessions: The user's sessions so far.
        session_events: Events of the user's last session so far.
        category_events: INT64 [G] or [k, G], events by category.
        category_liked: INT64 [G] or [k, G], liked events by category.
        item_last_time: INT64 [k], unix seconds of the user's last event with the item, or ``NEVER``.
        surprise: INT64 [2] or [k, 2], surprise of the user's events, summed.
        similar_events: INT64 [k], from ``similar_sums``.
        similar_surprise: INT64 [k, 2], likewise.

    Returns:
        INT32 [k, W], types and slots still 0.
    """
    # Of one moment, what does not depend on the item is computed once: arrays of one, which rows repeat.
    request, first, last = np.array([request_time, first_time, last_time], dtype=np.int64).reshape(3, -1)
    counts = np.array([num_events, num_sessions, session_events], dtype=np.int64).reshape(3, -1)
    flags = catalog.categories.take(items, axis=0).astype(np.float64)  # of which products and sums are exact
    if category_events.ndim == 1:
        alike = flags @ np.array([category_events, category_liked], dtype=np.float64).T
        events_alike, liked_alike = alike.T.astype(np.int64)
    else:
        events_alike = (flags * category_events).sum(axis=1).astype(np.int64)
        liked_alike = (flags * category_liked).sum(axis=1).astype(np.int64)
    # Item-based nearest neighbours as features: how far the user's taste lies above the usual, in general and, beyond
    # that, on items like this one. Both are drawn towards 0 by some events without any surprise.
    deviation = surprise // (counts[0][:, None] + _PRIOR_EVENTS)
    similar = similar_events[:, None]
    similar_deviation = (similar_surprise - deviation * similar) // (similar + _PRIOR_SIMILARITY)
    snapshot = catalog.snapshot(request)

    gap, since_first, events, sessions, session = log_bucket(
        np.concatenate([_since(request, np.array([last, first])), counts]), _MOMENT_SIZES
    )
    recency, category_count = log_bucket(np.array([_since(request, item_last_time), events_alike]), _ITEM_SIZES)
    user_deviations = deviation_bucket(deviation, _USER_STEPS, DEVIATION_SIZE)
    similar_deviations = deviation_bucket(similar_deviation, _SIMILAR_STEPS, DEVIATION_SIZE)

    columns = {
        "item": items,
        "time": relative_time(schema, request),
        "hour": hour_bucket(request),
        "gap": gap,
        "category_count": category_count,
        "category_rate": rate_bucket(liked_alike, events_alike, RATE_SIZE),
        "recency": recency,
        "popularity": catalog.popularity[snapshot, items],
        "item_rate": catalog.liked_rate[snapshot, items],
        "user_rate": rate_bucket(num_liked, num_events, RATE_SIZE),
        "events": events,
        "since_first": since_first,
        "sessions": sessions,
        "session_events": session,
        "user_deviation": user_deviations[..., 0],
        "user_top_deviation": user_deviations[..., 1],
        "similar_deviation": similar_deviations[:, 0],
        "similar_top_deviation": similar_deviations[:, 1],
    }
    rows = np.zeros((len(items), schema.width), dtype=np.int32)
    for index, name in enumerate(schema.candidate_columns, start=FIRST_COLUMN):
        rows[:, index] = columns[name]
    return rows


def _since(request: Int64Array, moments: Int64Array) -> Int64Array:
    """Seconds from ``moments`` to the request; -1 from those that do not exist."""
    return np.where(moments == NEVER, -1, np.maximum(request - moments, 0))


def _is_among(wanted: npt.NDArray[np.integer[Any]], known: Int64Array) -> npt.NDArray[np.bool_]:
    """Whether each of ``wanted`` is in the ascending ``known``."""
    found: npt.NDArray[np.bool_] = np.append(known, _INT64_MAX)[known.searchsorted(wanted)] == wanted
    return found


def candidate_rows(schema: Schema, catalog: ItemCatalog, state: CandidateState, items: Int64Array) -> Int32Array:
    """Rows of candidates for one request.

    Args:
        schema: The schema.
        catalog: The items.
        state: The user's state at the moment of the request.
        items: INT64 [k], internal ids.

    Returns:
        INT32 [k, W], slots going on from the context's.
    """
    similar_events, similar_surprise = seen_sums(catalog, items, state)
    rows = candidate_columns(
        schema,
        catalog,
        items,
        request_time=state.request_time,
        first_time=state.first_time,
        last_time=state.last_time,
        num_events=state.num_events,
        num_liked=state.num_liked,
        num_sessions=state.num_sessions,
        session_events=state.session_events,
        category_events=state.category_events,
        category_liked=state.category_liked,
        item_last_time=state.last_seen(items),
        surprise=state.seen_surprise.sum(axis=0),
        similar_events=similar_events,
        similar_surprise=similar_surprise,
    )
    rows[:, TYPE_COLUMN] = TokenType.CANDIDATE
    rows[:, SLOT_COLUMN] = state.context_length + np.arange(len(items))
    return rows
