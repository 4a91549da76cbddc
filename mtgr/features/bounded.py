"""A mapping bounded by bytes that keeps what is asked for often (TinyLFU admission before LRU eviction)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

from mtgr.features.frequency import FrequencySketch

V = TypeVar("V")


class BoundedCache(Generic[V]):
    """Values by key with their sizes; never more than ``max_bytes`` of them.

    Where a new key needs room, the least recently used keys make it, unless one of them was asked for more often of
    late than the new key: then the new one is not taken up. Not thread-safe.

    Args:
        max_bytes: The bound.
        sketch: Counts keys for admission; None admits every key (plain LRU).
    """

    def __init__(self, max_bytes: int, sketch: FrequencySketch | None) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.evictions = 0
        self.rejections = 0
        self._sketch = sketch
        self._entries: OrderedDict[str, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> V | None:
        """The value, which counts as a use, or None."""
        if self._sketch is not None:
            self._sketch.add(key)
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def peek(self, key: str) -> V | None:
        """The value without counting a use, or None."""
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def put(self, key: str, value: V, size: int) -> bool:
        """Take the value up, in the place of an earlier one of this key; whether there was room for it."""
        known = key in self._entries
        self.remove(key)
        victims, room = [], self.max_bytes - self.bytes
        candidates = iter(self._entries.items())
        while room < size:
            victim, (_, freed) = next(candidates, ("", (None, 0)))
            if not freed or not (known or self._admits(key, victim)):
                self.rejections += 1
                return False
            victims.append(victim)
            room += freed
        for victim in victims:
            self.remove(victim)
        self.evictions += len(victims)
        self._entries[key] = (value, size)
        self.bytes += size
        return True

    def remove(self, key: str) -> None:
        """Forget a key, if it is there."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry[1]

    def _admits(self, key: str, victim: str) -> bool:
        return self._sketch is None or self._sketch.count(key) > self._sketch.count(victim)
