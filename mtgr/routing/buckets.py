"""Padded lengths: dense engines get a few shapes only, so that the dynamic batcher can merge users."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

CONTEXT_BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024, 1152, 1536, 2048)
CANDIDATE_BUCKETS = (16, 64, 128, 256, 512, 1024)


# Above the largest bucket lengths go up by this part of it: whole multiples would double what 2,049 tokens cost.
_PARTS = 16


def bucket(length: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds ``length``; above the largest, the next multiple of a sixteenth of it."""
    index = bisect_left(buckets, length)
    if index < len(buckets):
        return buckets[index]
    step = max(1, buckets[-1] // _PARTS)
    return -(-length // step) * step


def pad(rows: Int32Array, length: int) -> Int32Array:
    """INT32 [1, length, W]: ``rows`` (INT32 [n, W]) followed by padding rows, as a batch of one."""
    padded = np.zeros((1, length, rows.shape[1]), dtype=np.int32)
    padded[0, : len(rows)] = rows
    return padded
