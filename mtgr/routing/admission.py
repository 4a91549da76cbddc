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
from mtgr.routing.board import PressureBoard, UsualSeconds
from mtgr.routing.deadline import Deadline
from mtgr.routing.latency import MovingAverage
from mtgr.routing.pressure import Pressure
from mtgr.routing.reasons import Reason, RefusedError, reason_of

Clock = Callable[[], float]

_RECOVERY_SECONDS = 30.0  # until an expectation that was wrong is forgotten
_LEAST_TRUST = 0.3
_DEVIATIONS = 1.0  # standard deviations above the mean that service is expected to take


@dataclass(frozen=True)
class AdmissionConfig:
    """Settings of admission control.

    Attributes:
        max_concurrent: Most requests that run at a time.
        max_queue: Most requests that wait.
        shedding: Whether requests are refused that could not be answered in time, and the limit follows what service
            takes; otherwise only the two bounds above hold.
        initial_limit: Requests that may run at a time before it is known how long they take.
        min_limit: The least that this falls to.
        service_share: Part of the usual time limit that service may take before fewer run at a time.
        safety: Part of the time left that expected waiting and service together may fill.
        max_wait: Seconds of expected waiting that a queue may stand at; a burst may wait longer, till its deadlines.
        half_life: Seconds after which a measurement counts half.
    """

    max_concurrent: int = 256
    max_queue: int = 1024
    shedding: bool = True
    initial_limit: int = 8
    min_limit: int = 4
    service_share: float = 0.5
    safety: float = 0.5
    max_wait: float = 1.0
    half_life: float = 0.5

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
        for name in ("max_wait", "half_life"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"admission: {name} is {getattr(self, name)}; it must be positive.")


class Admission:
    """Lets requests run in the order of their arrival; for one event loop.

    How many run at a time follows how long they take: step by step more while they are quick, a quarter fewer after one
    that takes more than its share of the usual time limit (additive increase, multiplicative decrease). Who finds no
    place waits, unless those ahead will take longer than the request's deadline allows, by Little's law: where N at a
    time take T seconds each, one leaves every T / N seconds.

    Args:
        name: What is admitted to, for messages.
        config: Settings.
        clock: Gives seconds.
        board: Where others read how hard it is pressed.

    Attributes:
        running: Requests that run.
        admitted: Requests that were let run so far.
        refused: Requests that were not, by reason.
        draining: Whether new requests are refused, while those that are here end.
    """

    def __init__(
        self,
        name: str,
        config: AdmissionConfig | None = None,
        clock: Clock = time.monotonic,
        board: PressureBoard | None = None,
    ) -> None:
        self.name = name
        self.config = config or AdmissionConfig()
        self.running = 0
        self.admitted = 0
        self.refused: Counter[Reason] = Counter()
        self.draining = False
        self._clock = clock
        self._board = board
        self._queue: OrderedDict[asyncio.Future[None], Deadline] = OrderedDict()
        self._queued_since = math.inf
        self._limit = float(min(self.config.initial_limit, self.config.max_concurrent))
        self._decreased = -math.inf
        self._usual = UsualSeconds()
        self._service = MovingAverage(self.config.half_life, clock)
        self._company = MovingAverage(self.config.half_life, clock)
        self._squares = MovingAverage(self.config.half_life, clock)
        self._trust = _Trust(clock)
        self._area, self._area_until = 0.0, clock()  # running requests, integrated over time

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def limit(self) -> int:
        """Requests that may run at a time, as of now."""
        most = self.config.max_concurrent
        return min(int(self._limit), most) if self.config.shedding else most

    @property
    def idle(self) -> bool:
        """Whether no request is here."""
        return not self.running and not self._queue

    @property
    def alone(self) -> bool:
        """Whether no more than one request is here."""
        return self.running <= 1 and not self._queue

    def drain(self) -> None:
        """Refuse whatever comes from now on; what is here ends, and then ``idle`` holds."""
        self.draining = True
        self._publish()

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
        self._refuse_the_hopeless(deadline)
        queued = self.running >= self.limit
        if queued:
            await self._wait(deadline)
        else:
            self._start()
            self._publish()
        started, area = self._clock(), self._area
        error: BaseException | None = None
        try:
            yield started - arrived
        except BaseException as raised:
            error = raised
            raise
        finally:
            full = self.running >= self.limit
            self._count(-1)
            late = error is not None and reason_of(error) in (Reason.DEADLINE, Reason.TIMED_OUT)
            if error is None or late:  # of what ended early the time says nothing
                self._measure(started, area)
                self._adapt(started, late, full)
                if queued and late:
                    self._trust.lower()
            self._fill()
            self._publish()

    def pressure(self) -> Pressure:
        """What decides about a request that comes now."""
        config = self.config
        return Pressure(
            running=self.running,
            limit=self.limit,
            waiting=len(self._queue),
            max_queue=config.max_queue,
            interval=self._interval(),
            service=self._service_seconds(),
            share=config.safety * self._trust.value if config.shedding else math.inf,
            max_wait=config.max_wait if config.shedding else math.inf,
            waiting_since=self._queued_since,
            draining=self.draining,
        )

    def _interval(self) -> float:
        """Seconds from one request that leaves to the next."""
        service, company = self._service.mean or 0.0, max(self._company.mean or 1.0, 1.0)
        # What more company costs is not known before it is there: halfway between nothing and as much as others cost.
        return service / math.sqrt(company * max(company, self.limit))

    def _service_seconds(self) -> float:
        """Seconds that nearly every request stays within."""
        mean, squares = self._service.mean, self._squares.mean
        if mean is None or squares is None:
            return 0.0
        return mean + _DEVIATIONS * math.sqrt(max(squares - mean * mean, 0.0))

    def _refuse_the_hopeless(self, deadline: Deadline) -> None:
        remaining = deadline.remaining()
        if remaining <= 0 and not self.draining:
            self.refused[Reason.DEADLINE] += 1
            deadline.check(f"admission to {self.name}")
        self._usual.add(remaining)
        if self.running < self.limit and not self.draining:
            return
        refusal = self.pressure().refusal(self.name, remaining, self._clock())
        if refusal is not None:
            self._publish()
            self.refused[refusal.reason] += 1
            raise refusal

    async def _wait(self, deadline: Deadline) -> None:
        place = asyncio.get_running_loop().create_future()
        if not self._queue:
            self._queued_since = self._clock()
        self._queue[place] = deadline
        self._publish()
        remaining = deadline.remaining()
        try:
            async with asyncio.timeout(remaining if math.isfinite(remaining) else None):
                await place
        except BaseException as error:
            self._queue.pop(place, None)
            if place.done() and not place.cancelled() and place.exception() is None:
                self._count(-1)  # it was given a place in the same moment
                self._fill()
            self._publish()
            if isinstance(error, TimeoutError):
                self.refused[Reason.DEADLINE] += 1
                raise RequestTimeoutError(
                    f"the request's time limit ran out while it waited for {self.name}; allow more time."
                ) from error
            self.refused[reason_of(error)] += 1
            raise

    def _fill(self) -> None:
        while self._queue and self.running < self.limit:
            place, deadline = self._queue.popitem(last=False)
            if place.done():
                continue
            if self.config.shedding and (self.running + 1) * self._interval() > deadline.remaining():
                # It was let wait when less was known; its place helps another one.
                text = f"{self.name}: the request has waited for too long to be answered in time; try again later."
                place.set_exception(RefusedError(text, Reason.OVERLOADED))
                continue
            self._start()
            place.set_result(None)
        if not self._queue:
            self._queued_since = math.inf

    def _start(self) -> None:
        self._count(1)
        self.admitted += 1

    def _count(self, change: int) -> None:
        now = self._clock()
        self._area += self.running * (now - self._area_until)
        self._area_until = now
        self.running += change

    def _measure(self, started: float, area: float) -> None:
        seconds = self._clock() - started
        self._service.add(seconds)
        self._squares.add(seconds * seconds)
        self._company.add((self._area - area) / seconds if seconds > 0 else 1.0)

    def _usual_seconds(self) -> float:
        """Time that requests usually have left; those that were refused before they came here count too."""
        return (self._board.usual_seconds if self._board else None) or self._usual.value

    def _publish(self) -> None:
        if self._board is not None:
            self._board.publish(self.pressure())

    def _adapt(self, started: float, late: bool, full: bool) -> None:
        now = self._clock()
        if late or now - started > self.config.service_share * self._usual_seconds():
            # Once for all that ran together: only what began under the present limit speaks against it.
            if started >= self._decreased:
                self._limit = max(self._limit * 0.75, min(self.config.min_limit, self.config.max_concurrent))
                self._decreased = now
        elif full:
            self._limit = min(self._limit + 1 / math.sqrt(self._limit), self.config.max_concurrent)


class _Trust:
    """How far expectations are to be trusted, up to 1: less after one that was wrong, slowly more again."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._value, self._since = 1.0, clock()

    @property
    def value(self) -> float:
        """As of now."""
        recovered = (self._clock() - self._since) / _RECOVERY_SECONDS
        return self._value + (1.0 - self._value) * min(recovered, 1.0)

    def lower(self) -> None:
        """After a request that was let wait and came too late."""
        self._value, self._since = max(self.value * 0.8, _LEAST_TRUST), self._clock()
