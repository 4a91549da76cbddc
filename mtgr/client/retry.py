"""When to try again: only while nothing serves, with full jitter, inside one deadline."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mtgr.errors import RequestTimeoutError, UnavailableError


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with full jitter, which spreads the clients of a server that went away.

    Attributes:
        retries: Tries after the first one.
        timeout: Seconds for all tries and waits together.
        rng: Where jitter comes from.
        base: Upper bound of the first wait, seconds; it doubles with each try.
        cap: Upper bound of every wait, seconds.
    """

    retries: int
    timeout: float
    rng: random.Random = field(default_factory=random.Random)
    base: float = 0.05
    cap: float = 1.0

    def delay(self, attempt: int) -> float:
        """Seconds to wait after try number ``attempt`` (from 0) failed, uniform from 0 to the bound."""
        return self.rng.uniform(0.0, min(self.cap, self.base * 2.0 ** min(attempt, 30)))


class Attempts:
    """The tries of one call. It does no waiting itself, so that blocking and asyncio clients share it.

    Args:
        policy: Bounds of tries and time.
        clock: Seconds on a clock that never goes back.
    """

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._deadline = clock() + policy.timeout
        self._failed = 0

    def remaining(self) -> float:
        """Seconds the next try may take.

        Raises:
            RequestTimeoutError: If the deadline has passed.
        """
        left = self._deadline - self._clock()
        if left <= 0:
            raise RequestTimeoutError(f"no answer came within {self._policy.timeout:g} s; raise the timeout.")
        return left

    def backoff(self, error: UnavailableError) -> float:
        """Seconds to wait before the next try; raises ``error`` when tries or time are used up."""
        if self._failed >= self._policy.retries:
            raise error
        delay = self._policy.delay(self._failed)
        self._failed += 1
        if delay >= self._deadline - self._clock():
            raise error
        return delay
