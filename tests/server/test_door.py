"""The door on real users: engines agree, batches equal singles, and a result names who served it."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from numpy.random import Generator

from mtgr.bundle import load_bundle
from mtgr.client import AsyncMTGRClient, History, MTGRClient, Recommendation, RecommendationRequest
from mtgr.pipeline import OptimizedInferencePipeline, PipelineConfig
from mtgr.routing.strategies import STRATEGIES
from mtgr.serving.server import TritonServer

TOLERANCE = 1e-5
REQUEST_TIME = 893_286_639  # one second after the last event of the log


@pytest.fixture
def rng() -> Generator:
    return np.random.default_rng(20260101)


@pytest.fixture
def client(server: TritonServer):
    with MTGRClient(server.grpc_url) as client:
        yield client


def users_of(model_repository: Path) -> list[str]:
    return load_bundle(model_repository).store().user_ids()


def scores_by_item(answer: Recommendation) -> dict[int, np.ndarray]:
    return dict(zip(answer.items.tolist(), answer.task_scores, strict=True))


def assert_same(first: Recommendation, second: Recommendation, tolerance: float = TOLERANCE) -> None:
    """Same items with the same scores; items may change places where scores are closer than rounding."""
    one, two = scores_by_item(first), scores_by_item(second)
    assert one.keys() == two.keys()
    for item, scores in one.items():
        np.testing.assert_allclose(scores, two[item], rtol=0, atol=tolerance)
    np.testing.assert_allclose(first.scores, second.scores, rtol=0, atol=2 * tolerance)


def counts(server: TritonServer) -> dict[str, tuple[int, int]]:
    """Inference and execution counts by model."""
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/stats") as response:
        stats = json.load(response)["model_stats"]
    return {entry["name"]: (entry["inference_count"], entry["execution_count"]) for entry in stats}


def test_engines_agree_on_real_users(client: MTGRClient, model_repository: Path, rng: Generator) -> None:
    bundle = load_bundle(model_repository)
    spreads = []
    for user in rng.choice(users_of(model_repository), 100, replace=False).tolist():
        candidates = rng.choice(bundle.catalog.raw_ids, 64, replace=False)
        answers = {
            strategy: client.rank(user, candidates, strategy=strategy, request_time=REQUEST_TIME)
            for strategy in ("baseline", "onnx")
        }
        assert {name: answer.strategy for name, answer in answers.items()} == {"baseline": "baseline", "onnx": "onnx"}
        assert len(answers["onnx"]) == 64
        assert_same(answers["baseline"], answers["onnx"])
        spreads.append(answers["baseline"].task_scores[:, 0].std())
    # A comparison of constants would prove nothing.
    assert np.mean(spreads) >= 0.05


def test_recommendations_agree_and_leave_out_what_was_seen(
    client: MTGRClient, model_repository: Path, rng: Generator
) -> None:
    store = load_bundle(model_repository).store()
    for user in rng.choice(users_of(model_repository), 20, replace=False).tolist():
        answers = [
            client.recommend(user, strategy=strategy, top_k=10, request_time=REQUEST_TIME)
            for strategy in ("baseline", "onnx")
        ]
        assert_same(*answers, tolerance=2e-5)
        assert len(answers[0]) == 10
        record = store.get(user)
        assert record is not None
        assert not np.isin(answers[0].items, record.items).any()
        assert (np.diff(answers[0].scores) <= 0).all()


def test_candidate_order_does_not_matter(client: MTGRClient, model_repository: Path, rng: Generator) -> None:
    candidates = rng.choice(load_bundle(model_repository).catalog.raw_ids, 100, replace=False)
    for strategy in ("baseline", "onnx"):
        first = client.rank("196", candidates, strategy=strategy, request_time=REQUEST_TIME)
        second = client.rank("196", rng.permutation(candidates), strategy=strategy, request_time=REQUEST_TIME)
        assert_same(first, second)
        alone = client.rank("196", candidates[:3], strategy=strategy, request_time=REQUEST_TIME)
        for item, scores in scores_by_item(alone).items():
            np.testing.assert_allclose(scores, scores_by_item(first)[item], rtol=0, atol=TOLERANCE)


def test_more_candidates_than_the_largest_bucket(client: MTGRClient, model_repository: Path) -> None:
    everything = load_bundle(model_repository).catalog.raw_ids
    assert len(everything) > 1024
    answer = client.rank("22", everything, strategy="onnx", request_time=REQUEST_TIME)
    assert sorted(answer.items.tolist()) == everything.tolist()
    part = client.rank("22", everything[1000:1100], strategy="onnx", request_time=REQUEST_TIME)
    for item, scores in scores_by_item(part).items():
        np.testing.assert_allclose(scores, scores_by_item(answer)[item], rtol=0, atol=TOLERANCE)


def mixed_requests(model_repository: Path, rng: Generator, strategy: str) -> list[RecommendationRequest]:
    """32 users of mixed lengths with mixed optional inputs."""
    catalog = load_bundle(model_repository).catalog
    requests = []
    for index, user in enumerate(rng.choice(users_of(model_repository), 32, replace=False).tolist()):
        history = None
        if index % 4 == 1:
            events = int(rng.integers(0, 400))
            history = History(
                rng.choice(catalog.raw_ids, events),
                rng.integers(0, 5, events).astype(np.int32),
                np.sort(rng.integers(880_000_000, REQUEST_TIME, events)),
            )
        candidates = rng.choice(catalog.raw_ids, int(rng.integers(1, 200)), replace=False) if index % 3 < 2 else None
        requests.append(
            RecommendationRequest(
                user if index % 5 else f"new-{index}",
                history=history,
                candidates=candidates,
                request_time=REQUEST_TIME,
                profile={"age": 30, "gender": "F"} if index % 7 == 3 else None,
                strategy=strategy,
                top_k=None if index % 2 else 7,
            )
        )
    return requests


@pytest.mark.parametrize("strategy", ["baseline", "onnx"])
def test_concurrent_requests_equal_single_ones(
    server: TritonServer, client: MTGRClient, model_repository: Path, rng: Generator, strategy: str
) -> None:
    requests = mixed_requests(model_repository, rng, strategy)
    singles = [client.infer(request) for request in requests]

    async def together() -> list[Recommendation]:
        async with AsyncMTGRClient(server.grpc_url, timeout=60) as concurrent:
            return list(await asyncio.gather(*(concurrent.infer(request) for request in requests)))

    for single, batched in zip(singles, asyncio.run(together()), strict=True):
        assert_same(single, batched)
        assert single.labels == batched.labels


@pytest.mark.parametrize("strategy", ["baseline", "onnx"])
def test_users_share_batches_under_load(
    server: TritonServer, model_repository: Path, rng: Generator, strategy: str
) -> None:
    users = users_of(model_repository)
    candidates = load_bundle(model_repository).catalog.raw_ids[:64]
    model = STRATEGIES[strategy].rank_model
    before = counts(server)

    async def load() -> list[Recommendation]:
        async with AsyncMTGRClient(server.grpc_url, timeout=60) as concurrent:
            chosen = rng.choice(users, 256).tolist()
            return list(
                await asyncio.gather(*(concurrent.rank(user, candidates, strategy=strategy) for user in chosen))
            )

    answers = asyncio.run(load())
    assert {answer.strategy for answer in answers} == {strategy}
    after = counts(server)
    inferences, executions = (after[model][index] - before[model][index] for index in (0, 1))
    assert inferences == 256
    assert executions < inferences / 2


def test_the_strategy_named_is_the_one_that_ran(server: TritonServer, client: MTGRClient) -> None:
    before = counts(server)
    asked = {"baseline": 5, "onnx": 7, "auto": 3}
    served = {"baseline": 0, "onnx": 0}
    for strategy, times in asked.items():
        for index in range(times):
            answer = client.rank(str(index + 1), [1, 2, 3], strategy=strategy, request_time=REQUEST_TIME)
            served[answer.strategy] += 1
    # `auto` takes the one that was fastest of late.
    assert served["baseline"] >= 5
    assert served["onnx"] >= 7
    assert sum(served.values()) == 15
    after = counts(server)
    for strategy, times in served.items():
        model = STRATEGIES[strategy].rank_model
        assert after[model][0] - before[model][0] == times
    assert after["mtgr"][0] - before["mtgr"][0] == 15


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_both_protocols_answer_alike(server: TritonServer, client: MTGRClient, protocol: str) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    with MTGRClient(url, protocol=protocol, compression="gzip") as other:  # type: ignore[arg-type]
        answer = other.recommend("196", request_time=REQUEST_TIME)
    assert_same(client.recommend("196", request_time=REQUEST_TIME), answer)


def test_a_user_nobody_knows_gets_a_labelled_answer(client: MTGRClient) -> None:
    answer = client.recommend("nobody", request_time=REQUEST_TIME)
    assert len(answer) == 10
    assert "cold_start" in answer.labels


def test_running_out_of_items_is_labelled(client: MTGRClient) -> None:
    answer = client.recommend("405", top_k=1600, request_time=REQUEST_TIME)
    assert 0 < len(answer) < 1600
    assert "fewer_than_top_k" in answer.labels


def test_in_process_pipeline_answers_as_the_server_does(
    client: MTGRClient, model_repository: Path, rng: Generator
) -> None:
    pipeline = OptimizedInferencePipeline(PipelineConfig(model_repository=model_repository))
    for strategy in ("baseline", "onnx", "auto"):
        for request in mixed_requests(model_repository, rng, strategy)[:12]:
            served = client.infer(request)
            local = pipeline.infer_recommendations(
                request.user_id,
                candidates=request.candidates,
                history=request.history,
                request_time=request.request_time,
                profile=request.profile,
                top_k=request.top_k,
                use_optimization=strategy,  # type: ignore[arg-type]
            )
            assert_same(served, local)
            assert (served.arm, served.labels) == (local.arm, local.labels)
            assert served.strategy == local.strategy or strategy == "auto"
