"""The vllm engine's service around engines that do not compute: who is answered, when, and by whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from mtgr.engines import vllm_service
from mtgr.engines.vllm_rows import EngineStatistics
from mtgr.engines.vllm_service import Arrays, Call, CancelledRequestError, ServiceConfig, VLLMService
from mtgr.errors import InvalidRequestError, UnavailableError

Done = Callable[[Any], object]


class Engine:
    """Keeps what it is given until it is told what to say."""

    def __init__(self) -> None:
        self.failure: str | None = None
        self.taken: list[Done] = []
        self.aborted = 0
        self.takes = True
        self.error: Exception | None = None
        self.ranked = 0

    def submit(self, context: Any, candidates: Any, done: Done) -> Callable[[], None] | None:
        if self.error is not None:
            raise self.error
        if not self.takes:
            return None
        self.taken.append(done)
        return self.abort

    def abort(self) -> None:
        self.aborted += 1

    async def rank(self, context: Any, candidates: Any, timeout: float) -> Any:
        self.ranked += 1
        return np.full((len(candidates), 3), 0.25, dtype=np.float32)

    def statistics(self) -> EngineStatistics:
        return EngineStatistics()

    def shutdown(self) -> None:
        for done in self.taken:
            done(UnavailableError("vLLM's engine has ended: it was shut down"))


class Caller:
    """One request and its answers."""

    def __init__(self, batch: int = 1, timeout: float | None = None) -> None:
        rows = np.zeros((batch, 4, 5), dtype=np.int32)
        self.answers: list[Arrays | Exception] = []
        self.gone = False
        self.told = threading.Event()
        self.call = Call({"context": rows, "candidates": rows}, self.respond, lambda: self.gone, timeout)

    def respond(self, answer: Arrays | Exception) -> None:
        self.answers.append(answer)
        self.told.set()

    def only(self, seconds: float = 5.0) -> Arrays | Exception:
        assert self.told.wait(seconds)
        time.sleep(0.1)  # a second one would be a mistake
        assert len(self.answers) == 1
        return self.answers[0]


def serving(engine: Engine, lines: list[str], directory: Path) -> VLLMService:
    async def start(self: VLLMService) -> Engine:
        return engine

    with mock.patch.object(VLLMService, "_start", start):
        return VLLMService(directory, ServiceConfig(timeout=0.3, max_pending=3), lines.append)


SCORES = np.full((4, 3), 0.5, dtype=np.float32)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def service(engine: Engine, lines: list[str], tmp_path: Path) -> Iterator[VLLMService]:
    made = serving(engine, lines, tmp_path)
    yield made
    for done in engine.taken:
        done(SCORES)
    made.close()


def test_answered_by_the_engine_without_the_loop(service: VLLMService, engine: Engine) -> None:
    caller = Caller()
    service.submit(caller.call)
    assert service.in_flight == 1
    engine.taken[0](SCORES)
    answer = caller.only()
    assert isinstance(answer, dict)
    np.testing.assert_array_equal(answer["task_scores"], SCORES[None])
    assert (service.in_flight, engine.aborted, engine.ranked) == (0, 0, 0)


@pytest.mark.parametrize("batch", [1, 2])
def test_what_the_engine_does_not_take_directly_goes_through_the_loop(
    service: VLLMService, engine: Engine, batch: int
) -> None:
    engine.takes = batch > 1
    caller = Caller(batch)
    service.submit(caller.call)
    answer = caller.only()
    assert isinstance(answer, dict)
    assert answer["task_scores"].shape == (batch, 4, 3)
    assert engine.ranked == batch


def test_late_requests_are_given_up_once(service: VLLMService, engine: Engine) -> None:
    caller, patient = Caller(), Caller(timeout=60.0)
    service.submit(caller.call)
    service.submit(patient.call)
    assert "did not answer within 0.3 s" in str(caller.only())
    engine.taken[0](SCORES)  # too late
    assert len(caller.answers) == 1
    assert engine.aborted == 1
    engine.taken[1](SCORES)
    assert isinstance(patient.only(), dict)


def test_callers_who_hang_up_free_the_engine(service: VLLMService, engine: Engine) -> None:
    caller = Caller(timeout=60.0)
    service.submit(caller.call)
    time.sleep(0.2)
    caller.gone = True
    assert isinstance(caller.only(), CancelledRequestError)
    assert (engine.aborted, service.in_flight) == (1, 0)


@pytest.mark.parametrize("error", [InvalidRequestError("no"), RuntimeError("broken"), KeyError("context")])
def test_an_engine_that_refuses_is_quoted(service: VLLMService, engine: Engine, error: Exception) -> None:
    engine.error = error
    caller = Caller()
    service.submit(caller.call)
    assert caller.only() is error
    assert service.in_flight == 0


def test_no_more_than_allowed_are_in_flight(service: VLLMService, engine: Engine) -> None:
    callers = [Caller(timeout=60.0) for _ in range(4)]
    for caller in callers:
        service.submit(caller.call)
    assert "as many as are allowed" in str(callers[3].only())
    for done in engine.taken:
        done(SCORES)
    assert all(isinstance(caller.only(), dict) for caller in callers[:3])


def test_a_caller_who_cannot_be_told_harms_nobody(service: VLLMService, engine: Engine, lines: list[str]) -> None:
    """Neither the engine's thread nor what looks after time limits."""
    broken, late, other = Caller(), Caller(), Caller()

    def respond(answer: object) -> None:
        raise RuntimeError("nobody is there")

    broken.call.respond = respond
    service.submit(broken.call)
    service.submit(late.call)
    assert isinstance(late.only(), UnavailableError)
    service.submit(other.call)
    assert isinstance(other.only(), UnavailableError)
    assert lines == ["vllm: an answer was not sent: nobody is there"]


def test_late_while_it_is_handed_over(service: VLLMService, engine: Engine) -> None:
    """Whatever the engine says to it afterwards, it is told once, and taken out of the engine."""
    for takes, error in ((True, None), (False, None), (True, RuntimeError("late"))):
        caller, taken = Caller(timeout=0.01), engine.submit

        def slow(*arguments: Any, taken: Any = taken) -> Any:
            time.sleep(0.3)
            return taken(*arguments)

        engine.takes, engine.error, engine.aborted = takes, error, 0
        with mock.patch.object(engine, "submit", slow):
            service.submit(caller.call)
        assert "did not answer" in str(caller.only())
        assert engine.aborted == int(takes and error is None)


def test_a_dead_engine_is_named(service: VLLMService, engine: Engine) -> None:
    engine.failure = "vLLM's engine has ended."
    caller = Caller()
    service.submit(caller.call)
    assert isinstance(caller.only(), UnavailableError)


def test_the_end_waits_for_those_in_flight(engine: Engine, lines: list[str], tmp_path: Path) -> None:
    made = serving(engine, lines, tmp_path)
    caller = Caller(timeout=60.0)
    made.submit(caller.call)
    threading.Timer(0.3, lambda: engine.taken[0](SCORES)).start()
    made.close()
    assert isinstance(caller.only(), dict)


def test_the_end_does_not_wait_for_ever(engine: Engine, lines: list[str], tmp_path: Path) -> None:
    made = serving(engine, lines, tmp_path)
    caller = Caller(timeout=60.0)
    made.submit(caller.call)
    with mock.patch.object(vllm_service, "_DRAIN_SECONDS", 0.2):
        made.close()
    assert "it was shut down" in str(caller.only())
