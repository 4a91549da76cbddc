"""Answers that are sent from a thread: in order, all of them, and never without bound."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from mtgr.routing.outbox import Outbox

ERRORS: list[BaseException] = []


@pytest.fixture
def outbox() -> Iterator[Outbox]:
    ERRORS.clear()
    box = Outbox(ERRORS.append, most=3)
    yield box
    box.stop()


def test_answers_are_sent_in_order_by_another_thread(outbox: Outbox) -> None:
    sent: list[int] = []
    threads: set[str] = set()
    hold = threading.Event()
    outbox.put(lambda: (hold.wait(10), None)[1])
    assert not outbox.idle
    for number in range(2):
        outbox.put(lambda number=number: (sent.append(number), threads.add(threading.current_thread().name), None)[2])
    assert sent == []
    hold.set()
    outbox.stop()
    assert sent == [0, 1]
    assert threads == {"outbox"}
    assert outbox.idle


def test_at_once_is_here_and_now(outbox: Outbox) -> None:
    here: list[str] = []
    outbox.put(lambda: here.append(threading.current_thread().name), at_once=True)
    assert here == [threading.current_thread().name]
    assert outbox.idle


def test_too_many_are_sent_by_who_brings_them(outbox: Outbox) -> None:
    hold, started = threading.Event(), threading.Event()
    sent: list[str] = []

    def slow() -> None:
        started.set()
        hold.wait(10)

    outbox.put(slow)
    assert started.wait(10)
    for _ in range(4):
        outbox.put(lambda: sent.append(threading.current_thread().name))
    assert sent == [threading.current_thread().name]
    hold.set()
    outbox.stop()
    assert len(sent) == 4


def test_an_answer_that_cannot_be_sent_keeps_none_back(outbox: Outbox) -> None:
    sent: list[int] = []

    def fail() -> None:
        raise RuntimeError("gone")

    outbox.put(fail)
    outbox.put(fail, at_once=True)
    outbox.put(lambda: sent.append(1))
    outbox.stop()
    assert sent == [1]
    assert [str(error) for error in ERRORS] == ["gone", "gone"]
