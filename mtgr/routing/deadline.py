"""Until when a request's answer is of use, carried through all stages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from mtgr.errors import RequestTimeoutError

Clock = Callable[[], float]

# Within these seconds every time limit lies.
MIN_SECONDS = 1e-3
MAX_SECONDS = 600.0


def time_limit(timeout_us: int, default_seconds: float, max_seconds: float = MAX_SECONDS) -> float:
    """Seconds that a request may take.

    Args:
        timeout_us: The request's ``timeout`` in Triton's protocols, microseconds; 0 or less says nothing.
        default_seconds: For a request that says nothing.
        max_seconds: For one that asks for more.
    """
    seconds = timeout_us / 1e6 if timeout_us > 0 else default_seconds
    return min(max(seconds, MIN_SECONDS), max_seconds)


@dataclass(frozen=True)
class Deadline:
    """A moment of the clock.

    Attributes:
        expires: The moment; infinity for never.
        seconds: The time limit it came from, for messages; infinity if that is not known.
        clock: Gives seconds that only grow.
    """

    expires: float
    seconds: float = math.inf
    clock: Clock = time.monotonic

    @classmethod
    def after(cls, seconds: float, clock: Clock = time.monotonic) -> Deadline:
        """The deadline in so many seconds from now."""
        return cls(clock() + seconds, seconds, clock)

    @classmethod
    def from_unix_ms(cls, milliseconds: int, clock: Clock = time.monotonic, wall: Clock = time.time) -> Deadline:
        """A deadline that another process of this host wrote with :meth:`unix_ms`; 0 is never."""
        if milliseconds == 0:
            return cls(math.inf, math.inf, clock)
        # At most the longest limit from now: a clock that was set back must not make requests immortal.
        return cls(clock() + min(milliseconds / 1e3 - wall(), MAX_SECONDS), math.inf, clock)

    def unix_ms(self, wall: Clock = time.time) -> int:
        """As milliseconds of unix time, for other processes of this host; 0 for never."""
        return 0 if math.isinf(self.expires) else max(1, round((wall() + self.remaining()) * 1e3))

    def remaining(self) -> float:
        """Seconds left; negative after it passed."""
        return self.expires - self.clock()

    @property
    def expired(self) -> bool:
        """Whether it passed."""
        return self.remaining() <= 0

    def check(self, stage: str) -> None:
        """Stop here if nobody waits for the answer any more.

        Args:
            stage: What was to come next, for the message.

        Raises:
            RequestTimeoutError: If it passed.
        """
        if self.expired:
            limit = f" of {self.seconds * 1e3:.0f} ms" if math.isfinite(self.seconds) else ""
            raise RequestTimeoutError(f"the request's time limit{limit} ran out before {stage}; allow more time.")

    def limit(self, seconds: float) -> float:
        """``seconds``, or what is left if that is less; never negative."""
        return max(0.0, min(seconds, self.remaining()))
