"""Context rows: profile, history, and real-time tokens of one user."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mtgr.features.buckets import hour_bucket, log_bucket
from mtgr.schema import (
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


def boundary(num_events: int, realtime_step: int) -> int:
    """Number of events in or before segment S: the largest multiple of ``realtime_step`` up to ``num_events``.

    A boundary that moves in steps keeps S, every slot, and so every cached key the same while events are appended.
    """
    return num_events // realtime_step * realtime_step


def relative_time(schema: Schema, times: npt.ArrayLike) -> Int64Array:
    """Seconds since the schema's epoch, within [0, 2^31)."""
    # Not np.clip, which takes twice as long for so few.
    return np.minimum(np.maximum(np.asarray(times, dtype=np.int64) - schema.epoch, 0), _INT32_MAX)


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
    gaps = np.diff(times, prepend=times[:1])
    columns = {
        "item": items,
        "time": relative_time(schema, times),
        "action": np.where((actions >= 0) & (actions < schema.num_actions), actions + FIRST_ID, UNKNOWN),
        "gap": log_bucket(gaps, LOG_SECONDS_SIZE),
        "hour": hour_bucket(times),
    }
    for index, name in enumerate(schema.event_columns, start=FIRST_COLUMN):
        events[:, index] = columns[name][start:]
    return rows
