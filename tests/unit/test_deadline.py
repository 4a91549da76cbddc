"""Deadlines: from a client's time limit, through stages and processes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtgr.errors import RequestTimeoutError
from mtgr.routing.deadline import MAX_SECONDS, MIN_SECONDS, Deadline, time_limit


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("timeout_us", "seconds"),
    [(0, 2.0), (-5, 2.0), (250_000, 0.25), (5_000_000, 5.0), (1, MIN_SECONDS), (2**63 - 1, MAX_SECONDS)],
)
def test_the_limit_is_the_clients_within_bounds(timeout_us: int, seconds: float) -> None:
    assert time_limit(timeout_us, 2.0) == seconds
    assert time_limit(10_000_000, 2.0, max_seconds=3.0) == 3.0


def test_it_runs_out() -> None:
    clock = Clock(50.0)
    deadline = Deadline.after(0.2, clock)
    deadline.check("features")
    assert deadline.remaining() == pytest.approx(0.2)
    assert deadline.limit(8.0) == pytest.approx(0.2)
    assert deadline.limit(0.1) == 0.1
    clock.now += 0.25
    assert deadline.expired
    assert deadline.limit(8.0) == 0.0
    with pytest.raises(RequestTimeoutError, match=r"^the request's time limit of 200 ms ran out before the engine;"):
        deadline.check("the engine")


@given(
    limit=st.floats(0.001, 500.0),
    passed=st.floats(0.0, 400.0),
    first=st.floats(0.0, 1e6),
    second=st.floats(0.0, 1e6),
    wall=st.floats(1.6e9, 2e9),
)
def test_it_means_the_same_in_another_process(
    limit: float, passed: float, first: float, second: float, wall: float
) -> None:
    # Both processes have clocks of their own, and share the time of day.
    written = Deadline.after(limit, Clock(first)).unix_ms(Clock(wall))
    read = Deadline.from_unix_ms(written, Clock(second), Clock(wall + passed))
    assert read.remaining() == pytest.approx(limit - passed, abs=0.002)
    assert read.unix_ms(Clock(wall + passed)) == pytest.approx(written, abs=1)


def test_never_stays_never() -> None:
    deadline = Deadline.from_unix_ms(0)
    assert math.isinf(deadline.remaining())
    assert not deadline.expired
    assert deadline.limit(8.0) == 8.0
    assert deadline.unix_ms() == 0


def test_a_time_of_day_that_was_set_back_makes_no_request_immortal() -> None:
    written = Deadline.after(1.0, Clock(0.0)).unix_ms(Clock(2e9))
    read = Deadline.from_unix_ms(written, Clock(0.0), Clock(1.9e9))
    assert read.remaining() == MAX_SECONDS
    with pytest.raises(RequestTimeoutError, match=r"^the request's time limit ran out before blending;"):
        Deadline.from_unix_ms(written, Clock(0.0), Clock(2.1e9)).check("blending")
