"""Calls that block, in threads: answers, errors, as many threads as needed, and callers who give up."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator

import pytest

from mtgr.routing.calls import CallThreads

NAMES = (f"test{number}" for number in itertools.count())


@pytest.fixture
def calls() -> Iterator[CallThreads]:
    threads = CallThreads(3, next(NAMES))
    yield threads
    threads.stop()


def live_threads(calls: CallThreads) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"{calls.name}_")]


def test_a_call_gives_its_result(calls: CallThreads) -> None:
    async def run() -> None:
        assert await calls.run(lambda: 7) == 7

    asyncio.run(run())


def test_a_call_raises_its_error(calls: CallThreads) -> None:
    async def run() -> None:
        def fail() -> None:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await calls.run(fail)
        assert await calls.run(lambda: 8) == 8

    asyncio.run(run())


def test_threads_are_as_many_as_calls_at_a_time(calls: CallThreads) -> None:
    async def run() -> None:
        for _ in range(5):
            await calls.run(lambda: None)
        assert len(live_threads(calls)) == 1
        barrier = threading.Barrier(3, timeout=10)  # which no two calls would pass
        await asyncio.gather(*(calls.run(barrier.wait) for _ in range(3)))
        assert len(live_threads(calls)) == 3

    asyncio.run(run())


def test_more_calls_than_threads_wait_for_one(calls: CallThreads) -> None:
    async def run() -> None:
        assert await asyncio.gather(*(calls.run(lambda number=number: number) for number in range(20))) == list(
            range(20)
        )

    asyncio.run(run())


def test_who_gives_up_leaves_the_call_and_nothing_behind(calls: CallThreads) -> None:
    async def run() -> None:
        go = threading.Event()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(calls.run(lambda: go.wait(10)), 0.01)
        go.set()
        assert await calls.run(lambda: 9) == 9

    asyncio.run(run())


def test_threads_end(calls: CallThreads) -> None:
    async def run() -> None:
        await calls.run(lambda: None)
        (thread,) = live_threads(calls)
        calls.stop()
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()

    asyncio.run(run())
