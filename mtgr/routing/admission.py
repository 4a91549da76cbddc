"""Admission control: as many requests at a time as can be answered in time, and a refusal at once for the others."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from mtgr.errors import ConfigurationError, RequestTimeoutError
from mtgr.routing.deadline import Deadline
from mtgr.routing.latency import MovingAverage
from mtgr.routing.reasons import Reason, RefusedError, reason_of

Clock = Callable[[], float]


@dataclass(frozen=True)
class AdmissionConfig:
    """Settings of admission control.

    Attributes:
        max_concurrent: Most requests that run at a time.
        max_queue: Most requests that wait.
        shedding: Whether requests are refused that could not be answered in time, and the limit follows what service
            takes; otherwise only the two bounds above hold.
        initial_limit: Requests that run at a time before anything is known of how long they take.
        min_limit: The limit never falls below this.
        service_share: Part of the usual time limit that service may take before fewer run at a time.
        safety: Part of the time left that expected waiting and service together may fill.
        half_life: Seconds after which a measurement counts half.
    """

    max_concurrent: int = 256
    max_queue: int = 1024
    shedding: bool = True
    initial_limit: int = 16
    min_limit: int = 4
    service_share: float = 0.5
    safety: float = 0.8
    half_life: float = 2.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        for name, least in (("max_concurrent", 1), ("max_queue", 0), ("initial_limit", 1), ("min_limit", 1)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"admission: {name} is {getattr(self, name)}; it must be at least {least}.")
        for name in ("service_share", "safety"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigurationError(f"admission: {name} is {getattr(self, name)}; it must be above 0, at most 1.")
        if not self.half_life > 0:
            raise ConfigurationError(f"admission: half_life is {self.half_life}; it must be positive.")


class Admission:
    """Lets requests run in the order of their arrival; for one event loop.

    How many run at a time follows how long they take: one more after each that is quick, a quarter fewer after one that
    takes more than its share of the usual time limit (additive increase, multiplicative decrease). Who finds no place
    waits, unless the requests ahead, at the rate at which places were freed of late, would take longer than the
    request's deadline allows.

    Args:
        name: What is admitted to, for messages.
        config: Settings.
        clock: Gives seconds.

    Attributes:
        running: Requests that run.
        admitted: Requests that were let run so far.
        refused: Requests that were not, by reason.
        draining: Whether new requests are refused, while those that are here end.
    """

    def __init__(self, name: str, config: AdmissionConfig | None = None, clock: Clock = time.monotonic) -> None:
        self.name = name
        self.config = config or AdmissionConfig()
        self.running = 0
        self.admitted = 0
        self.refused: Counter[Reason] = Counter()
        self.draining = False
        self._clock = clock
        self._queue: OrderedDict[asyncio.Future[None], Deadline] = OrderedDict()
        self._limit = float(min(self.config.initial_limit, self.config.max_concurrent))
        self._probing = True  # the limit doubles until service gets slow for the first time
        self._decreased = -math.inf
        self._usual_seconds = math.inf
        self._service = MovingAverage(self.config.half_life, clock)
        self._rate = _Rate(self.config.half_life)
        self._full_since = math.nan

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def limit(self) -> int:
        """Requests that may run at a time, as of now."""
        return int(self._limit) if self.config.shedding else self.config.max_concurrent

    @property
    def idle(self) -> bool:
        """Whether no request is here."""
        return not self.running and not self._queue

    def drain(self) -> None:
        """Refuse whatever comes from now on; what is here ends, and then ``idle`` holds."""
        self.draining = True

    @asynccontextmanager
    async def admit(self, deadline: Deadline) -> AsyncIterator[float]:
        """Run the block as soon as there is a place.

        Args:
            deadline: Until when the block must be done.

        Yields:
            Seconds waited.

        Raises:
            RefusedError: At once, if there is no hope to be done in time, the queue is full, or the server drains.
            RequestTimeoutError: If the deadline passed, here or before.
        """
        arrived = self._clock()
        self._enter_or_refuse(deadline)
        if self._queue or self.running >= self.limit:
            await self._wait(deadline)
        else:
            self._start()
        started = self._clock()
        error: BaseException | None = None
        try:
            yield started - arrived
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._leave(started, error)

    def _enter_or_refuse(self, deadline: Deadline) -> None:
        if self.draining:
            raise self._refusal(f"{self.name}: the server is about to stop; ask another one.", Reason.DRAINING)
        remaining = deadline.remaining()
        if remaining <= 0:
            self.refused[Reason.DEADLINE] += 1
            deadline.check(f"admission to {self.name}")
        # A running median: a step of 2% up or down.
        if math.isinf(self._usual_seconds):
            self._usual_seconds = remaining
        else:
            self._usual_seconds *= 1.02 if remaining > self._usual_seconds else 1 / 1.02
        if self.running < self.limit:
            return
        if len(self._queue) >= self.config.max_queue:
            raise self._refusal(
                f"{self.name}: {len(self._queue)} requests wait, as many as may; try again later.", Reason.OVERLOADED
            )
        expected = self.expected_seconds()
        if self.config.shedding and expected > remaining * self.config.safety:
            raise self._refusal(
                f"{self.name}: an answer would take about {expected:.2g} s behind {len(self._queue)} others, and the "
                f"request allows {remaining:.2g} s; try again later.",
                Reason.OVERLOADED,
            )

    def expected_seconds(self) -> float:
        """How long a request that came now would wait and be served; 0 while nothing is known."""
        service = self._service.mean or 0.0
        rate = self._rate.per_second(self.limit / service if service else math.inf)
        return (len(self._queue) + 1) / rate + service

    def _refusal(self, message: str, reason: Reason) -> RefusedError:
        self.refused[reason] += 1
        return RefusedError(message, reason)

    async def _wait(self, deadline: Deadline) -> None:
        place = asyncio.get_running_loop().create_future()
        self._queue[place] = deadline
        remaining = deadline.remaining()
        try:
            async with asyncio.timeout(remaining if math.isfinite(remaining) else None):
                await place
        except BaseException as error:
            self._queue.pop(place, None)
            if place.done() and not place.cancelled():
                self.running -= 1  # it was given a place in the same moment
                self._fill()
            self.refused[reason_of(error)] += 1
            if isinstance(error, TimeoutError):
                raise RequestTimeoutError(
                    f"the request's time limit ran out while it waited for {self.name}; allow more time."
                ) from error
            raise

    def _start(self) -> None:
        self.running += 1
        self.admitted += 1
        if self.running >= self.limit and math.isnan(self._full_since):
            self._full_since = self._clock()

    def _leave(self, started: float, error: BaseException | None) -> None:
        now = self._clock()
        full = not math.isnan(self._full_since)
        if full:
            self._rate.add(now - self._full_since)
            self._full_since = now
        self.running -= 1
        late = error is not None and reason_of(error) in (Reason.DEADLINE, Reason.TIMED_OUT)
        if error is None or late:  # of what ended early the time says nothing
            self._service.add(now - started)
            self._adapt(started, late or now - started > self.config.service_share * self._usual_seconds, full)
        self._fill()
        if self.running < self.limit:
            self._full_since = math.nan

    def _fill(self) -> None:
        while self._queue and self.running < self.limit:
            place, deadline = self._queue.popitem(last=False)
            if not place.done() and not deadline.expired:
                self._start()
                place.set_result(None)

    def _adapt(self, started: float, slow: bool, full: bool) -> None:
        if slow:
            # Once for all that ran together: only what began under the present limit speaks against it.
            if started >= self._decreased:
                self._limit = max(self._limit * 0.75, self.config.min_limit)
                self._decreased = self._clock()
            self._probing = False
        elif full:
            step = 1.0 if self._probing else 1 / math.sqrt(self._limit)
            self._limit = min(self._limit + step, self.config.max_concurrent)


class _Rate:
    """Events per second of the time that is counted, old ones less and less."""

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._events = 0.0
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one event, so many seconds after the one before."""
        decay: float = 0.5 ** (seconds / self._half_life)
        self._events = self._events * decay + 1.0
        self._seconds = self._seconds * decay + seconds

    def per_second(self, guess: float, weight: float = 4.0) -> float:
        """The rate; ``guess`` counts as so many events."""
        return (self._events + weight) / (self._seconds + weight / guess) if guess else 0.0
