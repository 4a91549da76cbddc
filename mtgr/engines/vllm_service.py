"""The ``vllm`` engine as a service for threads: requests in, answers by callback, and a new engine when one dies."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import uvloop

from mtgr.engines.vllm_rows import EngineStatistics, VLLMRowEngine, gather_all
from mtgr.errors import ConfigurationError, InvalidRequestError, MTGRError, UnavailableError
from mtgr.routing.calls import CallThreads

Arrays = dict[str, npt.NDArray[Any]]
Result = TypeVar("Result")

# A caller's change of mind is looked for after this time, and then again and again: short requests are never asked.
_CANCEL_SECONDS = 0.05
_ASK_AGAIN_SECONDS = 0.25
_ASKING = 2  # threads that look for it
_WATCH_SECONDS = 0.25
_RESTART_SECONDS = 2.0
_DRAIN_SECONDS = 10.0
_DRAIN_POLL_SECONDS = 0.02


class CancelledRequestError(MTGRError):
    """The caller gave the request up."""


@dataclass(frozen=True)
class ServiceConfig:
    """How the engine is run.

    Attributes:
        threads: Threads of the engine on a CPU.
        timeout: Seconds for a request that brings no time limit of its own.
        max_restarts: How often an engine that died is started again before the service gives up.
        max_pending: Requests in flight; further ones are refused at once.
    """

    threads: int = 1
    timeout: float = 8.0
    max_restarts: int = 3
    max_pending: int = 4096

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ServiceConfig:
        """Parse the string parameters of a ``config.pbtxt``; absent ones keep their defaults.

        Raises:
            ConfigurationError: If a parameter is unknown, or its value is wrong.
        """
        kinds = {"threads": int, "timeout": float, "max_restarts": int, "max_pending": int}
        values = {}
        for name, text in parameters.items():
            if name not in kinds:
                raise ConfigurationError(f"mtgr_vllm: unknown parameter {name!r}; remove it or fix its name.")
            try:
                values[name] = kinds[name](text)
            except ValueError as error:
                raise ConfigurationError(f"mtgr_vllm: {name} is {text!r}; it must be a number.") from error
        return cls(**values)

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        least = min(self.threads, self.max_pending, self.max_restarts + 1)
        if least < 1 or not 0 < self.timeout < float("inf"):
            raise ConfigurationError(
                "mtgr_vllm: threads and max_pending must be at least 1, max_restarts 0 or more, and timeout positive."
            )


@dataclass
class Call:
    """One request of a thread outside the event loop.

    Attributes:
        inputs: ``context`` INT32 [B, n, W] and, to rank, ``candidates`` INT32 [B, k, W]; not read any more once
            ``submit`` returns.
        respond: Called once, from any thread, with ``task_scores`` FP32 [B, k, T], or ``items`` INT32 [B, m] and
            ``scores`` FP32 [B, m], or with the error.
        cancelled: Whether the caller gave up.
        timeout: Seconds, looked at every 0.05; None takes the service's own limit.
    """

    inputs: Mapping[str, npt.NDArray[Any]]
    respond: Callable[[Arrays | Exception], object]
    cancelled: Callable[[], bool] = lambda: False
    timeout: float | None = None


@dataclass(eq=False)
class _Flight:
    """A request that was handed to the engine's thread."""

    call: Call
    limit: float
    abort: Callable[[], None] = lambda: None
    begun: float = field(default_factory=time.monotonic)
    is_asked: bool = False
    is_given_up: bool = False


class VLLMService:
    """One engine, and an event loop in a thread of its own.

    Requests run side by side and are answered in the order in which they are done: a request whose context is cached
    overtakes one whose context is not. An engine that dies fails the requests it had, says why to those that come, and
    is started again a few times.

    The usual request, of one user with candidates, goes from the caller's thread to the engine's and back without the
    event loop, where each change of threads costs a lone request a tenth of a millisecond or two. The loop sees to the
    others, to time limits, and to callers that gave up.

    Args:
        version_directory: Holds ``model.json``.
        config: Settings.
        log: Takes what an operator should read.

    Raises:
        ConfigurationError: If the engine does not start.
    """

    def __init__(
        self, version_directory: Path, config: ServiceConfig | None = None, log: Callable[[str], None] = print
    ) -> None:
        self.config = config or ServiceConfig()
        self.restarts = 0
        self._directory = version_directory
        self._log = log
        self._past = EngineStatistics()  # what engines did that have ended
        self._problem: str | None = None
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._engine: VLLMRowEngine = self._wait(self._start())
        except BaseException:
            self._stop_loop()
            raise
        self._calls: set[asyncio.Task[Arrays]] = set()
        self._flights: dict[int, _Flight] = {}
        self._numbers = itertools.count()
        self._watches: set[asyncio.Task[None]] = set()
        self._questions = CallThreads(_ASKING, "vllm-cancelled")
        self._watch = self._spawn(self._restart_when_dead())
        self._traffic = self._spawn(self._watch_flights())

    @property
    def failure(self) -> str | None:
        """Why no request can be answered now; None while they can."""
        return self._problem or self._engine.failure

    @property
    def in_flight(self) -> int:
        """Requests that are not answered yet."""
        return len(self._calls) + len(self._flights)

    def submit(self, call: Call) -> None:
        """Take a request up, from any thread."""
        try:
            self._check(call)
            if len(call.inputs["context"]) == 1 and "candidates" in call.inputs and self._depart(call):
                return
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets it
            call.respond(error)
            return
        inputs = {name: rows.copy() for name, rows in call.inputs.items()}
        self._loop.call_soon_threadsafe(self._begin, dataclasses.replace(call, inputs=inputs))

    def _check(self, call: Call) -> None:
        if self.failure is not None:
            raise UnavailableError(self.failure)
        if self.in_flight >= self.config.max_pending:
            raise UnavailableError(f"{self.config.max_pending} requests are in flight, as many as are allowed.")
        for name, rows in call.inputs.items():
            if rows.ndim != 3:
                raise InvalidRequestError(f"{name} has shape {list(rows.shape)}; it must be [batch, tokens, columns].")
        if "context" not in call.inputs:
            raise InvalidRequestError("context is missing.")
        contexts, candidates = call.inputs["context"], call.inputs.get("candidates")
        if candidates is not None and len(candidates) != len(contexts):
            raise InvalidRequestError(f"context is about {len(contexts)} users, candidates about {len(candidates)}.")

    def _depart(self, call: Call) -> bool:
        """Hand a request to the engine's thread; False if it has to go through the event loop."""
        context, candidates = call.inputs["context"][0], call.inputs["candidates"][0]
        # Triton takes the inputs' memory back before the flight ends.
        flight = _Flight(dataclasses.replace(call, inputs={}), call.timeout or self.config.timeout)
        number = next(self._numbers)
        self._flights[number] = flight
        try:
            abort = self._engine.submit(context, candidates, functools.partial(self._land, number))
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets it, if nobody has told it that it is late
            self._land(number, error)
            return True
        if abort is None:
            return self._flights.pop(number, None) is None
        flight.abort = abort
        if flight.is_given_up:  # before there was anything to abort
            abort()
        return True

    def _land(self, number: int, found: npt.NDArray[np.float32] | Exception) -> None:
        """Answer a request, unless somebody has."""
        flight = self._flights.pop(number, None)
        if flight is not None:
            self._respond(flight, found if isinstance(found, Exception) else {"task_scores": found[None]})

    def _give_up(self, number: int, error: Exception) -> None:
        """Take a request out of the engine, unless it is answered."""
        flight = self._flights.pop(number, None)
        if flight is not None:
            flight.is_given_up = True
            flight.abort()
            self._respond(flight, error)

    def _respond(self, flight: _Flight, answer: Arrays | Exception) -> None:
        try:
            flight.call.respond(answer)
        except Exception as error:  # noqa: BLE001 - one caller's trouble must not become the others'
            self._log(f"vllm: an answer was not sent: {error}")

    async def _watch_flights(self) -> None:
        """End those whose time is up, or whose callers gave up."""
        while True:
            await asyncio.sleep(_CANCEL_SECONDS)
            now = time.monotonic()
            for number, flight in self._flights.copy().items():  # at once: others take flights out meanwhile
                if now - flight.begun > flight.limit:
                    self._give_up(number, UnavailableError(f"vLLM did not answer within {flight.limit:g} s"))
                elif now - flight.begun > _CANCEL_SECONDS and not flight.is_asked:
                    flight.is_asked = True
                    self._watched(self._cancel_flight(number, flight))

    async def _cancel_flight(self, number: int, flight: _Flight) -> None:
        while number in self._flights:
            if await self._questions.run(flight.call.cancelled):
                self._give_up(number, CancelledRequestError("the request was cancelled."))
                return
            await asyncio.sleep(_ASK_AGAIN_SECONDS)

    def statistics(self) -> EngineStatistics:
        """Counters since the service's start, over all engines it had."""
        return _added(self._past, self._engine.statistics())

    def close(self) -> None:
        """Let requests in flight end for a while, then end the engine."""

        async def drain() -> None:
            self._watch.cancel()
            end = time.monotonic() + _DRAIN_SECONDS
            if self._calls:
                await asyncio.wait(self._calls, timeout=_DRAIN_SECONDS)
            while self._flights and time.monotonic() < end:
                await asyncio.sleep(_DRAIN_POLL_SECONDS)
            self._traffic.cancel()

        self._wait(drain())
        self._engine.shutdown()
        self._stop_loop()
        self._questions.stop()

    def _start(self) -> Coroutine[Any, Any, VLLMRowEngine]:
        return VLLMRowEngine.start_warm(self._directory, self.config.threads)

    def _begin(self, call: Call) -> None:
        # One task a request, and one more for those that take long: each costs as much as a small step of the engine.
        task = self._loop.create_task(self._run(call))
        self._calls.add(task)
        watch = self._loop.call_later(_CANCEL_SECONDS, self._look_after, call, task)
        task.add_done_callback(functools.partial(self._end, call, watch))

    def _end(self, call: Call, watch: asyncio.TimerHandle, task: asyncio.Task[Arrays]) -> None:
        watch.cancel()
        self._calls.discard(task)
        if task.cancelled():
            call.respond(CancelledRequestError("the request was cancelled."))
            return
        error = task.exception()
        if error is None:
            call.respond(task.result())
        elif isinstance(error, Exception):
            call.respond(error)

    def _look_after(self, call: Call, task: asyncio.Task[Arrays]) -> None:
        self._watched(self._cancel_with(call, task))

    def _watched(self, watching: Coroutine[Any, Any, None]) -> None:
        watch = self._loop.create_task(watching)
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    async def _cancel_with(self, call: Call, task: asyncio.Task[Arrays]) -> None:
        """End the task when its caller gives up; asking takes a message to the server, so a thread does."""
        while not task.done():
            if await self._questions.run(call.cancelled):
                task.cancel()
                return
            await asyncio.sleep(_ASK_AGAIN_SECONDS)

    async def _run(self, call: Call) -> Arrays:
        if len(self._calls) > self.config.max_pending:  # many may have come before the first was begun
            raise UnavailableError(f"{self.config.max_pending} requests are in flight, as many as are allowed.")
        contexts, candidates = call.inputs["context"], call.inputs.get("candidates")
        limit = call.timeout or self.config.timeout
        if candidates is None:
            found = await gather_all([self._engine.retrieve(context, limit) for context in contexts])
            return {
                "items": np.stack([items for items, _ in found]),
                "scores": np.stack([scores for _, scores in found]),
            }
        pairs = zip(contexts, candidates, strict=True)
        return {"task_scores": np.stack(await gather_all([self._engine.rank(*pair, limit) for pair in pairs]))}

    async def _restart_when_dead(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            failure = self._engine.failure
            if failure is None:
                continue
            if self.restarts >= self.config.max_restarts:
                self._log(f"{failure} It was started again {self.restarts} times already; restart the server.")
                return
            self._log(f"{failure} It is started again.")
            self._problem = "vLLM's engine has ended and is being started again."
            await self._restart()

    async def _restart(self) -> None:
        """Put a new engine in the place of a dead one."""
        dead = self._engine
        dead.shutdown()
        self.restarts += 1
        try:
            engine = await self._start()
        except (ConfigurationError, UnavailableError) as error:
            self._problem = f"vLLM's engine has ended and did not start again: {error}"
            self._log(self._problem)
            await asyncio.sleep(_RESTART_SECONDS * 2**self.restarts)
            return
        self._past, self._engine = _added(self._past, dead.statistics()), engine
        self._problem = None
        self._log("vLLM's engine is up again.")

    def _spawn(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _wait(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return self._spawn(coroutine).result()

    def _stop_loop(self) -> None:
        async def end() -> None:
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        self._wait(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


_GAUGES = frozenset({"running", "waiting", "kv_usage"})


def _added(past: EngineStatistics, now: EngineStatistics) -> EngineStatistics:
    """Counters of both, gauges of the present."""
    names = (field.name for field in dataclasses.fields(now))
    return EngineStatistics(
        **{name: getattr(now, name) + (0 if name in _GAUGES else getattr(past, name)) for name in names}
    )
