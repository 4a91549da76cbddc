"""Numbers to ids: exact integer bucketing, so that training and every server agree to the bit.

Each rule stands once, for one number, as loops use it; functions of arrays are ufuncs of it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mtgr.features.native import INT, compiled, elementwise
from mtgr.schema import FIRST_ID, HOUR_SIZE, UNKNOWN

Int64Array = npt.NDArray[np.int64]

_HOURS = HOUR_SIZE - FIRST_ID


@compiled(INT, INT, INT)
def log_id(value: int, size: int) -> int:
    """Log-scale id: FIRST_ID + k for a value in [2^k - 1, 2^(k + 1) - 1); a negative one is unknown.

    Args:
        value: Such as seconds or a count.
        size: Ids of the column; larger values share the last id.
    """
    if value < 0:
        return UNKNOWN
    power = 0
    while power < size and value >= (np.int64(2) << power) - 1:
        power += 1
    return min(FIRST_ID + power, size - 1)


@compiled(INT, INT, INT, INT)
def rate_id(positive: int, total: int, size: int) -> int:
    """Id of the share positive / total in equal steps; unknown where total is 0.

    The share is smoothed towards one half by two pseudo-events, so that a single event is not taken for certainty.

    Args:
        positive: At most ``total``.
        total: A count.
        size: Ids of the column.
    """
    if total <= 0:
        return UNKNOWN
    steps = size - FIRST_ID
    return FIRST_ID + min((positive + 1) * steps // (total + 2), steps - 1)


@compiled(INT, INT, INT, INT)
def deviation_id(value: int, step: int, size: int) -> int:
    """Id of a signed integer in equal steps around 0; what lies beyond shares the first or the last id.

    Args:
        value: An integer.
        step: Width of a bucket.
        size: Ids of the column.
    """
    steps = size - FIRST_ID
    return FIRST_ID + min(max(value // step + steps // 2, 0), steps - 1)


@compiled(INT, INT)
def hour_id(time: int) -> int:
    """Id of the hour of the day (UTC) of unix seconds."""
    return FIRST_ID + (time // 3600) % _HOURS


def log_bucket(values: npt.ArrayLike, size: int) -> Int64Array:
    """``log_id`` of integers of any shape."""
    ids: Int64Array = _log(np.asarray(values, dtype=np.int64), size)
    return ids


def rate_bucket(positive: npt.ArrayLike, total: npt.ArrayLike, size: int) -> Int64Array:
    """``rate_id`` of integers of any shape."""
    ids: Int64Array = _rate(np.asarray(positive, dtype=np.int64), np.asarray(total, dtype=np.int64), size)
    return ids


@elementwise(INT, INT, INT)
def _log(value: int, size: int) -> int:
    return log_id(value, size)


@elementwise(INT, INT, INT, INT)
def _rate(positive: int, total: int, size: int) -> int:
    return rate_id(positive, total, size)
