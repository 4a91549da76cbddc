"""One point of a performance run: load on a running server, and what both sides saw of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mtgr.bundle import Bundle
from mtgr.client.wire import Tensor
from mtgr.errors import UnavailableError
from mtgr.routing.strategies import AUTO, STRATEGIES
from mtgr.serving.server import TritonServer
from perf.analyzer import Analyzer, StalledError
from perf.load import Call, Outcome, RawCaller, Samples, closed_loop, message, open_loop, poisson
from perf.results_format import Latency, Point
from perf.watch import (
    answered_by,
    cache_ratios,
    model_counts,
    quiet_page,
    read_page,
    settled_page,
    stage_means,
    watched,
)
from perf.workload import Kind, Visit, door_steps, row_steps, write_input

DIRECT = "direct_onnx"
DOOR = "mtgr"
DIRECT_MODEL = STRATEGIES["onnx"].rank_model
_TRIES = 3
_PATIENCE_S = 10.0  # for perf_analyzer to start, and to stop
TIME_LIMIT = 20.0  # of the load generator's requests, in seconds
_CODES = {
    Outcome.REFUSED: "UNAVAILABLE",
    Outcome.TIMED_OUT: "DEADLINE_EXCEEDED",
    Outcome.INVALID: "INVALID_ARGUMENT",
    Outcome.FAILED: "INTERNAL",
    Outcome.UNSENT: "UNSENT",
}
_NOT_REFUSED = "BAD_REQUEST_ANSWERED"

Loop = Callable[[Call], Coroutine[Any, Any, Samples]]


@dataclass
class Client:
    """What a load tool saw of one point."""

    tool: str
    command: list[str]
    seconds: float
    latencies_ms: list[float]
    errors: dict[str, int] = field(default_factory=dict)
    lag_ms: float | None = None
    rightly_refused: int = 0
    distinct: int | None = None


Load = Callable[[], Client]


class Bench:
    """Measures points on a running server.

    Args:
        server: The server.
        bundle: Of its model repository.
        analyzer: What sends the load of sweeps.
        folder: Where inputs are written.

    Attributes:
        sent: Requests that were sent in measured points, and how many of their payloads were different ones.
    """

    def __init__(self, server: TritonServer, bundle: Bundle, analyzer: Analyzer, folder: Path) -> None:
        self._server = server
        self._bundle = bundle
        self._analyzer = analyzer
        self._folder = folder
        self._inputs = 0
        self._quiet = False
        self.sent: Counter[str] = Counter()

    def steps(self, visits: Sequence[Visit], strategy: str) -> Iterable[list[Tensor]]:
        """Tensors of visits for a strategy: requests to the door, or rows for the engine itself."""
        return row_steps(visits, self._bundle) if strategy == DIRECT else door_steps(visits, strategy)

    def fill(self, strategy: str, visits: Sequence[Visit], concurrency: int) -> None:
        """Send each visit once, so that caches know their users."""
        loop = self._loop(strategy, visits, lambda call: closed_loop(call, concurrency, 600.0, len(visits)))
        asyncio.run(loop)
        self._quiet = False

    def closed_rate(self, strategy: str, visits: Sequence[Visit], concurrency: int, seconds: float) -> float:
        """Answers a second of callers that wait for them; nothing is kept but this."""
        loop = self._loop(strategy, visits, lambda call: closed_loop(call, concurrency, seconds))
        self._quiet = False
        return asyncio.run(loop).count(Outcome.ANSWERED) / seconds

    def concurrency(
        self, strategy: str, visits: Sequence[Visit], level: int, repeat: int, seconds: float = 60.0
    ) -> Point:
        """Each visit once, from ``level`` callers that wait for their answers; in about so many seconds."""

        def generated() -> Client:
            # Long enough for all of them: the callers end when there is nothing left to send.
            loop = self._loop(strategy, visits, lambda call: closed_loop(call, level, 600.0, len(visits)))
            samples = asyncio.run(loop)
            samples.seconds = max((a + b for a, b in zip(samples.arrivals, samples.latencies, strict=True)), default=0)
            return _client(samples, visits)

        def analyzed() -> Client:
            return self._analyzed(strategy, visits, seconds, concurrency=level)

        return self._tried(strategy, "concurrency", level, repeat, analyzed, generated)

    def request_rate(self, strategy: str, visits: Sequence[Visit], rate: float, repeat: int, seed: int) -> Point:
        """Each visit once, at random moments, ``rate`` a second."""

        def generated() -> Client:
            return self._open(strategy, visits, rate, len(visits) / rate, seed)

        def analyzed() -> Client:
            return self._analyzed(strategy, visits, len(visits) / rate, rate=rate)

        return self._tried(strategy, "request_rate", rate, repeat, analyzed, generated, rate)

    def warm_open(self, strategy: str, visits: Sequence[Visit], rate: float, seconds: float, seed: int) -> None:
        """The load of ``open_loop`` for a while, of which nothing is kept: caches come to hold who is about."""
        self._open(strategy, visits, rate, seconds, seed)
        self._quiet = False

    def open_loop(self, strategy: str, visits: Sequence[Visit], rate: float, seconds: float, seed: int) -> Point:
        """Visits at random moments, those of one user in order; latency counts from the moment each was due."""

        def generated() -> Client:
            return self._open(strategy, visits, rate, seconds, seed)

        return self._point(strategy, "open_loop", rate, 0, generated, rate)

    def _tried(
        self,
        strategy: str,
        mode: str,
        level: float,
        repeat: int,
        analyzed: Load,
        generated: Load,
        offered: float | None = None,
    ) -> Point:
        """By perf_analyzer; where a request fails, which ends it, anew by the load generator, which counts it.

        By the load generator at once where perf_analyzer would send more requests than it reports.
        """
        for _ in range(_TRIES if mode == "concurrency" or self._analyzer.exact_rates else 0):
            try:
                return self._point(strategy, mode, level, repeat, analyzed, offered)
            except StalledError as error:
                print(f"   once more, since {error}", flush=True)
            except UnavailableError as error:
                print(f"   by the load generator, since {error}", flush=True)
                break
        return self._point(strategy, mode, level, repeat, generated, offered)

    def _analyzed(self, strategy: str, visits: Sequence[Visit], seconds: float, **load: Any) -> Client:
        self._inputs += 1
        path = self._folder / f"{strategy}-{self._inputs}.json"
        write_input(path, self.steps(visits, strategy))
        model = DIRECT_MODEL if strategy == DIRECT else DOOR
        try:
            timeout = _PATIENCE_S + 5 * seconds
            run = self._analyzer.run(self._server.grpc_url, model, path, len(visits), timeout=timeout, **load)
        finally:
            path.unlink()
        command = [part.replace(str(path), path.name) for part in run.command]
        return Client("perf_analyzer", command, run.seconds, run.latencies_ms, distinct=run.distinct)

    def _open(self, strategy: str, visits: Sequence[Visit], rate: float, seconds: float, seed: int) -> Client:
        arrivals = poisson(rate, seconds, seed)[: len(visits)]
        keys = [visit.request.user_id for visit in visits]
        loop = self._loop(strategy, visits, lambda call: open_loop(call, arrivals, seconds, keys=keys))
        return _client(asyncio.run(loop), visits)

    async def _loop(self, strategy: str, visits: Sequence[Visit], loop: Loop) -> Samples:
        model = DIRECT_MODEL if strategy == DIRECT else DOOR
        built = [message(step, TIME_LIMIT, model) for step in self.steps(visits, strategy)]
        async with RawCaller(self._server.grpc_url, built, TIME_LIMIT) as caller:
            return await loop(caller)

    def _point(
        self,
        strategy: str,
        mode: str,
        level: float,
        repeat: int,
        load: Load,
        offered: float | None = None,
    ) -> Point:
        before = read_page(self._server) if self._quiet else quiet_page(self._server)
        self._quiet = False  # if the load fails
        with watched(self._server) as usage:
            client = load()
        answers, errors = len(client.latencies_ms), sum(client.errors.values())
        through = (0, 0) if strategy == DIRECT else (answers, errors)
        after = settled_page(self._server, before, *through)
        self._quiet = True
        requests = answers + errors
        self.sent["requests"] += requests + client.rightly_refused
        self.sent["distinct"] += requests + client.rightly_refused if client.distinct is None else client.distinct
        return Point(
            strategy=strategy,
            mode=mode,
            level=float(level),
            repeat=repeat,
            tool=client.tool,
            command=client.command,
            seconds=round(client.seconds, 4),
            requests=requests,
            errors=client.errors,
            offered_rate=offered,
            throughput=round(answers / client.seconds, 3) if client.seconds else 0.0,
            latency_ms=Latency.of(client.latencies_ms),
            latency_samples_ms=client.latencies_ms,
            answered_by=answered_by(before, after),
            models=model_counts(before, after),
            stages_ms=stage_means(before, after),
            cache=cache_ratios(before, after),
            gpu=usage.gpu_under_load(client.seconds),
            server_memory_bytes=usage.memory_bytes,
            cpu_seconds=round(after.cpu_seconds - before.cpu_seconds, 3),
            client_lag_ms=client.lag_ms,
            rightly_refused=client.rightly_refused,
        )


def mismatches(point: Point) -> list[str]:
    """Where the server's counts of a point are others than the client's; empty if they agree."""
    answers = len(point.latency_samples_ms)
    counts = {model: found.requests for model, found in point.models.items()}
    engines = {model: found.inferences for model, found in point.models.items()}
    wanted: dict[str, tuple[int, int]] = {}
    if point.strategy == DIRECT:
        wanted[DIRECT_MODEL] = (counts.get(DIRECT_MODEL, 0), answers)
    else:
        served = point.answered_by
        wanted["answers of the router"] = (sum(served.values()), answers)
        wanted[DOOR] = (counts.get(DOOR, 0), answers)
        if point.strategy != AUTO:
            wanted[f"answers by {point.strategy}"] = (served.get(point.strategy, 0), answers)
        for name, strategy in STRATEGIES.items():
            wanted[strategy.rank_model] = (engines.get(strategy.rank_model, 0), served.get(name, 0))
    return [
        f"{point.strategy} at {point.mode} {point.level:g}, repeat {point.repeat}: {what} counts {found}, not {meant}"
        for what, (found, meant) in wanted.items()
        if found != meant
    ]


def mean_batch(point: Point) -> float | None:
    """Requests that the engines work on at a time.

    Of a dense engine, requests merged into a call; of vLLM, which puts requests together step by step, those that it
    has at a time (Little's law: rate times time in the engine).
    """
    if "vllm" in point.answered_by and max(point.answered_by, key=lambda name: point.answered_by[name]) == "vllm":
        return point.throughput * point.stages_ms.get("engine", 0.0) / 1e3
    models = {strategy.rank_model for strategy in STRATEGIES.values()}
    engines = [counts for model, counts in point.models.items() if model in models]
    executions = sum(counts.executions for counts in engines)
    return sum(counts.inferences for counts in engines) / executions if executions else None


def wait_until_ready(server: TritonServer, bundle: Bundle, strategies: Sequence[str], seconds: float) -> list[str]:
    """Those strategies whose models are loaded and answer; vLLM goes on starting when the server is ready."""
    ready = {status.name for status in server.models() if status.ready}
    loaded = [name for name in strategies if name == AUTO or set(STRATEGIES[name].models) <= ready]
    user = bundle.store().user_ids()[0]
    answering = []
    for name in loaded:
        end = time.monotonic() + seconds
        while True:
            try:
                asyncio.run(_ask(server, name, user, bundle.catalog.raw_ids[:16]))
            except UnavailableError:
                if time.monotonic() > end:
                    break
                time.sleep(0.5)
            else:
                answering.append(name)
                break
    return answering


async def _ask(server: TritonServer, strategy: str, user: str, items: Any) -> None:
    from mtgr.client import RecommendationRequest

    async with RawCaller(
        server.grpc_url, [RecommendationRequest(user, candidates=items, strategy=strategy)], TIME_LIMIT
    ) as caller:
        await caller(0)


def _client(samples: Samples, visits: Sequence[Visit]) -> Client:
    latencies, errors, refused = [], Counter[str](), 0
    for index, latency, outcome in zip(samples.indices, samples.latencies, samples.outcomes, strict=True):
        bad = visits[index % len(visits)].kind is Kind.BAD
        if bad and outcome is Outcome.INVALID:
            refused += 1
        elif bad and outcome is Outcome.ANSWERED:
            errors[_NOT_REFUSED] += 1
        elif outcome is Outcome.ANSWERED:
            latencies.append(round(1e3 * latency, 3))
        else:
            errors[_CODES[outcome]] += 1
    lag = round(1e3 * float(np.percentile(samples.lags, 99)), 3) if samples.lags else None
    return Client("load_generator", [], samples.seconds, latencies, dict(errors), lag, refused)
