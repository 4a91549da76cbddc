"""How hard admission control is pressed, and whom it refuses for that: numbers only, which other processes can read."""

from __future__ import annotations

import math
from typing import NamedTuple

from mtgr.routing.reasons import Reason, RefusedError

ROUTER = "the router"  # what it is called in refusals, wherever they are made


class Pressure(NamedTuple):
    """What is known at one moment.

    Attributes:
        running: Requests that run.
        limit: Requests that may run at a time.
        waiting: Requests that wait.
        max_queue: Most requests that may wait.
        interval: Seconds from one request that leaves to the next; 0 while nothing is known.
        service: Seconds that nearly every request stays within once it runs; 0 while nothing is known.
        share: Part of the time left that waiting and service together may fill; infinite without shedding.
        max_wait: Seconds of waiting that a queue may stand at; infinite without shedding.
        waiting_since: Moment of the monotonic clock from which on somebody waited; infinite if nobody does.
        draining: 1 if every new request is refused, else 0.
    """

    running: float = 0.0
    limit: float = 1.0
    waiting: float = 0.0
    max_queue: float = math.inf
    interval: float = 0.0
    service: float = 0.0
    share: float = math.inf
    max_wait: float = math.inf
    waiting_since: float = math.inf
    draining: float = 0.0

    @property
    def expected_wait(self) -> float:
        """Seconds that a request that came now would wait."""
        return self.waiting * self.interval

    @property
    def expected_seconds(self) -> float:
        """Seconds that a request that came now would wait and be served."""
        return max((self.running + self.waiting + 1) * self.interval, self.expected_wait + self.service)

    def behind(self, arriving: int) -> Pressure:
        """The same after requests that are on their way already."""
        starting = min(float(arriving), max(0.0, self.limit - self.running))
        return self._replace(running=self.running + starting, waiting=self.waiting + arriving - starting)

    def refusal(self, name: str, remaining: float, now: float) -> RefusedError | None:
        """Why a request that comes now is to be refused, or None.

        Args:
            name: What is asked for admission, for the message.
            remaining: Seconds that the request has left.
            now: The monotonic clock.
        """
        if self.draining:
            return RefusedError(f"{name}: the server is about to stop; ask another one.", Reason.DRAINING)
        if self.running < self.limit:
            return None
        if self.waiting >= self.max_queue:
            text = f"{name}: {self.waiting:.0f} requests wait, as many as may; try again later."
            return RefusedError(text, Reason.OVERLOADED)
        stands = now - self.waiting_since > self.max_wait
        expected = self.expected_seconds
        if expected > remaining * self.share or (stands and self.expected_wait > self.max_wait):
            text = (
                f"{name}: an answer would take about {expected:.2g} s behind {self.waiting:.0f} others, and the "
                f"request allows {remaining:.2g} s; try again later."
            )
            return RefusedError(text, Reason.OVERLOADED)
        return None
