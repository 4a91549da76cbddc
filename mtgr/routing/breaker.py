"""A circuit breaker: leaves an engine alone while it fails, and tries it again with a few calls."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from mtgr.errors import ConfigurationError

Clock = Callable[[], float]
Listener = Callable[["CircuitBreaker"], None]

_SLOTS = 10  # the window moves in steps of a tenth of it


class State(StrEnum):
    """Whether calls go through."""

    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


@dataclass(frozen=True)
class BreakerConfig:
    """Settings of a circuit breaker.

    Attributes:
        consecutive_failures: Failures in a row that open it.
        error_ratio: Part of the calls of a window that must fail to open it.
        window_seconds: Length of the window.
        min_calls: Calls in a window below which its ratio says nothing.
        slow_seconds: A call that takes longer counts as a failure.
        open_seconds: How long calls are kept away at first; doubled with every probe that fails.
        max_open_seconds: The most that this grows to.
        jitter: Part of that time which is drawn by lot, so that many servers do not probe at once.
        probes: Calls that are let through at a time afterwards.
    """

    consecutive_failures: int = 5
    error_ratio: float = 0.5
    window_seconds: float = 10.0
    min_calls: int = 20
    slow_seconds: float = 8.0
    open_seconds: float = 1.0
    max_open_seconds: float = 30.0
    jitter: float = 0.2
    probes: int = 1

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        for name in ("consecutive_failures", "min_calls", "probes"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"breaker: {name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("window_seconds", "slow_seconds", "open_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"breaker: {name} is {getattr(self, name)}; it must be positive.")
        if not self.max_open_seconds >= self.open_seconds:
            raise ConfigurationError(
                f"breaker: max_open_seconds is {self.max_open_seconds}; it must be at least open_seconds."
            )
        if not 0 < self.error_ratio <= 1:
            raise ConfigurationError(f"breaker: error_ratio is {self.error_ratio}; it must be above 0, at most 1.")
        if not 0 <= self.jitter < 1:
            raise ConfigurationError(f"breaker: jitter is {self.jitter}; it must be at least 0 and below 1.")


class Permit:
    """One call that was let through. Its first outcome counts, and only while the breaker has not changed since."""

    def __init__(self, breaker: CircuitBreaker, generation: int) -> None:
        self._breaker: CircuitBreaker | None = breaker
        self._generation = generation

    def record(self, ok: bool, seconds: float) -> None:
        """Say how the call ended and how long it took."""
        self._settle(ok, seconds)

    def trip(self, cause: str, for_ever: bool = False) -> None:
        """Say that not even one more call should be tried now, or ever."""
        breaker, self._breaker = self._breaker, None
        if breaker is not None and self._generation == breaker._generation:
            breaker._open(cause, for_ever)

    def cancel(self) -> None:
        """Say that the caller gave up: that tells nothing about the engine."""
        self._settle(None, 0.0)

    def _settle(self, ok: bool | None, seconds: float) -> None:
        breaker, self._breaker = self._breaker, None
        if breaker is not None:
            breaker._settle(self._generation, ok, seconds)


class CircuitBreaker:
    """Closed, it lets calls through; open, none; half-open, a few, of which the first to end decides.

    For one event loop or thread; ``state`` and ``refusal`` may be read from others.

    Args:
        name: The engine, for messages.
        config: Settings.
        clock: Gives seconds.
        rng: Where the jitter comes from.
        listener: Told of every change of state.
    """

    def __init__(
        self,
        name: str,
        config: BreakerConfig | None = None,
        clock: Clock = time.monotonic,
        rng: random.Random | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.name = name
        self.config = config or BreakerConfig()
        self.cause = ""
        self._clock = clock
        self._rng = rng or random.Random()
        self._listener = listener
        self._state = State.CLOSED
        self._generation = 0
        self._window = _Window(self.config.window_seconds, clock)
        self._in_a_row = 0
        self._openings = 0  # since it was closed last
        self._until = 0.0
        self._probing = 0

    @property
    def state(self) -> State:
        """The state as of now."""
        if self._state is State.OPEN and self._clock() >= self._until:
            return State.HALF_OPEN
        return self._state

    @property
    def refusal(self) -> str | None:
        """None if a call would be let through now, else why not, as a phrase."""
        state = self.state
        if state is State.CLOSED or (state is State.HALF_OPEN and self._probing < self.config.probes):
            return None
        if state is State.HALF_OPEN:
            return f"{self.name} is being tried again after {self.cause}"
        if math.isinf(self._until):
            return f"{self.name} is not called any more after {self.cause}; restart the server"
        return f"{self.name} is left alone for {max(0.0, self._until - self._clock()):.1f} s after {self.cause}"

    def configure(self, config: BreakerConfig) -> None:
        """Take other settings; the state stays, above all that of an engine that is lost, and counting begins anew."""
        self.config = config
        self._window = _Window(config.window_seconds, self._clock)
        self._in_a_row = 0
        if math.isfinite(self._until):
            self._until = min(self._until, self._clock() + config.max_open_seconds)

    def allow(self) -> Permit | None:
        """A permit for one call, to be given its outcome, or None if the engine is to be left alone."""
        if self.refusal is not None:
            return None
        if self._state is State.OPEN:
            self._become(State.HALF_OPEN)
        if self._state is State.HALF_OPEN:
            self._probing += 1
        return Permit(self, self._generation)

    def _settle(self, generation: int, ok: bool | None, seconds: float) -> None:
        if generation != self._generation:
            return  # it began in another time, and that time's end was decided without it
        slow = bool(ok) and seconds > self.config.slow_seconds
        failed = slow or ok is False
        if self._state is State.HALF_OPEN:
            self._probing -= 1
            if failed:
                self._open(f"another call that {'was too slow' if slow else 'failed'}")
            elif ok:
                self._openings = 0
                self._become(State.CLOSED)
        elif ok is not None:
            self._window.add(failed)
            self._in_a_row = self._in_a_row + 1 if failed else 0
            calls, failures = self._window.counts()
            if self._in_a_row >= self.config.consecutive_failures:
                self._open(f"{self._in_a_row} failures in a row")
            elif failed and calls >= self.config.min_calls and failures >= self.config.error_ratio * calls:
                self._open(f"{failures} failures in {calls} calls")

    def _open(self, cause: str, for_ever: bool = False) -> None:
        self.cause = cause
        # The exponent is bounded only so that the power is a number.
        seconds = min(self.config.open_seconds * 2.0 ** min(self._openings, 60), self.config.max_open_seconds)
        self._until = self._clock() + seconds * (1 - self.config.jitter * self._rng.random())
        if for_ever:
            self._until = math.inf
        self._openings += 1
        self._become(State.OPEN)

    def _become(self, state: State) -> None:
        self._state = state
        self._generation += 1
        self._probing = 0
        self._in_a_row = 0
        self._window.clear()
        if self._listener is not None:
            self._listener(self)


class _Window:
    """Calls and failures of the last seconds, in slots, so that its size does not depend on the load."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        self._slot_seconds = seconds / _SLOTS
        self._clock = clock
        self._slots: dict[int, tuple[int, int]] = {}

    def add(self, failed: bool) -> None:
        """Count a call."""
        slot = int(self._clock() / self._slot_seconds)
        calls, failures = self._slots.get(slot, (0, 0))
        self._slots[slot] = (calls + 1, failures + failed)

    def counts(self) -> tuple[int, int]:
        """Calls and failures."""
        oldest = int(self._clock() / self._slot_seconds) - _SLOTS + 1
        self._slots = {slot: counts for slot, counts in self._slots.items() if slot >= oldest}
        return sum(calls for calls, _ in self._slots.values()), sum(failures for _, failures in self._slots.values())

    def clear(self) -> None:
        """Forget all."""
        self._slots = {}
