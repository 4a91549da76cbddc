"""Requests wait for extraction in a queue of their own."""

from __future__ import annotations

import threading

from mtgr.features.intake import Intake


def test_requests_are_worked_off_in_turn_while_others_come() -> None:
    done: list[int] = []
    gate = threading.Event()

    def work(number: int) -> None:
        assert gate.wait(10)
        done.append(number)

    intake = Intake(work, lambda number, error: done.append(-number))
    for number in range(1, 6):
        intake.put(number)
    assert 4 <= intake.waiting <= 5  # one may be with the worker
    assert not done
    gate.set()
    intake.stop()
    assert done == [1, 2, 3, 4, 5]
    assert intake.waiting == 0


def test_one_that_fails_is_told_of_and_the_others_are_done() -> None:
    done: list[int] = []
    failed: list[tuple[int, str]] = []

    def work(number: int) -> None:
        if number % 2:
            raise ValueError(f"no {number}")
        done.append(number)

    def tell(number: int, error: BaseException) -> None:
        failed.append((number, str(error)))
        raise RuntimeError("the caller is gone")

    intake = Intake(work, tell)
    for number in range(4):
        intake.put(number)
    intake.stop()
    assert done == [0, 2]
    assert failed == [(1, "no 1"), (3, "no 3")]
