"""What the router says of its load, over memory that two processes share, and whom the door refuses for it."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtgr.errors import RequestTimeoutError
from mtgr.routing.admission import Admission, AdmissionConfig
from mtgr.routing.board import FRESH_SECONDS, PressureBoard, UsualSeconds, board_path, server_board
from mtgr.routing.deadline import Deadline
from mtgr.routing.gate import Gate
from mtgr.routing.pressure import Pressure
from mtgr.routing.reasons import Reason, RefusedError
from tests.unit.virtual_time import run_virtual

# 8 run at a time, one leaves every 0.1 s, nearly all take 0.9 s at most.
FULL = Pressure(running=8, limit=8, waiting=2, max_queue=100, interval=0.1, service=0.9, share=0.5, max_wait=0.25)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(tmp_path: Path, clock: Clock) -> PressureBoard:
    return PressureBoard(tmp_path / "board", clock)


# --- the rule ----------------------------------------------------------------------------------------------------


def test_a_request_is_refused_that_would_not_be_done_in_its_share_of_the_time() -> None:
    assert FULL.expected_seconds == pytest.approx(1.1)  # a wait of 0.2 s, and 0.9 s
    assert FULL.refusal("m", remaining=2.3, now=0.0) is None
    refusal = FULL.refusal("m", remaining=2.1, now=0.0)
    assert refusal is not None
    assert refusal.reason is Reason.OVERLOADED
    assert str(refusal) == (
        "m: an answer would take about 1.1 s behind 2 others, and the request allows 2.1 s; try again later."
    )
    assert FULL._replace(running=7).refusal("m", remaining=0.1, now=0.0) is None  # there is a place


def test_a_queue_may_be_long_but_must_not_stand() -> None:
    long = FULL._replace(waiting=3, waiting_since=10.0)
    assert long.refusal("m", remaining=100.0, now=10.2) is None
    assert long.refusal("m", remaining=100.0, now=10.3) is not None
    assert long._replace(waiting=2).refusal("m", remaining=100.0, now=10.3) is None  # 0.2 s
    assert FULL._replace(max_queue=2).refusal("m", remaining=100.0, now=0.0) is not None


def test_draining_refuses_where_there_is_a_place() -> None:
    refusal = Pressure(draining=1.0).refusal("m", 10.0, 0.0)
    assert refusal is not None
    assert refusal.reason is Reason.DRAINING


@given(st.integers(0, 20), st.integers(1, 20), st.integers(0, 20), st.integers(0, 20))
def test_requests_on_their_way_take_free_places_first(running: int, limit: int, waiting: int, arriving: int) -> None:
    before = Pressure(running=running, limit=limit, waiting=waiting)
    after = before.behind(arriving)
    assert after.running + after.waiting == running + waiting + arriving
    assert after.running == max(running, min(limit, running + arriving))


# --- the memory --------------------------------------------------------------------------------------------------


def test_what_is_published_is_read_until_it_is_old(board: PressureBoard, clock: Clock) -> None:
    assert board.pressure is None  # nobody has said anything
    assert board.usual_seconds is None
    board.publish(FULL)
    board.announce(2.5)
    other = PressureBoard(board.path, clock)
    assert other.pressure == FULL
    assert other.usual_seconds == 2.5
    clock.now += FRESH_SECONDS + 0.01
    assert other.pressure is None
    assert other.usual_seconds is None


def _publish(path: Path, pipe: Connection) -> None:
    """Publish ever other numbers, equal to each other, until told to end."""
    board, number = PressureBoard(path), 0
    while not pipe.poll():
        number += 1
        board.publish(Pressure(*[number] * len(Pressure._fields)))


def test_another_process_sees_what_was_written_at_one_moment(tmp_path: Path) -> None:
    board = PressureBoard(tmp_path / "board")
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_publish, args=(board.path, theirs))
    process.start()
    seen: set[Pressure] = set()
    end = time.monotonic() + 30.0
    while len(seen) < 2000 and time.monotonic() < end:
        pressure = board.pressure
        if pressure is not None:
            assert len(set(pressure)) == 1
            seen.add(pressure)
    ours.send("enough")
    process.join()
    assert len(seen) == 2000
    assert process.exitcode == 0


def test_a_file_that_was_removed_is_found_again(board: PressureBoard, clock: Clock) -> None:
    router = PressureBoard(board.path, clock)
    router.close()  # it is unloaded
    assert not board.path.exists()
    router = PressureBoard(board.path, clock)  # and loaded again
    router.publish(FULL)
    assert board.pressure is None
    board.refresh()
    assert board.pressure == FULL
    board.refresh()
    assert board.pressure == FULL


def test_the_file_is_nobody_elses(tmp_path: Path, clock: Clock) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(OSError, match="link"):
        PressureBoard(tmp_path / "link", clock)
    assert target.read_bytes() == b"mine"
    assert PressureBoard(tmp_path / "board", clock).path.stat().st_mode & 0o777 == 0o600


def test_a_server_has_a_file_of_its_own() -> None:
    assert board_path(os.getpid()) != board_path(os.getppid())
    assert board_path(os.getpid()) == board_path(os.getpid())
    with pytest.raises(OSError, match="proc"):
        board_path(2**22 + 1)
    ours = PressureBoard(board_path(os.getpid()))
    namespace, server, started = ours.path.name.removeprefix("mtgr-").split("-")
    killed = ours.path.with_name(f"mtgr-{namespace}-{server}-{int(started) + 1}")  # its process id was given again
    gone = ours.path.with_name(f"mtgr-{namespace}-{2**22 + 1}-{started}")
    for orphan in (killed, gone):
        orphan.touch()
    board = server_board()
    assert board is not None
    assert board.path == board_path(os.getppid())
    board.close()
    assert not board.path.exists()
    assert not killed.exists()
    assert not gone.exists()
    assert ours.path.exists()
    ours.close()


def test_usual_seconds_are_a_median_that_few_outliers_do_not_move() -> None:
    usual = UsualSeconds()
    assert math.isinf(usual.value)
    for index in range(300):
        usual.add(600.0 if index % 5 == 1 else 2.0)
    assert usual.value == pytest.approx(2.0, rel=0.1)


# --- both together -----------------------------------------------------------------------------------------------


def test_the_door_refuses_what_the_router_would(board: PressureBoard, clock: Clock) -> None:
    gate = Gate(board, max_queue=50, clock=clock)
    gate.arrive(Deadline.after(0.1, clock), ahead=0)  # nothing is known of the router
    board.publish(FULL)
    gate.arrive(Deadline.after(2.3, clock), ahead=0)
    with pytest.raises(RefusedError, match=r"^the router: an answer would take about 1\.1 s behind 2 others"):
        gate.arrive(Deadline.after(2.1, clock), ahead=0)
    with pytest.raises(RefusedError, match=r"about 1\.3 s behind 4 others"):  # those on their way count
        gate.arrive(Deadline.after(2.3, clock), ahead=2)
    clock.now += FRESH_SECONDS + 0.01
    gate.arrive(Deadline.after(0.1, clock), ahead=49)  # let the router say it again
    with pytest.raises(RefusedError, match="50 requests wait, as many as may") as caught:
        gate.arrive(Deadline.after(10.0, clock), ahead=50)
    assert caught.value.reason is Reason.OVERLOADED


def test_who_waited_in_front_is_judged_again(board: PressureBoard, clock: Clock) -> None:
    gate = Gate(board, max_queue=50, clock=clock)
    deadline = Deadline.after(2.1, clock)
    gate.proceed(deadline)
    board.publish(FULL)
    with pytest.raises(RefusedError, match="the router"):
        gate.proceed(deadline)
    clock.now += 2.2
    with pytest.raises(RequestTimeoutError, match="before feature extraction"):
        gate.proceed(deadline)


def test_without_shared_memory_only_the_bound_holds(clock: Clock) -> None:
    gate = Gate(None, max_queue=1, clock=clock)
    gate.arrive(Deadline.after(0.01, clock), ahead=0)
    gate.proceed(Deadline.after(0.01, clock))
    gate.refresh()
    gate.close()
    with pytest.raises(RefusedError, match="1 requests wait"):
        gate.arrive(Deadline.after(0.01, clock), ahead=1)


def test_the_router_says_at_every_change_how_it_is_pressed(tmp_path: Path) -> None:
    async def check() -> None:
        clock = asyncio.get_running_loop().time
        board = PressureBoard(tmp_path / "board", clock)
        admission = Admission("m", AdmissionConfig(max_concurrent=1), clock, board)

        async def hold() -> None:
            async with admission.admit(Deadline.after(100.0, clock)):
                assert board.pressure == admission.pressure()
                await asyncio.sleep(1.0)

        def seen() -> tuple[float, float]:
            pressure = board.pressure
            assert pressure is not None
            assert pressure == admission.pressure()
            return pressure.running, pressure.waiting

        tasks = [asyncio.ensure_future(hold()) for _ in range(3)]
        await asyncio.sleep(0)
        assert seen() == (1, 2)
        tasks[2].cancel()
        await asyncio.gather(tasks[2], return_exceptions=True)
        assert seen() == (1, 1)
        await tasks[0]
        assert seen() == (1, 0)
        await tasks[1]
        assert seen() == (0, 0)
        admission.drain()
        assert admission.pressure().draining
        assert seen() == (0, 0)

    run_virtual(check())


def test_requests_that_the_door_refuses_count_for_the_usual_time_limit(tmp_path: Path) -> None:
    """Else those with much time, which alone would get through, would let service take ever longer."""

    async def check(announced: bool) -> int:
        clock = asyncio.get_running_loop().time
        board = PressureBoard(tmp_path / str(announced), clock)
        admission = Admission("m", AdmissionConfig(initial_limit=8, min_limit=1), clock, board)
        for _ in range(20):
            if announced:
                board.announce(0.1)
            async with admission.admit(Deadline.after(10.0, clock)):
                await asyncio.sleep(0.2)
        return admission.limit

    assert run_virtual(check(True)) < 8
    assert run_virtual(check(False)) == 8
