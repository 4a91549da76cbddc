"""The router with engines in memory: which strategy serves, what shapes it sees, and how an answer is ranked."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.routing.buckets import CANDIDATE_BUCKETS, CONTEXT_BUCKETS, bucket, pad
from mtgr.routing.config import RoutingConfig
from mtgr.routing.ranker import Ranking
from mtgr.routing.router import Router
from mtgr.routing.strategies import AUTO_ORDER, STRATEGIES
from mtgr.schema import FIRST_ID, SLOT_COLUMN, TYPE_COLUMN, TokenType
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


def test_no_policy_pads_beyond_what_plans_take() -> None:
    longest = bucket(SCHEMA.max_context, CONTEXT_BUCKETS)
    for buckets in ((16, 2 * longest), (SCHEMA.max_context - 1,)):
        engines = FakeEngines()
        route(engines, features([10, 13], context=SCHEMA.max_context), context_buckets=buckets)
        ((_, length, _),) = engines.shapes("context")
        assert SCHEMA.max_context <= length <= longest


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
    step = buckets[-1] // 16
    for more, padded in ((1, step), (step, step), (step + 1, 2 * step), (buckets[-1], buckets[-1])):
        assert bucket(buckets[-1] + more, buckets) == buckets[-1] + padded


def test_padding_stands_on_the_right() -> None:
    rows = np.arange(1, 7, dtype=np.int32).reshape(2, 3)
    np.testing.assert_array_equal(pad(rows, 4), [[[1, 2, 3], [4, 5, 6], [0, 0, 0], [0, 0, 0]]])
