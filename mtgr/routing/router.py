"""The router: takes a request's features to an engine that is ready, and its answer to a ranked result."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy.typing as npt

from mtgr.errors import RequestTimeoutError, UnavailableError
from mtgr.features.catalog import ItemCatalog
from mtgr.features.extract import Features
from mtgr.routing.admission import Admission
from mtgr.routing.batching import Inference, ShapeBatcher
from mtgr.routing.board import PressureBoard
from mtgr.routing.breaker import CircuitBreaker
from mtgr.routing.choice import AutoChoice, Choice, Size
from mtgr.routing.deadline import Deadline
from mtgr.routing.experiment import Shadow
from mtgr.routing.guard import GuardedInference
from mtgr.routing.observer import Observer
from mtgr.routing.policy import Policy, load_profile
from mtgr.routing.pressure import ROUTER
from mtgr.routing.ranker import Arrays, Ranker, Ranking
from mtgr.routing.reasons import Reason, RefusedError, reason_of
from mtgr.routing.shadow import drift
from mtgr.routing.strategies import AUTO, STRATEGIES, Strategy
from mtgr.schema import Schema

Clock = Callable[[], float]

FALLBACK = "fallback"
_SHADOW_CALLS = 16  # at a time; further ones are left out
_FIRST_ROWS = 16  # of a context, by which vllm's cache is taken to know it


class Engines(Inference, Protocol):
    """How the router reaches engines: BLS calls inside Triton, direct calls in process."""

    def unready_reason(self, model: str) -> str | None:
        """None if the model answers requests, else why not; ``model@2`` is version 2 of it."""


class Router:
    """Serves requests; safe for any number of concurrent coroutines of one event loop.

    Args:
        schema: The schema.
        catalog: The items.
        engines: How to reach engines.
        policy: Settings; the profile ``prod`` by default.
        observer: Told of what happens, for metrics and logs.
        clock: Gives seconds.
        board: Where the models in front read how hard it is pressed.
        largest: Gives what a model takes at most in a batch; None if that is not known.

    Raises:
        ConfigurationError: If a task weight names no task of the schema.
    """

    def __init__(
        self,
        schema: Schema,
        catalog: ItemCatalog,
        engines: Engines,
        policy: Policy | None = None,
        observer: Observer | None = None,
        clock: Clock = time.monotonic,
        board: PressureBoard | None = None,
        largest: Callable[[str], int | None] = lambda model: None,
    ) -> None:
        self.schema = schema
        self.catalog = catalog
        self.engines = engines
        self.observer = observer or Observer()
        self.policy = policy or load_profile("prod")
        self.admission = Admission(ROUTER, self.policy.admission, clock, board)
        self._clock = clock
        self._largest = largest
        self._breakers: dict[str, CircuitBreaker] = {}
        self._shadows: set[asyncio.Task[None]] = set()
        self._shadowed = 0.0  # how much of a shadow call is due
        self._ranker = Ranker(schema, catalog, self.policy.routing)
        self._choice = AutoChoice(self.policy.auto, clock)
        self._callers = self._make_callers(self.policy)

    def update(self, policy: Policy) -> None:
        """Take a new policy for the requests to come; to be called in the event loop.

        Raises:
            ConfigurationError: If a task weight names no task of the schema; then the old one stays.
        """
        ranker, before = Ranker(self.schema, self.catalog, policy.routing), self.policy
        self.policy, self._ranker = policy, ranker
        self.admission.config = policy.admission
        # What was learned is kept where its settings did not change.
        if policy.breaker != before.breaker:
            for breaker in self._breakers.values():
                breaker.configure(policy.breaker)
        if policy.auto != before.auto:
            self._choice = AutoChoice(policy.auto, self._clock)
        if (policy.routing, policy.admission) != (before.routing, before.admission):
            self._callers = self._make_callers(policy)

    def _make_callers(self, policy: Policy) -> dict[bool, ShapeBatcher]:
        """For strategies that take padded rows, and for those that do not."""
        routing = policy.routing
        guarded = GuardedInference(self.engines, self.breaker, routing.engine_timeout, self._clock)
        return {
            True: ShapeBatcher(guarded, routing.max_batch, routing.max_running, routing.max_tokens, self._largest),
            False: ShapeBatcher(guarded, 1, policy.admission.max_concurrent, routing.max_tokens),
        }

    async def route(self, features: Features, deliver: Callable[[Ranking], object] | None = None) -> Ranking:
        """Answer one request.

        Args:
            features: The request's.
            deliver: Called with the answer as soon as it is there, before it is counted and its place given on.

        Raises:
            UnavailableError: If the strategy asked for, or every one under ``auto``, cannot serve, or there is no hope
                to answer in time.
            RequestTimeoutError: If the request's time limit ran out.
        """
        deadline = Deadline.from_unix_ms(features.deadline_ms, self._clock)
        started = self._clock()
        try:
            async with self.admission.admit(deadline) as waited:
                self.observer.stage("queue", waited)
                try:
                    async with asyncio.timeout(deadline.limit(3600.0)):
                        ranking = await self._route(features)
                    if deliver is not None:
                        deliver(ranking)
                except TimeoutError as error:
                    raise RequestTimeoutError("the request's time limit ran out; allow more time.") from error
        except BaseException as error:
            self.observer.refused(features, reason_of(error), error)
            raise
        self.observer.answered(features, ranking, self._clock() - started)
        return ranking

    def breaker(self, model: str) -> CircuitBreaker:
        """The breaker of a model."""
        if model not in self._breakers:
            self._breakers[model] = CircuitBreaker(
                model, self.policy.breaker, self._clock, listener=self.observer.breaker
            )
        return self._breakers[model]

    async def _route(self, features: Features) -> Ranking:
        retrieves = not len(features.candidates)
        context = hash(features.context[:_FIRST_ROWS].tobytes())
        size = self._choice.size(len(features.context), len(features.candidates), context)
        names, version, reasons = self._plan(features, size, retrieves)
        failed = False
        for name in names.order:
            strategy = STRATEGIES[name]
            try:
                ranking = await self._serve(strategy, version, features, size)
            except UnavailableError as error:
                reasons.append(f"{name}: {error}")
                self._choice.failed(name)
                failed = True
                continue
            if name == "vllm":
                self._choice.remember(context)
            labels = (*ranking.labels, FALLBACK) if failed else ranking.labels
            ranking = dataclasses.replace(ranking, labels=labels, explanation=names.reason)
            self._shadow(features, ranking)
            return ranking
        if features.strategy == AUTO:
            raise RefusedError(
                f"no engine is ready ({'; '.join(reasons)}); run `make export` and restart the server.",
                Reason.FAILED if failed else Reason.NOT_READY,
            )
        raise RefusedError(f"strategy {reasons[0]}.", Reason.FAILED if failed else Reason.NOT_READY)

    def _plan(self, features: Features, size: Size, retrieves: bool) -> tuple[Choice, int | None, list[str]]:
        """Strategies to try, the version of their models, and why others are left out."""
        if features.strategy != AUTO:
            ready, reasons = self._ready([features.strategy], None, retrieves)
            return Choice(tuple(ready), "asked for"), None, reasons
        arm = self.policy.arm_settings(features.arm)
        version = arm.version if arm is not None else None
        order: Sequence[str] = self.policy.auto.order
        pinned = arm is not None and arm.strategy != AUTO
        if arm is not None and pinned:
            order = (arm.strategy, *(name for name in order if name != arm.strategy))
        ready, reasons = self._ready(order, version, retrieves)
        choice = Choice(tuple(ready), f"arm {features.arm}") if pinned else self._choice.choose(ready, size)
        return choice, version, reasons

    def _ready(self, names: Sequence[str], version: int | None, retrieves: bool) -> tuple[list[str], list[str]]:
        ready, reasons = [], []
        for name in names:
            reason = self._unready_reason(STRATEGIES[name], version, retrieves)
            if reason is None:
                ready.append(name)
            else:
                reasons.append(f"{name}: {reason}")
        return ready, reasons

    def _unready_reason(self, strategy: Strategy, version: int | None, retrieves: bool) -> str | None:
        models = strategy.models if retrieves else (strategy.rank_model,)
        for model in models:
            model = _versioned(model, version)
            reason = self.engines.unready_reason(model) or self.breaker(model).refusal
            if reason is not None:
                return reason
        return None

    async def _serve(self, strategy: Strategy, version: int | None, features: Features, size: Size) -> Ranking:
        started, choice = self._clock(), self._choice
        load = choice.started(strategy.name)
        try:
            ranking = await self._ranker.serve(strategy, features, self._caller(strategy, version))
        except BaseException as error:
            self.observer.engine_failed(strategy.name, reason_of(error))
            raise
        finally:
            choice.ended(strategy.name)
        seconds = self._clock() - started
        self.observer.stage("engine", seconds)
        choice.answered(load, size, seconds)
        return ranking

    def _caller(self, strategy: Strategy, version: int | None) -> Callable[[str, Arrays, str], Any]:
        """One output of one call.

        Dense engines get batches of one shape; an engine with continuous batching gets every request at once.
        """
        batcher = self._callers[strategy.padded]

        async def call(model: str, inputs: Arrays, output: str) -> npt.NDArray[Any]:
            self.observer.rows(strategy.name, inputs)
            answer = await batcher.infer(_versioned(model, version), inputs, [output])
            return answer[output]

        return call

    def _shadow(self, features: Features, ranking: Ranking) -> None:
        """Start the shadow's call, for some of the requests; nobody waits for it."""
        shadow = self.policy.shadow
        if shadow is None or not len(ranking.items) or len(self._shadows) >= _SHADOW_CALLS:
            return
        self._shadowed += shadow.share
        if self._shadowed < 1:
            return
        self._shadowed -= 1
        task = asyncio.get_running_loop().create_task(self._compare(shadow, features, ranking))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _compare(self, shadow: Shadow, features: Features, ranking: Ranking) -> None:
        strategy = STRATEGIES[shadow.strategy]
        if self._unready_reason(strategy, shadow.version, retrieves=False) is not None:
            self.observer.shadow(None)
            return
        try:
            call = self._caller(strategy, shadow.version)
            other = await self._ranker.rescore(strategy, features, ranking.items, call)
        except UnavailableError:
            self.observer.shadow(None)
        else:
            self.observer.shadow(drift(ranking, other))


def _versioned(model: str, version: int | None) -> str:
    return model if version is None else f"{model}@{version}"
