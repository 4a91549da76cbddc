"""Whether requests come one by one, or stand in line outside already."""

from __future__ import annotations

import time
from collections.abc import Callable

# Triton hands over what waits as soon as the last request is taken; where processors are short, this much later.
GAP_SECONDS = 1e-3
# So many in a row are no chance.
ROW = 16


class Pace:
    """Tells from the gaps between requests whether there is a line that only the server sees.

    Work in the thread that takes requests in costs least, but what comes meanwhile waits where nobody can tell how
    long, nor refuse it. So it is for a time when nobody waits.

    Args:
        clock: Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._done = -GAP_SECONDS
        self._row = 0

    @property
    def hurried(self) -> bool:
        """Whether there is a line."""
        return self._row >= ROW

    def begin(self) -> None:
        """Requests have been handed over."""
        self._row = self._row + 1 if self._clock() - self._done < GAP_SECONDS else 0

    def end(self) -> None:
        """The next ones may come."""
        self._done = self._clock()
