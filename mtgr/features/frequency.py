"""How often keys were asked for of late, in little memory: the admission filter of TinyLFU."""

from __future__ import annotations

from collections.abc import Hashable

_ROWS = 4
_LARGEST = 15
# With one instead of four, hit ratios on Zipf(1.0) are 1 to 2 points lower (`python -m perf.cache_policy --share 0.1`).
_COUNTERS = 4
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
_MASK = (1 << 64) - 1
_SAMPLE = 10  # times as many keys counted as the sketch has counters in a row, then all counts are halved


class FrequencySketch:
    """A count-min sketch whose counts are halved from time to time (Einziger, Friedman, Manes: TinyLFU, 2015).

    Not thread-safe.

    Args:
        keys: How many keys the cache has room for; four counters a row stand for each.
    """

    def __init__(self, keys: int) -> None:
        self._bits = max(4, (_COUNTERS * keys - 1).bit_length())
        self._counts = [bytearray(1 << self._bits) for _ in range(_ROWS)]
        self._added = 0

    def add(self, key: Hashable) -> None:
        """Count the key once more."""
        for row, index in zip(self._counts, self._indices(key), strict=True):
            if row[index] < _LARGEST:
                row[index] += 1
        self._added += 1
        if self._added >= _SAMPLE << self._bits:
            self._halve()

    def count(self, key: Hashable) -> int:
        """About how often the key was counted, 0 to 15; never less than truly, but for the halving."""
        return min(row[index] for row, index in zip(self._counts, self._indices(key), strict=True))

    def _indices(self, key: Hashable) -> list[int]:
        value = hash(key)
        shift = 64 - self._bits
        return [((value * multiplier) & _MASK) >> shift for multiplier in _MULTIPLIERS]

    def _halve(self) -> None:
        self._counts = [row.translate(_HALVES) for row in self._counts]
        self._added //= 2


_HALVES = bytes(value // 2 for value in range(256))
