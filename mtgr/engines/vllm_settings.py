"""Engine arguments of vLLM as ``model.json`` holds them: the file format of Triton's own vLLM backend."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtgr.config import ModelConfig
from mtgr.errors import ConfigurationError
from mtgr.files import read_json, write_json
from mtgr.schema import Schema

SETTINGS_FILE = "model.json"

DTYPES = ("auto", "float32", "float16", "bfloat16")
QUANTIZATIONS = (None, "fp8")
BLOCK_SIZES = (16, 32, 64, 128)
MAX_TOKENS = (1 << 16) - 1  # a token says in two bytes how many others it sees
CPU_CACHE_BYTES = 1 << 30  # for pages on a CPU where the settings do not say


@dataclass(frozen=True)
class VLLMSettings:
    """Arguments of the engine, by vLLM's names.

    Attributes:
        max_model_len: Most tokens of one request, context and candidates together.
        max_num_batched_tokens: Most tokens computed in one step.
        model: Folder of ``config.json`` and ``model.safetensors``, relative to the folder of this file.
        dtype: Precision; ``auto`` is float32 on a CPU and bfloat16 on a GPU.
        max_num_seqs: Most requests in one step.
        block_size: Tokens of a page. Whole pages of a context are reused: small ones reuse more, large ones cost less.
        gpu_memory_utilization: Part of the GPU's memory for weights, activations and pages, (0, 1].
        kv_cache_memory_bytes: Memory for pages, instead of what ``gpu_memory_utilization`` leaves; None is 1 GiB on a
            CPU.
        num_gpu_blocks_override: Number of pages, for tests of a full cache; None leaves it to the memory.
        tensor_parallel_size: GPUs that share the model, each with a part of its heads, their weights and their cached
            keys and values; it must divide the number of heads. On a CPU, processes. Memory for pages is of each.
        quantization: ``fp8`` rounds the weights of the blocks' linear layers, and what goes into them, to e4m3 with a
            scale for each 128 numbers; the rest, cached keys and values too, stays in ``dtype``. None leaves it out.
        enforce_eager: Launch kernels one by one on a GPU; false captures CUDA graphs of all steps at the first request,
            which takes seconds, and memory for the largest step's activations once more.
        disable_log_stats: Without statistics there are no metrics.
        kv_offload_gib: Memory of the host, GiB, for pages that no longer fit the GPU, through vLLM's own connector: a
            user who comes back has them copied instead of computed. 0 is off.
        in_process: Compute in a thread of the process that takes the requests, instead of a process of the engine's
            own: a request is answered sooner, but an engine that crashes takes that process with it. Not with tensor
            parallelism, whose ranks are processes: when one dies, what vLLM leaves behind may hang the others' parent.
    """

    max_model_len: int
    max_num_batched_tokens: int
    model: str = "checkpoint"
    dtype: str = "auto"
    max_num_seqs: int = 256
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    tensor_parallel_size: int = 1
    quantization: str | None = None
    enforce_eager: bool = False
    disable_log_stats: bool = False
    kv_offload_gib: float = 0
    in_process: bool = False

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigurationError: If one is out of range, or two do not fit each other.
        """
        for name in ("max_model_len", "max_num_batched_tokens", "max_num_seqs", "tensor_parallel_size"):
            self._check(name, _positive(getattr(self, name)), "a positive integer")
        for name in ("kv_cache_memory_bytes", "num_gpu_blocks_override"):
            value = getattr(self, name)
            self._check(name, value is None or _positive(value), "a positive integer or null")
        for name in ("enforce_eager", "disable_log_stats", "in_process"):
            self._check(name, isinstance(getattr(self, name), bool), "true or false")
        part = self.gpu_memory_utilization
        number = isinstance(part, int | float) and not isinstance(part, bool) and math.isfinite(part)
        self._check("gpu_memory_utilization", number and 0 < part <= 1, "above 0 and at most 1")
        host = self.kv_offload_gib
        number = isinstance(host, int | float) and not isinstance(host, bool) and math.isfinite(host)
        self._check("kv_offload_gib", number and host >= 0, "0 or a number of GiB")
        self._check("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        pages = _positive(self.block_size) and self.block_size in BLOCK_SIZES
        self._check("block_size", pages, f"one of {', '.join(map(str, BLOCK_SIZES))}")
        folder = isinstance(self.model, str) and self.model != ""
        self._check("model", folder and not Path(self.model).is_absolute(), "a folder relative to model.json")
        self._check("quantization", self.quantization in QUANTIZATIONS, 'null or "fp8"')
        self._check("max_model_len", self.max_model_len <= MAX_TOKENS, f"at most {MAX_TOKENS}")
        if self.in_process and self.tensor_parallel_size > 1:
            raise ConfigurationError(
                f"{SETTINGS_FILE}: in_process is true, but with tensor_parallel_size {self.tensor_parallel_size} every "
                "rank is a process; set in_process to false, or tensor_parallel_size to 1."
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigurationError(
                f"{SETTINGS_FILE}: max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs "
                f"{self.max_num_seqs}; raise the one or lower the other."
            )
        if self.max_num_batched_tokens < self.max_model_len:
            raise ConfigurationError(
                f"{SETTINGS_FILE}: max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_model_len "
                f"{self.max_model_len}; a whole request must fit into one step, so raise the one or lower the other."
            )

    def _check(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise ConfigurationError(f"{SETTINGS_FILE}: {name} is {getattr(self, name)!r}; it must be {allowed}.")

    @property
    def max_pages(self) -> int:
        """Pages that a request of full length needs; one page of the cache is vLLM's own."""
        return -(-self.max_model_len // self.block_size) + 1

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VLLMSettings:
        """Settings out of JSON values.

        Raises:
            ConfigurationError: If a key is unknown or missing, or a value invalid.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = set(values) - names
        if unknown:
            raise ConfigurationError(
                f"{SETTINGS_FILE}: {min(unknown)!r} is not a key of it; choose out of {', '.join(sorted(names))}."
            )
        missing = {"max_model_len", "max_num_batched_tokens"} - set(values)
        if missing:
            raise ConfigurationError(f"{SETTINGS_FILE}: {min(missing)} is missing; run `make export`.")
        return cls(**values)

    def save(self, path: Path) -> None:
        """Write the settings as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> VLLMSettings:
        """Read settings.

        Raises:
            ConfigurationError: If the file is missing or invalid.
        """
        values = read_json(path)
        if not isinstance(values, dict):
            raise ConfigurationError(f"{path} must hold a JSON object; run `make export`.")
        return cls.from_dict(values)


def kv_token_bytes(config: ModelConfig, number_bytes: int, ranks: int = 1) -> int:
    """Bytes that a token's keys and values take in the cache of each rank.

    Args:
        config: The network.
        number_bytes: Of a number: 4 in fp32, else 2; quantised engines cache in the precision of the rest.
        ranks: ``tensor_parallel_size``.
    """
    numbers = config.num_layers * config.num_heads * (config.dqk + config.dv) // ranks
    # With relative bias its time, twice, which every rank has.
    return numbers * number_bytes + (8 if config.relative_bias else 0)


def default_settings(schema: Schema, candidates: int = 1024) -> VLLMSettings:
    """Settings for the longest context of ``schema`` with ``candidates`` candidates in one call."""
    longest = schema.max_context + candidates
    return VLLMSettings(max_model_len=longest, max_num_batched_tokens=max(longest, 8192))


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
