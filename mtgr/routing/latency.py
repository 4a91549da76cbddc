"""How long calls take of late: averages and percentiles in which old calls count less and less."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import accumulate

Clock = Callable[[], float]

# Below this weight an average says nothing any more: about six half-lives after a single value.
MIN_WEIGHT = 1 / 64

# Percentiles: bins that grow by a quarter, from 10 us to over 500 s.
_SHORTEST = 1e-5
_GROWTH = 1.25
_BINS = 80
_RESCALE = 2.0**200


class MovingAverage:
    """A mean whose weights halve with every half-life; for one writer, readers may be other threads.

    Args:
        half_life: Seconds.
        clock: Gives seconds.
    """

    def __init__(self, half_life: float, clock: Clock = time.monotonic) -> None:
        self._half_life = half_life
        self._clock = clock
        self._state = (clock(), 0.0, 0.0)  # as of when, weight, weighted sum

    def add(self, value: float) -> None:
        """Take a value into account."""
        then, weight, total = self._state
        now = self._clock()
        decay: float = 0.5 ** ((now - then) / self._half_life)
        self._state = (now, weight * decay + 1.0, total * decay + value)

    @property
    def weight(self) -> float:
        """How many values it rests on, old ones counted in part."""
        then, weight, _ = self._state
        decay: float = 0.5 ** ((self._clock() - then) / self._half_life)
        return weight * decay

    @property
    def mean(self) -> float | None:
        """The mean, or None if there is nothing recent enough."""
        _, weight, total = self._state
        return total / weight if weight and self.weight >= MIN_WEIGHT else None


@dataclass
class _Latencies:
    average: MovingAverage
    origin: float
    bins: list[float] = field(default_factory=lambda: [0.0] * _BINS)


class LatencyTracker:
    """Moving averages and percentiles of seconds by key; for one writer, readers may be other threads.

    Args:
        half_life: Seconds after which a call counts half.
        max_keys: Most keys; of more, those that were not written for longest are forgotten.
        clock: Gives seconds.
    """

    def __init__(self, half_life: float = 30.0, max_keys: int = 256, clock: Clock = time.monotonic) -> None:
        self._half_life = half_life
        self._max_keys = max_keys
        self._clock = clock
        self._keys: OrderedDict[Hashable, _Latencies] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def record(self, key: Hashable, seconds: float) -> None:
        """Take one call into account."""
        now = self._clock()
        entry = self._keys.get(key)
        if entry is None:
            entry = self._keys[key] = _Latencies(MovingAverage(self._half_life, self._clock), now)
            if len(self._keys) > self._max_keys:
                self._keys.popitem(last=False)
        else:
            self._keys.move_to_end(key)
        entry.average.add(seconds)
        # Instead of shrinking old weights, new ones grow.
        weight = 2.0 ** min((now - entry.origin) / self._half_life, 1000.0)
        if weight > _RESCALE:
            entry.bins = [old / weight for old in entry.bins]
            entry.origin, weight = now, 1.0
        entry.bins[_bin(seconds)] += weight

    def mean(self, key: Hashable) -> float | None:
        """Seconds, or None for a key without recent calls."""
        entry = self._keys.get(key)
        return None if entry is None else entry.average.mean

    def weight(self, key: Hashable) -> float:
        """How many calls the key's values rest on, old ones counted in part."""
        entry = self._keys.get(key)
        return 0.0 if entry is None else entry.average.weight

    def percentile(self, key: Hashable, q: float) -> float | None:
        """Seconds that ``q`` percent of the calls stay within, at most 25% too high; None without recent calls."""
        entry = self._keys.get(key)
        if entry is None or entry.average.mean is None:
            return None
        reached = list(accumulate(entry.bins))
        bound: float = _SHORTEST * _GROWTH ** bisect_left(reached, reached[-1] * (q / 100))
        return bound


def _bin(seconds: float) -> int:
    """The first bin whose upper bound is not exceeded."""
    if seconds <= _SHORTEST:
        return 0
    return min(math.ceil(math.log(seconds / _SHORTEST, _GROWTH) - 1e-9), _BINS - 1)
