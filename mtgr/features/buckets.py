"""Numbers to ids: exact integer bucketing, so that training and every server agree to the bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mtgr.schema import FIRST_ID, HOUR_SIZE, UNKNOWN

Int64Array = npt.NDArray[np.int64]

_POWERS = (np.int64(1) << np.arange(62, dtype=np.int64)) - 1  # 0, 1, 3, 7, ...


def log_bucket(values: npt.ArrayLike, size: int | Int64Array) -> Int64Array:
    """Log-scale ids: FIRST_ID + k for values in [2^k - 1, 2^(k + 1) - 1); negative values are unknown.

    Args:
        values: Integers of any shape, such as seconds or counts.
        size: Ids of the column, or of each; larger values share the last id.
    """
    array = np.asarray(values, dtype=np.int64)
    ids = _POWERS.searchsorted(array, side="right") + (FIRST_ID - 1)
    return np.where(array < 0, UNKNOWN, np.minimum(ids, size - 1))


def rate_bucket(positive: npt.ArrayLike, total: npt.ArrayLike, size: int) -> Int64Array:
    """Ids of the share positive / total in equal steps; unknown where total is 0.

    The share is smoothed towards one half by two pseudo-events, so that a single event is not taken for certainty.

    Args:
        positive: Counts of any shape.
        total: Counts of the same shape, at least ``positive``.
        size: Ids of the column.
    """
    share = np.asarray(positive, dtype=np.int64)
    count = np.asarray(total, dtype=np.int64)
    steps = size - FIRST_ID
    ids = FIRST_ID + np.minimum((share + 1) * steps // (count + 2), steps - 1)
    return np.where(count > 0, ids, UNKNOWN)


def deviation_bucket(values: npt.ArrayLike, step: int | Int64Array, size: int) -> Int64Array:
    """Ids of signed integers in equal steps around 0; what lies beyond shares the first or the last id.

    Args:
        values: Integers of any shape.
        step: Width of a bucket, or of each.
        size: Ids of the column.
    """
    steps = size - FIRST_ID
    places = np.asarray(values, dtype=np.int64) // step + steps // 2
    # Not np.clip, which takes twice as long for so few.
    ids: Int64Array = FIRST_ID + np.minimum(np.maximum(places, 0), steps - 1)
    return ids


def hour_bucket(times: npt.ArrayLike) -> Int64Array:
    """Ids of the hour of the day (UTC) of unix ``times`` in seconds."""
    ids: Int64Array = FIRST_ID + (np.asarray(times, dtype=np.int64) // 3600) % (HOUR_SIZE - FIRST_ID)
    return ids
