"""Candidate rows: what is known of an item, of the user, and of both together at the moment of a request.

What changes with the request (its time, the gap since the last event, cross features) stands in candidate rows only,
so that a context's rows and the keys and values cached for them stay the same from request to request.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.errors import ConfigurationError
from mtgr.features.buckets import deviation_id, hour_id, log_id, rate_id
from mtgr.features.catalog import SIMILARITY, STRENGTH, ItemCatalog, snapshot_of
from mtgr.features.context import places_among, seconds_since
from mtgr.features.native import INT, NONE, array, compiled
from mtgr.features.state import NEVER, CandidateState
from mtgr.schema import (
    CANDIDATE_COLUMNS,
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
UInt8Array = npt.NDArray[np.uint8]

_PRIOR_EVENTS = 20
_PRIOR_SIMILARITY = 5 * SIMILARITY
# Widths of buckets for the two kinds of strength; the first reach from about -0.37 and -0.19 to the opposite.
_USER_STEPS = (STRENGTH // 42, STRENGTH // 32)
_SIMILAR_STEPS = (STRENGTH // 85, STRENGTH // 64)
_NUM_COLUMNS = len(CANDIDATE_COLUMNS)
# Bits of the ids of the items that a user knows, by which most neighbours are seen to be others without a search.
_FILTER = 1 << 16


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


def seen_sums(
    catalog: ItemCatalog, items: Int64Array, state: CandidateState
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """``similar_sums`` of one user, before which stands INT64 [k]: unix seconds of the last event with each item."""
    last_times, events = np.empty((2, len(items)), dtype=np.int64)
    surprise = np.empty((len(items), 2), dtype=np.int64)
    _sum_seen(
        items,
        catalog.neighbours,
        catalog.similarity,
        state.seen_items,
        state.seen_times,
        state.seen_events,
        state.seen_surprise,
        last_times,
        events,
        surprise,
    )
    return last_times, events, surprise


@compiled(INT, array("int64"), INT)
def _place(ascending: Int64Array, wanted: int) -> int:
    """Where a number stands, or -1."""
    low, high = 0, len(ascending)
    while low < high:
        middle = (low + high) >> 1
        if ascending[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low if low < len(ascending) and ascending[low] == wanted else -1


@compiled(
    NONE,
    array("int64"),
    array("int32", 2),
    array("int32", 2),
    *[array("int64")] * 3,
    array("int64", 2),
    array("int64", written=True),
    array("int64", written=True),
    array("int64", 2, written=True),
)
def _sum_seen(
    items: Int64Array,
    neighbours: Int32Array,
    similarity: Int32Array,
    seen_items: Int64Array,
    seen_times: Int64Array,
    seen_events: Int64Array,
    seen_surprise: Int64Array,
    last_times: Int64Array,
    events: Int64Array,
    surprise: Int64Array,
) -> None:
    maybe = np.zeros(_FILTER, dtype=np.bool_)
    for item in seen_items:
        maybe[item & (_FILTER - 1)] = True
    for index in range(len(items)):
        item = items[index]
        place = _place(seen_items, item)
        last_times[index] = NEVER if place < 0 else seen_times[place]
        count = by_rank = top = np.int64(0)
        for neighbour in range(neighbours.shape[1]):
            other = int(neighbours[item, neighbour])
            if maybe[other & (_FILTER - 1)]:  # most often the user knows few of them
                place = _place(seen_items, other)
                if place >= 0:
                    weight = np.int64(similarity[item, neighbour])
                    count += weight * seen_events[place]
                    by_rank += weight * seen_surprise[place, 0]
                    top += weight * seen_surprise[place, 1]
        events[index] = count
        surprise[index, 0], surprise[index, 1] = by_rank, top


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
    single = np.ndim(request_time) == 0
    moments = np.array(
        (request_time, first_time, last_time, num_events, num_liked, num_sessions, session_events), dtype=np.int64
    )
    rows = np.zeros((len(items), schema.width), dtype=np.int32)
    _fill(
        rows,
        places_among(CANDIDATE_COLUMNS, schema.candidate_columns),
        items,
        schema.epoch,
        moments[None] if single else np.ascontiguousarray(moments.T),
        category_events[None] if single else category_events,
        category_liked[None] if single else category_liked,
        surprise[None] if single else surprise,
        item_last_time,
        similar_events,
        similar_surprise,
        catalog.categories,
        catalog.popularity,
        catalog.liked_rate,
        catalog.first_snapshot,
    )
    return rows


@compiled(INT, INT, INT)
def _since(request: int, moment: int) -> int:
    """Seconds from a moment to the request; -1 from one that does not exist."""
    return -1 if moment == NEVER else max(request - moment, 0)


@compiled(
    NONE,
    array("int32", 2, written=True),
    array("int64"),
    array("int64"),
    INT,
    *[array("int64", 2)] * 4,
    *[array("int64")] * 2,
    array("int64", 2),
    *[array("uint8", 2)] * 3,
    INT,
)
def _fill(
    rows: Int32Array,
    codes: Int64Array,
    items: Int64Array,
    epoch: int,
    moments: Int64Array,
    category_events: Int64Array,
    category_liked: Int64Array,
    surprise: Int64Array,
    item_last_time: Int64Array,
    similar_events: Int64Array,
    similar_surprise: Int64Array,
    categories: UInt8Array,
    popularity: UInt8Array,
    liked_rate: UInt8Array,
    first_snapshot: int,
) -> None:
    values = np.empty(_NUM_COLUMNS, dtype=np.int64)  # in the order of CANDIDATE_COLUMNS
    for index in range(len(items)):
        item = items[index]
        moment = index if len(moments) > 1 else 0
        if moment == index:  # of one moment, what does not depend on the item is computed once
            request, num_events, num_liked = moments[moment, 0], moments[moment, 3], moments[moment, 4]
            values[1] = seconds_since(epoch, request)
            values[2] = hour_id(request)
            values[3] = log_id(_since(request, moments[moment, 2]), LOG_SECONDS_SIZE)
            values[9] = rate_id(num_liked, num_events, RATE_SIZE)
            values[10] = log_id(num_events, LOG_COUNT_SIZE)
            values[11] = log_id(_since(request, moments[moment, 1]), LOG_SECONDS_SIZE)
            values[12] = log_id(moments[moment, 5], LOG_COUNT_SIZE)
            values[13] = log_id(moments[moment, 6], LOG_COUNT_SIZE)
            snapshot = snapshot_of(request, first_snapshot, len(popularity))
        alike = alike_liked = 0
        for category in range(categories.shape[1]):
            flag = int(categories[item, category])
            alike += flag * int(category_events[moment, category])
            alike_liked += flag * int(category_liked[moment, category])
        values[0] = item
        values[4] = log_id(alike, LOG_COUNT_SIZE)
        values[5] = rate_id(alike_liked, alike, RATE_SIZE)
        values[6] = log_id(_since(request, item_last_time[index]), LOG_SECONDS_SIZE)
        values[7] = popularity[snapshot, item]
        values[8] = liked_rate[snapshot, item]
        similar = similar_events[index]
        for kind in range(2):
            # Item-based nearest neighbours as features: how far the user's taste lies above the usual, in general and,
            # beyond that, on items like this one. Both are drawn towards 0 by some events without any surprise.
            deviation = surprise[moment, kind] // (num_events + _PRIOR_EVENTS)
            beyond = (similar_surprise[index, kind] - deviation * similar) // (similar + _PRIOR_SIMILARITY)
            values[14 + kind] = deviation_id(deviation, _USER_STEPS[kind], DEVIATION_SIZE)
            values[16 + kind] = deviation_id(beyond, _SIMILAR_STEPS[kind], DEVIATION_SIZE)
        for column in range(len(codes)):
            rows[index, FIRST_COLUMN + column] = values[codes[column]]


def candidate_rows(schema: Schema, catalog: ItemCatalog, state: CandidateState, items: Int64Array) -> Int32Array:
    """Rows of candidates for one request.

    Args:
        schema: The schema.
        catalog: The items.
        state: The user's state at the moment of the request.
        items: INT64 [k], internal ids.

    Returns:
        INT32 [k, W], slots going on from the context's.

    Raises:
        ConfigurationError: If the state was made with another catalogue.
    """
    if len(state.category_events) != catalog.categories.shape[1]:
        raise ConfigurationError("candidate_state is of another catalogue; restart the server with one release.")
    last_times, similar_events, similar_surprise = seen_sums(catalog, items, state)
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
        item_last_time=last_times,
        surprise=state.seen_surprise.sum(axis=0),
        similar_events=similar_events,
        similar_surprise=similar_surprise,
    )
    rows[:, TYPE_COLUMN] = TokenType.CANDIDATE
    rows[:, SLOT_COLUMN] = np.arange(state.context_length, state.context_length + len(items))
    return rows
