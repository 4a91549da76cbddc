"""Context rows: profile, history, and real-time tokens of one user."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mtgr.features.buckets import hour_id, log_id
from mtgr.features.native import INT, NONE, array, compiled
from mtgr.schema import (
    EVENT_COLUMNS,
    FIRST_COLUMN,
    FIRST_ID,
    LOG_SECONDS_SIZE,
    SLOT_COLUMN,
    TYPE_COLUMN,
    UNKNOWN,
    ProfileField,
    Schema,
    TokenType,
)

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_INT32_MAX = np.iinfo(np.int32).max
_NUM_COLUMNS = len(EVENT_COLUMNS)


def boundary(num_events: int, realtime_step: int) -> int:
    """Number of events in or before segment S: the largest multiple of ``realtime_step`` up to ``num_events``.

    A boundary that moves in steps keeps S, every slot, and so every cached key the same while events are appended.
    """
    return num_events // realtime_step * realtime_step


@compiled(INT, INT, INT)
def seconds_since(epoch: int, time: int) -> int:
    """Seconds since the schema's epoch, within [0, 2^31)."""
    return min(max(time - epoch, 0), _INT32_MAX)


def profile_id(field: ProfileField, offset: int, value: str | float | None) -> int:
    """Id of one profile value.

    Args:
        field: The profile field.
        offset: First id of the field.
        value: The value; None or one that the schema does not know gives the field's unknown id.
    """
    if value is None:
        return offset
    if field.values:
        text = str(value)
        return offset + 1 + field.values.index(text) if text in field.values else offset
    try:
        number = float(value)
    except ValueError:
        return offset
    if math.isnan(number):
        return offset
    return offset + 1 + int(np.searchsorted(field.boundaries, number, side="right"))


def context_rows(
    schema: Schema,
    profile: Mapping[str, str | float],
    items: Int64Array,
    actions: Int32Array,
    times: Int64Array,
    static_events: int | None = None,
) -> Int32Array:
    """Rows of one user's context.

    Args:
        schema: The schema.
        profile: Profile values by field name.
        items: INT64 [E], internal item ids, ordered by (time, arrival).
        actions: INT32 [E], actions from 0; those the schema does not know get the reserved id.
        times: INT64 [E], unix seconds, ascending.
        static_events: Events in or before S; ``boundary(E)`` by default. Training sets it, to go on with R where
            serving would have moved the boundary.

    Returns:
        INT32 [P + S + R, W], slots 0, 1, 2, ...
    """
    num_events = len(items)
    middle = boundary(num_events, schema.realtime_step) if static_events is None else static_events
    start = max(0, middle - schema.max_history)  # a multiple of realtime_step, as both of these are
    num_profile = len(schema.profile)
    rows = np.zeros((num_profile + num_events - start, schema.width), dtype=np.int32)
    rows[:, SLOT_COLUMN] = np.arange(len(rows))

    offset = FIRST_ID
    rows[:num_profile, TYPE_COLUMN] = TokenType.PROFILE
    for index, field in enumerate(schema.profile):
        rows[index, FIRST_COLUMN] = profile_id(field, offset, profile.get(field.name))
        offset += field.size

    events = rows[num_profile:]
    events[: middle - start, TYPE_COLUMN] = TokenType.HISTORY
    events[middle - start :, TYPE_COLUMN] = TokenType.REALTIME
    _fill_events(
        events,
        places_among(EVENT_COLUMNS, schema.event_columns),
        items,
        np.ascontiguousarray(actions, dtype=np.int32),
        times,
        schema.epoch,
        schema.num_actions,
    )
    return rows


@functools.cache
def places_among(known: tuple[str, ...], names: tuple[str, ...]) -> Int64Array:
    """Of each of a schema's columns, its place among all that there may be: loops know columns by number."""
    return np.array([known.index(name) for name in names], dtype=np.int64)


@compiled(
    NONE,
    array("int32", 2, written=True),
    array("int64"),
    array("int64"),
    array("int32"),
    array("int64"),
    INT,
    INT,
)
def _fill_events(
    rows: Int32Array,
    codes: Int64Array,
    items: Int64Array,
    actions: Int32Array,
    times: Int64Array,
    epoch: int,
    num_actions: int,
) -> None:
    """Everything in the rows of the latest events but type and slot."""
    values = np.empty(_NUM_COLUMNS, dtype=np.int64)  # in the order of EVENT_COLUMNS
    start = len(items) - len(rows)
    for index in range(len(rows)):
        event = start + index
        time, action = times[event], np.int64(actions[event])
        values[0] = items[event]
        values[1] = seconds_since(epoch, time)
        values[2] = action + FIRST_ID if 0 <= action < num_actions else UNKNOWN
        values[3] = log_id(time - times[max(event - 1, 0)], LOG_SECONDS_SIZE)
        values[4] = hour_id(time)
        for column in range(len(codes)):
            rows[index, FIRST_COLUMN + column] = values[codes[column]]
