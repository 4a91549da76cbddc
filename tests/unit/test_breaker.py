"""The circuit breaker against a model of its rules, and engines behind it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.routing.batching import Arrays, ShapeBatcher
from mtgr.routing.breaker import BreakerConfig, CircuitBreaker, Permit, State
from mtgr.routing.guard import GuardedInference
from mtgr.routing.reasons import EngineLostError, Reason, RefusedError
from tests.unit.virtual_time import run_virtual

CONFIG = BreakerConfig(
    consecutive_failures=3,
    error_ratio=0.5,
    window_seconds=10.0,
    min_calls=8,
    slow_seconds=2.0,
    open_seconds=1.0,
    max_open_seconds=6.0,
    jitter=0.25,
    probes=2,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, config: BreakerConfig = CONFIG) -> CircuitBreaker:
    return CircuitBreaker("mtgr_onnx", config, clock, random.Random(5))


def permit(breaker: CircuitBreaker) -> Permit:
    found = breaker.allow()
    assert found is not None
    return found


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    for _ in range(times):
        permit(breaker).record(False, 0.1)


class BreakerMachine(RuleBasedStateMachine):
    """Calls begin, end in any order or are given up while time passes; the model keeps only what the rules speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.changes: list[State] = []
        self.breaker = CircuitBreaker(
            "m", CONFIG, self.clock, random.Random(3), lambda breaker: self.changes.append(breaker.state)
        )
        self.calls: list[tuple[Permit, int]] = []  # with the number of changes before each
        self.ends: list[tuple[float, bool]] = []  # ends of this closed time
        self.opened = 0.0
        self.openings = 0

    @rule(seconds=st.floats(0.01, 4))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def begin(self) -> None:
        probing = sum(era == len(self.changes) for _, era in self.calls)
        state, changes = self.breaker.state, len(self.changes)
        found = self.breaker.allow()
        assert (found is not None) == (
            state is State.CLOSED
            or (state is State.HALF_OPEN and (self.changes[-1] is State.OPEN or probing < CONFIG.probes))
        )
        if found is not None:
            assert len(self.changes) - changes == (state is State.HALF_OPEN and self.changes[changes - 1] is State.OPEN)
            self.calls.append((found, len(self.changes)))

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), end=st.sampled_from(("ok", "ok", "failed", "failed", "slow", "cancelled", "lost")))
    def end(self, data: st.DataObject, end: str) -> None:
        found, era = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        state, changes = self.breaker.state, len(self.changes)
        if end == "cancelled":
            found.cancel()
        elif end == "lost":
            found.trip("its process is gone")
        else:
            found.record(end != "failed", 2.5 if end == "slow" else 0.1)
        found.record(False, 0.1)  # a second word about the same call says nothing
        failed = end in ("failed", "slow", "lost")
        expected: list[State] = []
        if era == changes and end != "cancelled":
            if end == "lost":
                expected = [State.OPEN]
            elif state is State.HALF_OPEN:
                expected = [State.OPEN if failed else State.CLOSED]
            else:
                self.ends.append((self.clock.now, failed))
                expected = [State.OPEN] if failed and self.must_open() else []
        assert self.changes[changes:] == expected
        if expected:
            self.ends = []
            self.openings = self.openings + 1 if expected == [State.OPEN] else 0
            self.opened = self.clock.now

    def must_open(self) -> bool:
        recent = [failed for when, failed in self.ends if when >= self.clock.now - CONFIG.window_seconds]
        # The window moves in steps: calls of its oldest step may count or not.
        surely = [failed for when, failed in self.ends if when > self.clock.now - 0.9 * CONFIG.window_seconds]
        in_a_row = [failed for _, failed in self.ends[-CONFIG.consecutive_failures :]]
        if len(in_a_row) == CONFIG.consecutive_failures and all(in_a_row):
            return True
        verdicts = {
            len(some) >= CONFIG.min_calls and sum(some) >= CONFIG.error_ratio * len(some) for some in (recent, surely)
        }
        return verdicts.pop() if len(verdicts) == 1 else self.breaker._state is State.OPEN

    @invariant()
    def it_is_open_for_as_long_as_it_says(self) -> None:
        if not self.changes or self.changes[-1] is not State.OPEN:
            return
        longest = min(CONFIG.open_seconds * 2 ** (self.openings - 1), CONFIG.max_open_seconds)
        elapsed = self.clock.now - self.opened
        if elapsed < longest * (1 - CONFIG.jitter) - 1e-9:
            assert self.breaker.state is State.OPEN
            assert self.breaker.refusal is not None
            assert "left alone for" in self.breaker.refusal
        elif elapsed >= longest:
            assert self.breaker.state is State.HALF_OPEN
            assert self.breaker.refusal is None


BreakerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
TestBreakerMachine = BreakerMachine.TestCase


def test_failures_in_a_row_open_it_and_a_success_between_does_not() -> None:
    breaker = make(Clock())
    fail(breaker, 2)
    permit(breaker).record(True, 0.1)
    fail(breaker, 2)
    assert breaker.state is State.CLOSED
    fail(breaker)
    assert breaker.state is State.OPEN
    assert breaker.allow() is None
    assert breaker.refusal is not None
    assert breaker.refusal.startswith("mtgr_onnx is left alone for ")
    assert breaker.refusal.endswith("s after 3 failures in a row")


def test_a_bad_share_of_the_calls_opens_it_once_there_are_enough() -> None:
    clock = Clock()
    breaker = make(clock)
    for index in range(7):
        permit(breaker).record(index % 2 == 1, 0.1)
        clock.now += 0.5
    assert breaker.state is State.CLOSED
    fail(breaker)
    assert breaker.state is State.OPEN
    assert breaker.cause == "5 failures in 8 calls"


def test_failures_of_long_ago_do_not_count() -> None:
    clock = Clock()
    breaker = make(clock)
    for index in range(7):
        permit(breaker).record(index % 2 == 1, 0.1)
    clock.now += 11.0
    permit(breaker).record(True, 0.1)
    fail(breaker, 2)
    assert breaker.state is State.CLOSED


def test_slow_calls_are_failures() -> None:
    breaker = make(Clock())
    for _ in range(3):
        permit(breaker).record(True, 2.1)
    assert breaker.state is State.OPEN


def test_the_time_it_is_open_doubles_up_to_a_bound_and_starts_anew_after_a_success() -> None:
    clock = Clock()
    breaker = make(clock)

    def open_seconds() -> float:
        start = clock.now
        while breaker.state is State.OPEN:
            clock.now += 0.001
        return clock.now - start

    fail(breaker, 3)
    for most in (1.0, 2.0, 4.0, 6.0, 6.0):
        assert most * 0.75 - 0.01 <= open_seconds() <= most + 0.01
        fail(breaker)
    open_seconds()
    permit(breaker).record(True, 0.1)
    assert breaker.state is State.CLOSED
    fail(breaker, 3)
    assert open_seconds() <= 1.01


def test_new_settings_keep_the_state_and_shorten_the_time_it_is_open() -> None:
    clock = Clock()
    breaker = CircuitBreaker("m", BreakerConfig(consecutive_failures=2, open_seconds=20.0, jitter=0.0), clock)
    fail(breaker)
    quick = BreakerConfig(consecutive_failures=2, open_seconds=1.0, max_open_seconds=5.0, jitter=0.0)
    breaker.configure(quick)
    fail(breaker)
    assert breaker.state is State.CLOSED  # one failure since
    breaker.configure(BreakerConfig(consecutive_failures=2, open_seconds=20.0, jitter=0.0))
    fail(breaker)
    fail(breaker)
    assert breaker.state is State.OPEN
    breaker.configure(quick)
    assert breaker.refusal is not None
    clock.now += 5.0
    assert breaker.state is State.HALF_OPEN
    permit = breaker.allow()
    assert permit is not None
    permit.trip("its process is gone", for_ever=True)
    breaker.configure(quick)
    clock.now += 1e9
    assert breaker.state is State.OPEN


def test_jitter_differs_between_servers() -> None:
    def reopens(seed: int) -> float:
        clock = Clock()
        breaker = CircuitBreaker("m", CONFIG, clock, random.Random(seed))
        fail(breaker, 3)
        while breaker.state is State.OPEN:
            clock.now += 0.001
        return clock.now

    assert len({round(reopens(seed), 2) for seed in range(10)}) > 5


def test_a_probe_that_was_given_up_leaves_its_place_to_another() -> None:
    clock = Clock()
    breaker = make(clock)
    fail(breaker, 3)
    clock.now += 1.0
    first, second = permit(breaker), permit(breaker)
    assert breaker.allow() is None
    assert breaker.refusal == "mtgr_onnx is being tried again after 3 failures in a row"
    first.cancel()
    first.cancel()
    third = permit(breaker)
    assert breaker.allow() is None
    second.record(True, 0.1)
    assert breaker.state is State.CLOSED
    third.record(False, 0.1)  # it began while it was half-open; by now that is decided
    fail(breaker, 2)
    assert breaker.state is State.CLOSED


@pytest.mark.parametrize(
    "bad",
    [
        {"consecutive_failures": 0},
        {"probes": 0},
        {"min_calls": 0},
        {"error_ratio": 0.0},
        {"error_ratio": 1.5},
        {"jitter": 1.0},
        {"slow_seconds": float("nan")},
        {"max_open_seconds": 0.5},
    ],
)
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=f"breaker: {next(iter(bad))} is"):
        BreakerConfig(**bad)  # type: ignore[arg-type]


# Engines behind it.


class Engine:
    """Does as it is told: "ok", "fail", "hang", or "lost"."""

    def __init__(self) -> None:
        self.mode = "ok"
        self.seconds = 0.01
        self.calls = 0

    async def infer(self, model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        self.calls += 1
        await asyncio.sleep(1e6 if self.mode == "hang" else self.seconds)
        if self.mode == "lost":
            raise EngineLostError("the stub is not there")
        if self.mode == "fail":
            raise UnavailableError("out of memory")
        return {"y": inputs["x"]}


async def ask(engines: GuardedInference | ShapeBatcher, rows: int = 1) -> str:
    try:
        await engines.infer("m", {"x": np.zeros((1, 2 * rows))}, ["y"])
    except RefusedError as error:
        return error.reason
    except UnavailableError as error:
        return str(error)
    return "ok"


def guarded(timeout: float = 1.0) -> tuple[Engine, CircuitBreaker, GuardedInference]:
    clock = asyncio.get_running_loop().time
    engine, breaker = Engine(), CircuitBreaker("m", CONFIG, clock)
    return engine, breaker, GuardedInference(engine, lambda model: breaker, timeout, clock)


def test_an_engine_that_fails_is_left_alone_and_taken_back() -> None:
    async def check() -> None:
        engine, breaker, engines = guarded()
        engine.mode = "fail"
        answers = [await ask(engines) for _ in range(5)]
        assert answers == ["out of memory"] * 3 + [Reason.BREAKER_OPEN] * 2
        assert engine.calls == 3
        engine.mode = "ok"
        await asyncio.sleep(1.0)
        assert await ask(engines) == "ok"
        assert breaker.state is State.CLOSED

    run_virtual(check())


def test_an_engine_that_hangs_behind_the_batcher_opens_its_breaker() -> None:
    async def check() -> None:
        engine, breaker, engines = guarded()
        batcher = ShapeBatcher(engines, max_running=2)
        engine.mode = "hang"
        assert await ask(batcher) == Reason.TIMED_OUT
        assert breaker.state is State.OPEN
        assert breaker.cause == "a call that did not end within 1 s"
        assert await ask(batcher) == Reason.BREAKER_OPEN

    run_virtual(check())


def test_an_engine_whose_process_is_gone_is_left_alone_at_once() -> None:
    async def check() -> None:
        engine, breaker, engines = guarded()
        engine.mode = "lost"
        assert await ask(engines) == "the stub is not there"
        assert breaker.state is State.OPEN
        assert await ask(engines) == Reason.BREAKER_OPEN
        assert engine.calls == 1

    run_virtual(check())


def test_a_hang_is_known_from_what_calls_took_of_late() -> None:
    async def check() -> None:
        clock = asyncio.get_running_loop().time
        engine, _, engines = guarded(timeout=60.0)
        for pause in [0.2] * 3 + [0.01] * 97:  # the slowest ones say what may be, not the quickest
            engine.seconds = pause
            assert await ask(engines) == "ok"
        engine.mode = "hang"
        before = clock()
        assert await ask(engines) == Reason.TIMED_OUT
        assert 4.0 <= clock() - before <= 5.5

    run_virtual(check())


def test_a_call_with_much_more_in_it_than_usual_has_more_time() -> None:
    async def check() -> None:
        clock = asyncio.get_running_loop().time
        engine, breaker, engines = guarded(timeout=60.0)
        engine.seconds = 0.05
        for _ in range(200):
            assert await ask(engines) == "ok"
        engine.seconds = 9.0
        assert await ask(engines, rows=100) == "ok"
        assert breaker.state is State.CLOSED
        before = clock()
        assert await ask(engines, rows=1) == Reason.TIMED_OUT
        assert clock() - before <= 3.0

    run_virtual(check())


def test_cancelled_calls_never_open_it() -> None:
    async def check() -> None:
        engine, breaker, engines = guarded()
        engine.mode = "hang"
        for _ in range(20):
            call = asyncio.ensure_future(ask(engines))
            await asyncio.sleep(0.5)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        assert breaker.state is State.CLOSED
        assert engine.calls == 20

    run_virtual(check())
