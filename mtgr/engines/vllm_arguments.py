"""What vLLM is told before its engine starts: its environment, and its arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mtgr.engines.vllm_settings import CPU_CACHE_BYTES, SETTINGS_FILE, VLLMSettings
from mtgr.errors import ConfigurationError
from mtgr.vllm_plugin import CUDA_GRAPHS, QUANTIZATION, SCHEDULER

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

# What vLLM reads from the environment. Nothing is downloaded and nothing reported; the newer model runner has no
# pooling of prompt embeddings; a service on a CPU says itself how many threads it wants, and those that wait for the
# next operator sleep: where they spin on a core that others want too, a request takes ten times as long.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",
    # Rows and scores of a request go along in its message: a frame of their own costs more than a copy of 100 kB.
    "VLLM_MSGPACK_ZERO_COPY_THRESHOLD": str(1 << 20),
}


def prepare_environment(threads: int) -> None:
    """Set what vLLM, and the processes that it starts, read from the environment.

    Args:
        threads: Threads of its processes within an operator, where they compute on a CPU.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def engine_arguments(settings: VLLMSettings, folder: Path, more: Mapping[str, Any]) -> AsyncEngineArgs:
    """Arguments of an engine; after ``prepare_environment``, and with the plugin registered.

    Args:
        settings: What a model's settings file says.
        folder: The model.
        more: Arguments beyond those.

    Raises:
        ConfigurationError: If the settings ask for GPUs that are not there.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs(
        **settings_arguments(settings),
        model=str(folder),
        runner="pooling",
        skip_tokenizer_init=True,
        enable_prompt_embeds=True,
        enable_prefix_caching=True,
        # The static segment's tokens see each other both ways: they must meet in one step.
        enable_chunked_prefill=False,
        scheduler_cls=SCHEDULER,
        use_tqdm_on_load=False,
        **more,
    )


def settings_arguments(settings: VLLMSettings) -> dict[str, Any]:
    """Arguments that the settings decide."""
    arguments = settings.to_dict()
    del arguments["model"], arguments["in_process"]
    # vLLM has no graphs for pooling models, and its quantised layers are of its own networks: the plugin's own are
    # asked for where vLLM leaves room for a platform's.
    arguments["additional_config"] = {CUDA_GRAPHS: not settings.enforce_eager, QUANTIZATION: settings.quantization}
    del arguments["quantization"], arguments["kv_offload_gib"]
    if settings.kv_offload_gib:
        arguments["kv_offloading_size"] = settings.kv_offload_gib
    arguments["enforce_eager"] = True
    on_gpu = torch.cuda.is_available()
    if settings.kv_offload_gib and not on_gpu:
        raise ConfigurationError(f"{SETTINGS_FILE}: kv_offload_gib needs a GPU whose pages it holds; set it to 0.")
    if settings.dtype == "auto":
        arguments["dtype"] = "bfloat16" if on_gpu else "float32"
    if settings.kv_cache_memory_bytes is None and not on_gpu:
        # A host's memory is not the engine's own, of which vLLM would take gpu_memory_utilization.
        arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    if settings.tensor_parallel_size > 1:
        if on_gpu:
            _check_gpus(settings.tensor_parallel_size)
        arguments["distributed_executor_backend"] = "mp"
        # A copy of a process that has threads and a GPU may stop wherever one of them held a lock.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    elif not on_gpu and os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind":
        # Compute in the engine's own process, as on a GPU. By this name, for vLLM turns "uni" into a process more,
        # whose threads it can bind to cores.
        arguments["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    return {name: value for name, value in arguments.items() if value is not None}


def _check_gpus(ranks: int) -> None:
    gpus = torch.cuda.device_count()
    if ranks > gpus:
        there = "there is 1 GPU" if gpus == 1 else f"there are {gpus} GPUs"
        raise ConfigurationError(
            f"{SETTINGS_FILE}: tensor_parallel_size is {ranks}, but {there}; set it to {gpus}, or start the server "
            "with more GPUs visible."
        )
