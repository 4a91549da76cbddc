"""Load on a running server: an open loop, which does not wait for answers, and a closed one.

In an open loop requests arrive at random moments of a fixed rate (Poisson), however slow the answers are, and latency
counts from the moment when a request was to be sent: a client that falls behind cannot hide waiting. There are no
retries. The client shares the machine with the server, so requests are built before and sent as they are over gRPC,
which costs 0.35 ms of processor time each; ``AsyncMTGRClient`` costs 0.57 ms.
"""

from __future__ import annotations

import asyncio
import enum
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import tritonclient.grpc.service_pb2 as messages
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from mtgr.client import RecommendationRequest
from mtgr.client.failures import translated
from mtgr.client.settings import Settings
from mtgr.client.transports import microseconds
from mtgr.client.wire import Tensor, encode
from mtgr.errors import InvalidRequestError, MTGRError, RequestTimeoutError, UnavailableError

METHOD = "/inference.GRPCInferenceService/ModelInfer"
MAX_IN_FLIGHT = 4096
_GRACE = 0.25  # the server is to give a request up before the client does

Call = Callable[[int], Awaitable[None]]
"""Sends request ``index`` and waits for its answer; raises MTGRError."""


class Outcome(enum.IntEnum):
    """What became of a request."""

    ANSWERED = 0
    REFUSED = 1  # UNAVAILABLE
    TIMED_OUT = 2  # no answer within the time limit, whoever noticed
    INVALID = 3
    FAILED = 4
    UNSENT = 5  # the client had too many in flight


@dataclass
class Samples:
    """Every request of a run.

    Attributes:
        seconds: Length of the run, without the wait for its last answers.
        arrivals: Seconds from the start of the run to the moment when each request was to be sent.
        lags: Seconds that it was sent later.
        latencies: Seconds from the first of these to the answer.
        outcomes: What became of it.
        indices: Which request it was, of those that the call knows; in the order of their answers, as all of these.
        sentences: How often each sentence of an error came, numbers left out.
    """

    seconds: float
    arrivals: list[float] = field(default_factory=list, repr=False)
    lags: list[float] = field(default_factory=list, repr=False)
    latencies: list[float] = field(default_factory=list, repr=False)
    outcomes: list[Outcome] = field(default_factory=list, repr=False)
    indices: list[int] = field(default_factory=list, repr=False)
    sentences: Counter[str] = field(default_factory=Counter)

    def add(self, arrival: float, lag: float, latency: float, outcome: Outcome, index: int = -1) -> None:
        """Take one request down."""
        self.indices.append(index)
        self.arrivals.append(arrival)
        self.lags.append(lag)
        self.latencies.append(latency)
        self.outcomes.append(outcome)

    def between(self, start: float, end: float) -> Samples:
        """The requests that were to be sent in a part of the run."""
        part = Samples(end - start)
        columns = (self.arrivals, self.lags, self.latencies, self.outcomes, self.indices)
        for arrival, lag, latency, outcome, index in zip(*columns, strict=True):
            if start <= arrival < end:
                part.add(arrival - start, lag, latency, outcome, index)
        return part

    def count(self, *outcomes: Outcome) -> int:
        """Requests that ended in one of these ways."""
        return sum(outcome in outcomes for outcome in self.outcomes)

    def latencies_of(self, *outcomes: Outcome) -> npt.NDArray[np.float64]:
        """Seconds of the requests that ended in one of these ways."""
        chosen = [one for one, outcome in zip(self.latencies, self.outcomes, strict=True) if outcome in outcomes]
        return np.array(chosen, dtype=np.float64)

    def goodput(self) -> float:
        """Answers per second of requests that arrived during the run."""
        return self.count(Outcome.ANSWERED) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Raw samples for a result file, as texts of numbers in the order of arrival: one line a column."""

        def milliseconds(values: Sequence[float]) -> str:
            return " ".join(f"{value * 1e3:.1f}" for value in np.array(values)[order])

        order = np.argsort(self.arrivals, kind="stable")
        return {
            "seconds": self.seconds,
            "counts": {outcome.name.lower(): self.count(outcome) for outcome in Outcome},
            "sentences": dict(self.sentences.most_common(20)),
            "arrivals_ms": milliseconds(self.arrivals),
            "lags_ms": milliseconds(self.lags),
            "latencies_ms": milliseconds(self.latencies),
            "outcomes": "".join(str(int(self.outcomes[index])) for index in order),
        }


def outcome_of(error: MTGRError) -> Outcome:
    """What an error says. A server that gives up a late request says UNAVAILABLE too; its sentence tells."""
    if isinstance(error, RequestTimeoutError) or "time limit ran out" in str(error):
        return Outcome.TIMED_OUT
    if isinstance(error, UnavailableError):
        return Outcome.REFUSED
    return Outcome.INVALID if isinstance(error, InvalidRequestError) else Outcome.FAILED


def percentile(values: npt.ArrayLike, q: float) -> float:
    """A percentile; NaN of nothing."""
    array = np.asarray(values, dtype=np.float64)
    return float(np.percentile(array, q)) if array.size else float("nan")


async def open_loop(
    call: Call,
    arrivals: Sequence[float],
    seconds: float,
    max_in_flight: int = MAX_IN_FLIGHT,
    keys: Sequence[str] | None = None,
) -> Samples:
    """Send a request at each of these seconds from now, all within ``seconds``, and wait for the last answers.

    Args:
        call: Sends request ``index``.
        arrivals: When requests are to be sent.
        seconds: Length of the run.
        max_in_flight: Further requests are not sent, and counted as such.
        keys: Whose request each is: requests of one key, such as a user's visits, go in order, each after the answer to
            the one before. What it waits for that counts as its latency.
    """
    samples, tasks = Samples(seconds), set[asyncio.Task[None]]()
    latest: dict[str, asyncio.Task[None]] = {}
    start = time.perf_counter()
    for index, arrival in enumerate(arrivals):
        await asyncio.sleep(max(0.0, start + arrival - time.perf_counter()))
        if len(tasks) >= max_in_flight:
            samples.add(arrival, 0.0, 0.0, Outcome.UNSENT, index)
            continue
        before = latest.get(keys[index]) if keys is not None else None
        task = asyncio.create_task(_send(call, index, start, arrival, samples, before))
        if keys is not None:
            latest[keys[index]] = task
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.sleep(max(0.0, start + seconds - time.perf_counter()))
    await asyncio.gather(*tasks)
    return samples


async def closed_loop(call: Call, concurrency: int, seconds: float, most: int = 1 << 40) -> Samples:
    """``concurrency`` callers, each of which sends its next request when the one before is answered.

    They stop after ``seconds``, or when ``most`` requests are sent.
    """
    samples = Samples(seconds)
    start = time.perf_counter()
    numbers = iter(range(most))

    async def caller() -> None:
        while (arrival := time.perf_counter() - start) < seconds and (index := next(numbers, None)) is not None:
            await _send(call, index, start, arrival, samples)

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return samples


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Moments of arrival within ``seconds``."""
    generator = np.random.default_rng(seed)
    moments: list[float] = []
    moment = 0.0
    while (moment := moment + float(generator.exponential(1 / rate))) < seconds:
        moments.append(moment)
    return moments


async def _send(
    call: Call,
    index: int,
    start: float,
    arrival: float,
    samples: Samples,
    before: asyncio.Task[None] | None = None,
) -> None:
    lag = time.perf_counter() - start - arrival
    if before is not None:
        await asyncio.wait([before])
    outcome = Outcome.ANSWERED
    try:
        await call(index)
    except MTGRError as error:
        outcome = outcome_of(error)
        samples.sentences[re.sub(r"\d[\d.e+-]*", "#", str(error))] += 1
    samples.add(arrival, lag, time.perf_counter() - start - arrival, outcome, index)


class RawCaller:
    """Sends prebuilt messages over one gRPC channel and leaves answers unread; for one event loop.

    Args:
        url: ``host:port`` of the server's gRPC.
        requests: What to send, in turn: requests, or what ``message`` made.
        timeout: Time limit of each, in seconds.
    """

    def __init__(self, url: str, requests: Sequence[RecommendationRequest | bytes], timeout: float) -> None:
        import grpc  # type: ignore[import-untyped]

        self._settings = Settings.checked(url, "grpc", timeout + _GRACE, 0, None, "mtgr")
        self._messages = [
            request if isinstance(request, bytes) else message(encode(request), timeout) for request in requests
        ]
        self._channel = grpc.aio.insecure_channel(url, options=self._settings.grpc_channel_args)
        self._method = self._channel.unary_unary(METHOD)
        self._error = grpc.aio.AioRpcError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def __call__(self, index: int) -> None:
        """Send one."""
        try:
            await self._method(self._messages[index % len(self._messages)], timeout=self._settings.timeout)
        except self._error as error:
            with translated(self._settings):
                raise InferenceServerException(error.details(), str(error.code())) from error


def message(tensors: Sequence[Tensor], timeout: float, model: str = "mtgr") -> bytes:
    """A ``ModelInferRequest`` to the door, or to another model, as it goes over the wire."""
    built = messages.ModelInferRequest(model_name=model)
    built.parameters["timeout"].int64_param = microseconds(timeout)
    for tensor in tensors:
        built.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.data.shape)
        data = serialize_byte_tensor(tensor.data).item() if tensor.datatype == "BYTES" else tensor.data.tobytes()
        built.raw_input_contents.append(data)
    serialized: bytes = built.SerializeToString()
    return serialized
