"""The router with engines in memory: which strategy serves, what shapes it sees, and how an answer is ranked."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mtgr.errors import ConfigurationError, RequestTimeoutError, UnavailableError
from mtgr.features.candidates import build_candidate_state
from mtgr.features.extract import Features
from mtgr.metrics import MetricRegistry
from mtgr.routing.admission import AdmissionConfig
from mtgr.routing.breaker import BreakerConfig
from mtgr.routing.buckets import CANDIDATE_BUCKETS, CONTEXT_BUCKETS, bucket, pad
from mtgr.routing.choice import AutoConfig
from mtgr.routing.config import RoutingConfig
from mtgr.routing.experiment import Arm, Experiment, Shadow
from mtgr.routing.metrics import RouterMetrics
from mtgr.routing.observer import Observer
from mtgr.routing.policy import Policy
from mtgr.routing.ranker import Ranking
from mtgr.routing.reasons import EngineLostError
from mtgr.routing.router import FALLBACK, Router
from mtgr.routing.shadow import Drift
from mtgr.routing.strategies import AUTO_ORDER, STRATEGIES
from mtgr.schema import FIRST_ID, SLOT_COLUMN, TYPE_COLUMN, TokenType
from tests.unit.models import EPOCH, small_catalog, small_schema

Arrays = dict[str, npt.NDArray[Any]]

NUM_ITEMS = 3002
SCHEMA = small_schema(NUM_ITEMS)
CATALOG = small_catalog(NUM_ITEMS)
REQUEST_TIME = EPOCH + 10_000
# What the fake engines say of each internal id: distinct, and in another order for every task.
TABLE = np.random.default_rng(0).permuted(np.linspace(0.01, 0.99, 3 * NUM_ITEMS).reshape(NUM_ITEMS, 3), axis=0)
TABLE = TABLE.astype(np.float32)
WEIGHTS = {"engagement": 1.0, "retention": 0.1, "monetization": 0.5}


class FakeEngines:
    """Engines that look scores up in a table and write down what they were asked."""

    def __init__(
        self,
        unready: Mapping[str, str] | None = None,
        failing: Sequence[str] = (),
        table: npt.NDArray[np.float32] = TABLE,
        retrieved: npt.NDArray[np.int32] | None = None,
    ) -> None:
        self.unready = unready or {}
        self.failing = failing
        self.table = table
        self.retrieved = np.arange(FIRST_ID, NUM_ITEMS, dtype=np.int32) if retrieved is None else retrieved
        self.calls: list[tuple[str, Arrays]] = []
        self.hold: dict[str, asyncio.Event] = {}

    def unready_reason(self, model: str) -> str | None:
        return self.unready.get(model)

    async def infer(self, model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        self.calls.append((model, dict(inputs)))
        if model in self.hold:
            await self.hold[model].wait()
        if model in self.failing:
            raise UnavailableError(f"{model} failed: out of memory")
        if "candidates" in inputs:
            assert list(outputs) == ["task_scores"]
            candidates = inputs["candidates"]
            scores = self.table[candidates[..., SCHEMA.item_column]]
            # Padding must never reach a result.
            scores[candidates[..., TYPE_COLUMN] == TokenType.PADDING] = np.nan
            return {"task_scores": scores}
        assert list(outputs) == ["items"]
        return {"items": np.repeat(self.retrieved[None], len(inputs["context"]), axis=0)}

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        return [inputs[name].shape for _, inputs in self.calls if name in inputs]


def features(
    candidates: Sequence[int] | npt.NDArray[np.int64] = (),
    *,
    strategy: str = "onnx",
    top_k: int = 0,
    seen: Sequence[int] = (),
    context: int = 5,
    labels: tuple[str, ...] = (),
) -> Features:
    """A request of a user with events on the internal ids ``seen``."""
    items = np.asarray(seen, dtype=np.int64)
    times = EPOCH + np.arange(len(items), dtype=np.int64)
    actions = np.ones(len(items), dtype=np.int32)
    state = build_candidate_state(SCHEMA, CATALOG, items, actions, times, REQUEST_TIME, context)
    rows = np.ones((context, SCHEMA.width), dtype=np.int32)
    rows[:, SLOT_COLUMN] = np.arange(context)
    return Features(
        context=rows,
        candidate_state=state.to_array(SCHEMA.epoch),
        candidates=np.asarray(candidates, dtype=np.int64),
        strategy=strategy,
        top_k=top_k,
        arm="treatment",
        labels=labels,
    )


def policy(**routing: Any) -> Policy:
    """No measuring, no shedding: what serves is decided by the order alone."""
    return Policy(
        "test",
        auto=AutoConfig(adaptive=False),
        routing=RoutingConfig(**routing),
        admission=AdmissionConfig(max_concurrent=1024, shedding=False),
    )


def route(engines: FakeEngines, request: Features, **config: Any) -> Ranking:
    return asyncio.run(Router(SCHEMA, CATALOG, engines, policy(**config)).route(request))


def expected_order(raw: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``raw``, ascending ids, by falling score; where rounding makes scores equal, the lower id comes first."""
    scores = TABLE[CATALOG.to_internal(raw)] @ np.array([WEIGHTS[name] for name in SCHEMA.task_names])
    return raw[np.argsort(-scores.astype(np.float32), kind="stable")]


def unready_except(*strategies: str) -> dict[str, str]:
    models = {model for name, entry in STRATEGIES.items() if name not in strategies for model in entry.models}
    return {model: f"{model} is not installed" for model in models}


def test_an_explicit_strategy_that_is_not_ready_is_refused_with_the_reason() -> None:
    engines = FakeEngines(unready_except("baseline"))
    with pytest.raises(UnavailableError, match=r"^strategy onnx: mtgr_onnx_rank is not installed\.$"):
        route(engines, features([10, 13], strategy="onnx"))
    assert engines.calls == []


def test_an_explicit_strategy_that_fails_does_not_fall_back() -> None:
    engines = FakeEngines(failing=["mtgr_onnx_rank"])
    with pytest.raises(UnavailableError, match="strategy onnx: mtgr_onnx_rank failed: out of memory"):
        route(engines, features([10, 13], strategy="onnx"))
    assert [model for model, _ in engines.calls] == ["mtgr_onnx_rank"]


@pytest.mark.parametrize("first", range(len(AUTO_ORDER)))
def test_auto_takes_the_first_that_is_ready(first: int) -> None:
    engines = FakeEngines(unready_except(*AUTO_ORDER[first:]))
    answer = route(engines, features([10, 13], strategy="auto"))
    assert answer.strategy == AUTO_ORDER[first]
    assert {model for model, _ in engines.calls} == {STRATEGIES[AUTO_ORDER[first]].rank_model}
    # To skip what is not installed is no failure.
    assert answer.labels == ()


def test_auto_falls_back_with_a_label_and_keeps_the_others() -> None:
    engines = FakeEngines(unready_except("onnx", "baseline"), failing=["mtgr_onnx_rank"])
    answer = route(engines, features([10, 13], strategy="auto", labels=("cold_start",)))
    assert answer.strategy == "baseline"
    assert answer.labels == ("cold_start", "fallback")
    assert [model for model, _ in engines.calls] == ["mtgr_onnx_rank", "mtgr_baseline"]


def test_auto_without_any_engine_names_every_reason() -> None:
    engines = FakeEngines(unready_except("onnx"), failing=["mtgr_onnx_rank"])
    with pytest.raises(UnavailableError, match="no engine is ready") as caught:
        route(engines, features([10, 13], strategy="auto"))
    for name in AUTO_ORDER:
        assert f"{name}: {STRATEGIES[name].rank_model}" in str(caught.value)
    assert "make export" in str(caught.value)


def test_the_policy_may_set_other_buckets() -> None:
    engines = FakeEngines()
    candidates = CATALOG.raw_ids[:11]
    answer = route(engines, features(candidates, context=70), context_buckets=(100,), candidate_buckets=(2, 4))
    assert len(answer.items) == len(candidates)
    assert {length for _, length, _ in engines.shapes("context")} == {100}
    assert sum(batch for batch, length, _ in engines.shapes("candidates") if length == 4) == 3


@pytest.mark.parametrize("buckets", [(), (0, 4), (4, 2), (4, 4)])
def test_buckets_that_make_no_sense_are_refused(buckets: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="candidate_buckets is"):
        RoutingConfig(candidate_buckets=buckets)


def test_ranking_needs_no_retrieval_model() -> None:
    engines = FakeEngines({"mtgr_onnx_retrieve": "mtgr_onnx_retrieve is not installed"})
    assert route(engines, features([10])).strategy == "onnx"
    with pytest.raises(UnavailableError, match="mtgr_onnx_retrieve is not installed"):
        route(engines, features())


@pytest.mark.parametrize(("context", "candidates"), [(1, 1), (64, 16), (65, 17), (200, 257), (2048, 1024), (2049, 3)])
def test_dense_engines_see_buckets(context: int, candidates: int) -> None:
    engines = FakeEngines()
    answer = route(engines, features(CATALOG.raw_ids[:candidates], context=context))
    assert len(answer.items) == candidates
    padded = bucket(context, CONTEXT_BUCKETS), bucket(candidates, CANDIDATE_BUCKETS)
    assert engines.shapes("context") == [(1, padded[0], SCHEMA.width)]
    assert engines.shapes("candidates") == [(1, padded[1], SCHEMA.width)]
    (_, inputs), *_ = engines.calls
    assert padded[0] >= context
    for name, length in (("context", context), ("candidates", candidates)):
        types = inputs[name][0, :, TYPE_COLUMN]
        assert (types[:length] != TokenType.PADDING).all()
        assert not inputs[name][0, length:].any()
        assert inputs[name].dtype == np.int32


def test_vllm_sees_rows_as_they_are() -> None:
    engines = FakeEngines()
    route(engines, features(CATALOG.raw_ids[:17], strategy="vllm", context=70))
    assert engines.shapes("context") == [(1, 70, SCHEMA.width)]
    assert engines.shapes("candidates") == [(1, 17, SCHEMA.width)]


# vLLM's engine splits them itself, once the context is cached.
@pytest.mark.parametrize(("strategy", "parts"), [("onnx", [1024, 1024, 512]), ("vllm", [2500])])
def test_more_candidates_than_the_largest_bucket_are_split(strategy: str, parts: list[int]) -> None:
    engines = FakeEngines()
    raw = CATALOG.raw_ids[:2500]
    answer = route(engines, features(raw, strategy=strategy, context=9))
    # Parts of equal length may share a call.
    sizes = [size for batch, size, _ in engines.shapes("candidates") for _ in range(batch)]
    assert sizes == parts
    np.testing.assert_array_equal(answer.items, expected_order(raw))
    np.testing.assert_array_equal(answer.task_scores, TABLE[CATALOG.to_internal(answer.items)])
    # Slots go on over the parts as if there were one call.
    slots = np.concatenate([inputs["candidates"][..., SLOT_COLUMN].ravel() for _, inputs in engines.calls])
    np.testing.assert_array_equal(slots[:2500], 9 + np.arange(2500))


def test_a_failure_of_one_part_is_a_failure_of_the_engine() -> None:
    table = TABLE.copy()
    table[CATALOG.to_internal(CATALOG.raw_ids[2000])] = np.nan
    engines = FakeEngines(table=table)
    with pytest.raises(UnavailableError, match="not finite"):
        route(engines, features(CATALOG.raw_ids[:2500]))


def test_scores_are_the_weighted_sum_of_the_tasks() -> None:
    answer = route(FakeEngines(), features([10, 13, 16]), task_weights={"monetization": 2.0})
    index = SCHEMA.task_names.index("monetization")
    np.testing.assert_allclose(answer.scores, 2.0 * answer.task_scores[:, index], rtol=1e-6)
    assert (np.diff(answer.scores) < 0).all()
    assert (answer.items.dtype, answer.scores.dtype, answer.task_scores.dtype) == (np.int64, np.float32, np.float32)
    assert answer.arm == "treatment"


def test_equal_scores_stand_in_ascending_order_of_item() -> None:
    table = np.full_like(TABLE, 0.5)
    table[CATALOG.to_internal(22)] = 0.9
    answer = route(FakeEngines(table=table), features([19, 10, 22, 16, 13]))
    assert answer.items.tolist() == [22, 10, 13, 16, 19]
    # Items that nobody knows are one and the same to an engine.
    unknown = route(FakeEngines(), features([10**12, 5, 11]))
    assert unknown.items.tolist() == [5, 11, 10**12]
    assert len(set(unknown.scores.tolist())) == 1


@pytest.mark.parametrize(("top_k", "length"), [(0, 20), (1, 1), (7, 7), (20, 20), (500, 20)])
def test_top_k_of_candidates(top_k: int, length: int) -> None:
    raw = CATALOG.raw_ids[:20]
    answer = route(FakeEngines(), features(raw, top_k=top_k), default_top_k=3)
    np.testing.assert_array_equal(answer.items, expected_order(raw)[:length])
    assert len(answer.scores) == len(answer.task_scores) == length
    assert answer.labels == ()


def test_recommendations_rank_the_retrieved_items() -> None:
    engines = FakeEngines()
    answer = route(engines, features(context=70), default_top_k=12, rank_limit=50)
    assert [model for model, _ in engines.calls] == ["mtgr_onnx_retrieve", "mtgr_onnx_rank"]
    assert engines.shapes("context") == [(1, 128, SCHEMA.width)] * 2
    np.testing.assert_array_equal(answer.items, expected_order(CATALOG.raw_ids[:50])[:12])
    assert answer.labels == ()


@pytest.mark.parametrize(("top_k", "ranked"), [(10, 100), (100, 100), (300, 300)])
def test_rank_limit_never_falls_below_top_k(top_k: int, ranked: int) -> None:
    engines = FakeEngines()
    answer = route(engines, features(strategy="vllm", top_k=top_k), rank_limit=100)
    assert engines.shapes("candidates") == [(1, ranked, SCHEMA.width)]
    assert len(answer.items) == top_k


def test_seen_items_are_left_out_and_replaced_by_the_next() -> None:
    retrieved = np.arange(FIRST_ID, FIRST_ID + 30, dtype=np.int32)
    seen = [FIRST_ID, FIRST_ID + 3, FIRST_ID + 4]
    request = features(seen=seen, top_k=10, strategy="vllm")
    engines = FakeEngines(retrieved=retrieved)
    answer = route(engines, request, rank_limit=10)
    assert not np.isin(answer.items, CATALOG.to_raw(seen)).any()
    assert engines.shapes("candidates") == [(1, 10, SCHEMA.width)]
    assert sorted(answer.items.tolist()) == CATALOG.raw_ids[[1, 2, *range(5, 13)]].tolist()
    kept = route(FakeEngines(retrieved=retrieved), request, rank_limit=10, remove_seen=False)
    assert sorted(kept.items.tolist()) == CATALOG.raw_ids[:10].tolist()


def test_fewer_items_than_asked_for_are_labelled() -> None:
    retrieved = np.arange(FIRST_ID, FIRST_ID + 30, dtype=np.int32)
    request = features(seen=range(FIRST_ID, FIRST_ID + 8), top_k=25)
    answer = route(FakeEngines(retrieved=retrieved), request)
    assert len(answer.items) == 22
    assert answer.labels == ("fewer_than_top_k",)
    enough = route(FakeEngines(retrieved=retrieved), features(seen=range(FIRST_ID, FIRST_ID + 8), top_k=22))
    assert (len(enough.items), enough.labels) == (22, ())


def test_a_user_who_has_seen_everything_gets_an_empty_answer() -> None:
    engines = FakeEngines(retrieved=np.array([FIRST_ID, FIRST_ID + 1], dtype=np.int32))
    answer = route(engines, features(seen=[FIRST_ID, FIRST_ID + 1]))
    assert (answer.items.shape, answer.scores.shape, answer.task_scores.shape) == ((0,), (0,), (0, 3))
    assert answer.labels == ("fewer_than_top_k",)
    assert [model for model, _ in engines.calls] == ["mtgr_onnx_retrieve"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_a_failure(value: float) -> None:
    table = TABLE.copy()
    table[CATALOG.to_internal(13), 2] = value
    with pytest.raises(UnavailableError, match="strategy onnx: mtgr_onnx_rank returned scores that are not finite"):
        route(FakeEngines(table=table), features([10, 13, 16]))
    assert len(route(FakeEngines(table=table), features([10, 16])).items) == 2
    with pytest.raises(UnavailableError, match="no engine is ready"):
        route(FakeEngines(table=table), features([10, 13, 16], strategy="auto"))


def test_without_weights_tasks_have_their_usual_ones_and_those_of_other_models_count_alike() -> None:
    config = RoutingConfig()
    assert config.weights_of(["retention", "engagement", "monetization", "likes"]) == [0.1, 1.0, 0.5, 0.0]
    assert config.weights_of(["next_item"]) == [1.0]
    assert config.weights_of(["click", "engagement"]) == [1.0, 1.0]


def test_weights_of_unknown_tasks_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="weight for 'clicks', but the tasks are engagement, retention"):
        Router(SCHEMA, CATALOG, FakeEngines(), policy(task_weights={"engagement": 1.0, "clicks": 1.0}))


def test_a_slow_engine_does_not_hold_up_a_fast_one() -> None:
    async def scenario() -> list[str]:
        engines = FakeEngines()
        engines.hold["mtgr_baseline"] = asyncio.Event()
        router = Router(SCHEMA, CATALOG, engines, policy())
        slow = [asyncio.create_task(router.route(features([10, 13], strategy="baseline"))) for _ in range(8)]
        await asyncio.sleep(0)
        fast = await asyncio.wait_for(router.route(features([10, 13], strategy="onnx")), 5)
        assert not any(task.done() for task in slow)
        engines.hold["mtgr_baseline"].set()
        return [fast.strategy, *(answer.strategy for answer in await asyncio.gather(*slow))]

    assert asyncio.run(scenario()) == ["onnx", *["baseline"] * 8]


@pytest.mark.parametrize(("strategy", "max_running", "at_once"), [("onnx", 2, 2), ("onnx", 5, 3)])
def test_parts_of_one_request_run_at_once(strategy: str, max_running: int, at_once: int) -> None:
    async def scenario() -> int:
        engines = FakeEngines()
        engines.hold[STRATEGIES[strategy].rank_model] = asyncio.Event()
        router = Router(SCHEMA, CATALOG, engines, policy(max_running=max_running))
        task = asyncio.create_task(router.route(features(CATALOG.raw_ids[:2500], strategy=strategy)))
        for _ in range(10):
            await asyncio.sleep(0)
        waiting = len(engines.calls)
        engines.hold[STRATEGIES[strategy].rank_model].set()
        assert len((await task).items) == 2500
        return waiting

    assert asyncio.run(scenario()) == at_once


def test_users_who_share_a_batch_get_their_own_answers() -> None:
    generator = np.random.default_rng(1)
    requests = [
        features(
            np.sort(generator.choice(CATALOG.raw_ids, int(generator.integers(1, 40)), replace=False)),
            context=int(generator.integers(1, 150)),
        )
        for _ in range(60)
    ]

    async def together(engines: FakeEngines) -> list[Ranking]:
        router = Router(SCHEMA, CATALOG, engines, policy())
        return list(await asyncio.gather(*(router.route(request) for request in requests)))

    engines = FakeEngines()
    for request, answer in zip(requests, asyncio.run(together(engines)), strict=True):
        np.testing.assert_array_equal(answer.items, expected_order(request.candidates))
        np.testing.assert_array_equal(answer.task_scores, TABLE[CATALOG.to_internal(answer.items)])
    assert len(engines.calls) < 20, "nobody shared a batch, so nothing was tested"


@pytest.mark.parametrize("buckets", [CONTEXT_BUCKETS, CANDIDATE_BUCKETS])
def test_buckets_are_the_smallest_that_hold_a_length(buckets: tuple[int, ...]) -> None:
    assert list(buckets) == sorted(set(buckets))
    for length in range(1, buckets[-1] + 1):
        assert bucket(length, buckets) == min(size for size in buckets if size >= length)
    assert bucket(buckets[-1] + 1, buckets) == 2 * buckets[-1]


def test_padding_stands_on_the_right() -> None:
    rows = np.arange(1, 7, dtype=np.int32).reshape(2, 3)
    np.testing.assert_array_equal(pad(rows, 4), [[[1, 2, 3], [4, 5, 6], [0, 0, 0], [0, 0, 0]]])


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
