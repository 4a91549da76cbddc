"""A real vLLM engine on a small random network, and an event loop for it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from mtgr.config import ModelConfig
from mtgr.engines.vllm_rows import VLLMRowEngine
from mtgr.engines.vllm_settings import VLLMSettings
from mtgr.files import write_json
from mtgr.model import MTGR
from mtgr.schema import Schema
from tests.unit.models import small_catalog, small_config, small_schema, spread_model

Result = TypeVar("Result")
Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

BLOCK_SIZE = 16
PAGES = 64  # of which one is vLLM's own: 1,008 tokens


def write_engine(
    directory: Path, model: MTGR, config: ModelConfig, schema: Schema, version: str = "1", **settings: Any
) -> Path:
    """A version directory, made by hand: what the export writes is tested with the export."""
    folder = directory / "checkpoint"
    folder.mkdir(parents=True)
    described = {
        "model": config.to_dict(),
        "schema": schema.to_dict(),
        "num_features": model.embedding.item.features.shape[1],
        "model_version": version,
    }
    write_json(
        folder / "config.json",
        {"model_type": "mtgr", "architectures": ["MTGRForRecommendation"], "mtgr": described},
    )
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    pages = (PAGES - 1) * BLOCK_SIZE
    values = {
        "max_model_len": pages,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 16,
        "num_gpu_blocks_override": PAGES,
        "kv_cache_memory_bytes": 1 << 30,
    }
    VLLMSettings(**(values | settings)).save(directory / "model.json")
    return directory


@dataclass
class Served:
    """A running engine beside the dense network it serves."""

    engine: VLLMRowEngine
    model: MTGR
    config: ModelConfig
    schema: Schema
    loop: asyncio.AbstractEventLoop

    def run(self, call: Coroutine[Any, Any, Result]) -> Result:
        """Result of a coroutine in the engine's loop."""
        return asyncio.run_coroutine_threadsafe(call, self.loop).result(timeout=120)

    def rank(self, context: Int32Array, candidates: Int32Array) -> Float32Array:
        return self.run(self.engine.rank(context, candidates))

    def dense(self, context: Int32Array, candidates: Int32Array) -> Float32Array:
        """Scores of the reference, FP32 [k, T]."""
        with torch.inference_mode():
            scores: Float32Array = self.model(
                torch.from_numpy(context)[None], torch.from_numpy(candidates)[None]
            ).numpy()
        return scores[0]

    def cached(self) -> int:
        """Context tokens found in the cache so far."""
        return self.engine.statistics().context_tokens_cached


def start(
    directory: Path, settings: Mapping[str, Any] | None = None, **overrides: Any
) -> tuple[Served, threading.Thread]:
    """Start an engine whose network has random weights and scores that spread."""
    schema, config = small_schema(), small_config(**overrides)
    model = spread_model(config, schema, small_catalog(), seed=1)
    write_engine(directory / "1", model, config, schema, **(settings or {}))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    engine = asyncio.run_coroutine_threadsafe(VLLMRowEngine.start(directory / "1"), loop).result(timeout=120)
    return Served(engine, model, config, schema, loop), thread


def stop(served: Served, thread: threading.Thread) -> None:
    served.engine.shutdown()
    served.loop.call_soon_threadsafe(served.loop.stop)
    thread.join()


def prepare_process() -> None:
    """Of a process that has the plugin's model without an engine: vLLM's settings, and the plugin."""
    from mtgr.vllm_plugin import register

    os.environ.update({"HF_HUB_OFFLINE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    torch.set_num_threads(1)
    register()


def in_a_process(work: Callable[[Path], None], directory: Path) -> None:
    """Run a function of a module in a process of its own, which keeps what it does to vLLM."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=(directory,), daemon=True)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
