"""The router with engines in memory: engines that hang or fail, load, deadlines, arms, and new policies."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

import numpy as np
import pytest

from mtgr.errors import ConfigurationError, RequestTimeoutError, UnavailableError
from mtgr.metrics import MetricRegistry
from mtgr.routing.admission import AdmissionConfig
from mtgr.routing.breaker import BreakerConfig
from mtgr.routing.choice import AutoConfig
from mtgr.routing.experiment import Arm, Experiment, Shadow
from mtgr.routing.metrics import RouterMetrics
from mtgr.routing.observer import Observer
from mtgr.routing.ranker import Ranking
from mtgr.routing.reasons import EngineLostError
from mtgr.routing.router import FALLBACK, Router
from mtgr.routing.shadow import Drift
from tests.unit.fake_engines import (
    CATALOG,
    SCHEMA,
    TABLE,
    FakeEngines,
    expected_order,
    features,
    policy,
    route,
    unready_except,
)


def test_an_engine_that_hangs_is_given_up_and_the_next_one_asked() -> None:
    class Hanging(FakeEngines):
        async def infer(self, model: str, inputs: Any, outputs: Any) -> Any:
            if model == "mtgr_onnx_rank":
                await asyncio.Event().wait()
            return await super().infer(model, inputs, outputs)

    hasty = policy(engine_timeout=0.05, task_weights={})
    asked = features(CATALOG.raw_ids[:5], strategy="auto")

    async def both() -> list[Ranking]:
        engines = Hanging(unready={"mtgr_tensorrt_rank": "absent", "mtgr_vllm": "absent"})
        router = Router(SCHEMA, CATALOG, engines, hasty)
        # The second one waits behind the hanging call and must not wait for ever either.
        return list(await asyncio.gather(router.route(asked), router.route(asked)))

    for answer in asyncio.run(both()):
        assert answer.strategy == "baseline"
        assert FALLBACK in answer.labels


def test_requests_beyond_the_limit_are_refused_at_once() -> None:
    async def burst() -> list[Ranking | BaseException]:
        full = AdmissionConfig(max_concurrent=2, max_queue=1, shedding=False)
        router = Router(SCHEMA, CATALOG, FakeEngines(), dataclasses.replace(policy(task_weights={}), admission=full))
        asked = features(CATALOG.raw_ids[:5], strategy="onnx")
        answers = await asyncio.gather(*(router.route(asked) for _ in range(5)), return_exceptions=True)
        assert (await router.route(asked)).strategy == "onnx"  # the places are free again
        return list(answers)

    answers = asyncio.run(burst())
    assert [isinstance(answer, UnavailableError) for answer in answers] == [False] * 3 + [True] * 2


class Table(FakeEngines):
    """Engines of which one may fail for a while, on a clock that the test moves."""

    def __init__(self) -> None:
        super().__init__(unready_except("onnx", "baseline"))
        self.now = 100.0
        self.asked = 0

    def clock(self) -> float:
        return self.now

    async def infer(self, model: str, inputs: Any, outputs: Any) -> Any:
        self.asked += model.startswith("mtgr_onnx")
        return await super().infer(model, inputs, outputs)


def test_an_engine_that_fails_is_left_alone_and_tried_again() -> None:
    engines = Table()
    engines.failing = ["mtgr_onnx_rank"]
    asked = features(CATALOG.raw_ids[:5], strategy="auto")

    async def scenario() -> None:
        breaker = BreakerConfig(consecutive_failures=3, open_seconds=1.0, jitter=0.0)
        router = Router(SCHEMA, CATALOG, engines, dataclasses.replace(policy(), breaker=breaker), clock=engines.clock)
        answers = [await router.route(asked) for _ in range(10)]
        assert {answer.strategy for answer in answers} == {"baseline"}
        assert [FALLBACK in answer.labels for answer in answers] == [True] * 3 + [False] * 7
        assert engines.asked == 3  # seven requests did not wait for it
        with pytest.raises(UnavailableError, match=r"strategy onnx: mtgr_onnx_rank is left alone for 1\.0 s after 3"):
            await router.route(dataclasses.replace(asked, strategy="onnx"))
        engines.failing = []
        engines.now += 1.1
        assert (await router.route(asked)).strategy == "onnx"
        assert engines.asked == 4

    asyncio.run(scenario())


def test_an_arm_serves_its_users_and_others_step_in_for_it() -> None:
    experiment = Experiment("e", (Arm("treatment", strategy="baseline"), Arm("new", version=2)))
    for unready, arm, strategy in (
        (("onnx", "baseline"), "treatment", "baseline"),
        (("onnx",), "treatment", "onnx"),
        (("onnx", "baseline"), "gone", "onnx"),
    ):
        engines = FakeEngines(unready_except(*unready))
        asked = dataclasses.replace(features(CATALOG.raw_ids[:5], strategy="auto"), arm=arm)
        router = Router(SCHEMA, CATALOG, engines, dataclasses.replace(policy(), experiment=experiment))
        answer = asyncio.run(router.route(asked))
        assert (answer.strategy, answer.arm) == (strategy, arm)


def test_an_arm_may_have_a_version_of_its_own() -> None:
    experiment = Experiment("e", (Arm("control"), Arm("new", version=2)))
    engines = FakeEngines(unready_except("onnx") | {f"{name}@2": "absent" for name in ("mtgr_baseline", "mtgr_vllm")})
    router = Router(SCHEMA, CATALOG, engines, dataclasses.replace(policy(), experiment=experiment))
    asyncio.run(router.route(dataclasses.replace(features([10, 13], strategy="auto"), arm="control")))
    engines.unready["mtgr_tensorrt_rank@2"] = "absent"
    asyncio.run(router.route(dataclasses.replace(features([10, 13], strategy="auto"), arm="new")))
    assert [model for model, _ in engines.calls] == ["mtgr_onnx_rank", "mtgr_onnx_rank@2"]


@pytest.mark.parametrize(("share", "compared"), [(1.0, 4), (0.0, 0)])
def test_a_shadow_is_compared_and_not_returned(share: float, compared: int) -> None:
    other = np.clip(TABLE + 0.25, 0, 1)

    class Two(FakeEngines):
        async def infer(self, model: str, inputs: Any, outputs: Any) -> Any:
            self.table = other if model == "mtgr_baseline" else TABLE
            return await super().infer(model, inputs, outputs)

    class Notes(Observer):
        def __init__(self) -> None:
            self.drifts: list[Drift | None] = []

        def shadow(self, drift: Drift | None) -> None:
            self.drifts.append(drift)

    notes = Notes()

    async def scenario() -> list[Ranking]:
        shadowed = dataclasses.replace(policy(), shadow=Shadow("baseline", share))
        router = Router(SCHEMA, CATALOG, Two(unready_except("onnx", "baseline")), shadowed, notes)
        answers = [await router.route(features(CATALOG.raw_ids[:50])) for _ in range(4)]
        while router._shadows:
            await asyncio.sleep(0)
        return answers

    for answer in asyncio.run(scenario()):
        np.testing.assert_array_equal(answer.items, expected_order(CATALOG.raw_ids[:50]))
    assert len(notes.drifts) == compared
    for found in notes.drifts:
        assert found is not None
        assert found.max_error == pytest.approx(0.25, abs=1e-6)


def test_a_request_whose_time_is_over_is_not_computed() -> None:
    engines = FakeEngines()
    late = dataclasses.replace(features([10, 13]), deadline_ms=1)
    with pytest.raises(RequestTimeoutError, match="ran out before admission"):
        route(engines, late)
    assert engines.calls == []


def test_a_request_is_given_up_when_its_time_is_over() -> None:
    async def scenario() -> None:
        engines = FakeEngines()
        engines.hold["mtgr_onnx_rank"] = asyncio.Event()
        router = Router(SCHEMA, CATALOG, engines, policy())
        soon = dataclasses.replace(features([10, 13]), deadline_ms=int(time.time() * 1e3) + 50)
        with pytest.raises(RequestTimeoutError, match="time limit"):
            await router.route(soon)
        assert router.admission.idle
        assert router.breaker("mtgr_onnx_rank").state == "closed"  # that it was late is not held against it

    asyncio.run(scenario())


def test_a_new_policy_does_not_call_an_engine_that_is_lost() -> None:
    """Triton may die of calling it; and the metrics page goes on saying that its breaker is open."""

    class Losing(FakeEngines):
        async def infer(self, model: str, inputs: Any, outputs: Any) -> Any:
            if model == "mtgr_onnx_rank":
                self.calls.append((model, inputs))
                raise EngineLostError(f"{model} failed: its stub is not healthy")
            return await super().infer(model, inputs, outputs)

    async def scenario() -> None:
        engines, registry = Losing(unready_except("onnx", "baseline")), MetricRegistry()
        router = Router(SCHEMA, CATALOG, engines, policy(), RouterMetrics(registry, SCHEMA.item_column))
        asked = features([10, 13, 16], strategy="auto")
        assert FALLBACK in (await router.route(asked)).labels
        breaker = BreakerConfig(consecutive_failures=2, open_seconds=0.001, max_open_seconds=0.002)
        router.update(dataclasses.replace(policy(), breaker=breaker))
        await asyncio.sleep(0.01)
        lost = router.breaker("mtgr_onnx_rank")
        assert (lost.state, lost.config) == ("open", breaker)
        assert router.breaker("mtgr_baseline").config == breaker
        before = len(engines.calls)
        assert FALLBACK not in (await router.route(asked)).labels
        assert [model for model, _ in engines.calls[before:]] == ["mtgr_baseline"]
        states = {spec.labels: value for spec, value in registry.changes() if spec.name == "mtgr_breaker_state"}
        assert states == {(("model", "mtgr_onnx_rank"),): 2.0}

    asyncio.run(scenario())


def test_a_new_policy_holds_for_the_next_request() -> None:
    async def scenario() -> None:
        router = Router(SCHEMA, CATALOG, FakeEngines(unready_except("onnx", "baseline")), policy())
        asked = features([10, 13, 16], strategy="auto")
        assert (await router.route(asked)).strategy == "onnx"
        router.update(dataclasses.replace(policy(), auto=AutoConfig(("baseline", "onnx"), adaptive=False)))
        assert (await router.route(asked)).strategy == "baseline"
        with pytest.raises(ConfigurationError, match="weight for 'clicks'"):
            router.update(policy(task_weights={"clicks": 1.0}))
        assert (await router.route(asked)).strategy == "baseline"

    asyncio.run(scenario())
