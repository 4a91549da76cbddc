"""Check an exported engine of vLLM against PyTorch.

vLLM runs in a process of its own (``python -m export.vllm_check``): it changes its process's environment, logs, and
signal handlers, and what it starts ends with it. Requests and answers travel as files of arrays.
"""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from export.fp8 import fp8_in_pytorch
from export.rows import random_rows
from mtgr.checkpoint import Checkpoint
from mtgr.engines.vllm_rows import Float32Array, Int32Array, VLLMRowEngine
from mtgr.engines.vllm_settings import SETTINGS_FILE, VLLMSettings
from mtgr.errors import ConfigurationError, MTGRError
from mtgr.model import MTGR
from mtgr.schema import FIRST_ID

MODEL = "mtgr_vllm"
TOLERANCE = 1e-5  # absolute, on probabilities and cosine similarities: another path in fp32

# Context and candidates of the requests that every export is checked on, without and with a cached context.
SHAPES = ((1, 1), (7, 3), (64, 16), (130, 5), (200, 64), (512, 256))

_Request = tuple[Int32Array, Int32Array]  # context and candidates

_REQUESTS = "requests.npz"
_ANSWERS = "answers.npz"
_FAILURE = "failure.txt"
_ROOT = Path(__file__).resolve().parent.parent
_TIMEOUT = 1800  # seconds; a hung engine must not hang the export for ever
_LOG_CHARS = 30_000  # the cause comes first, and its consequences' tracebacks after it
_REMEDY = "leave this check out with --skip-vllm-check, or export other engines with --engine."


def check_engine(checkpoint: Checkpoint, version: Path, settings: VLLMSettings, seed: int) -> float:
    """Largest absolute error over ``SHAPES``, of an engine in fp32 with a small cache.

    What is quantised may miss the reference by twice what PyTorch misses it by when it rounds alike.

    Args:
        checkpoint: The reference.
        version: Version directory with what the engine loads.
        settings: Its engine arguments; all but precision and memory are checked as they are.
        seed: Of the rows.

    Raises:
        ConfigurationError: If the engine does not start, an answer misses the tolerance, or a repeated request does
            not find its context in the cache.
    """
    requests = _requests(checkpoint, seed)
    tolerance = TOLERANCE
    if settings.quantization is not None:
        tolerance = max(TOLERANCE, 2 * _rounding_error(checkpoint.model, requests))
    with tempfile.TemporaryDirectory() as directory:
        trial = Path(directory)
        (trial / settings.model).symlink_to((version / settings.model).resolve(), target_is_directory=True)
        _small(settings).save(trial / SETTINGS_FILE)
        np.savez(trial / _REQUESTS, **_named(requests))
        _run(trial)
        with np.load(trial / _ANSWERS) as answers:
            return max(
                _error(checkpoint, request, _Answer.load(answers, index), settings.block_size, tolerance)
                for index, request in enumerate(requests)
            )


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What the engine says to one request.

    Attributes:
        first: FP32 [k, T], task scores.
        again: FP32 [k, T], those of the same request repeated.
        items: INT32 [m], what is retrieved.
        logits: FP32 [m], beside the items.
        cached: INT64 [1], context tokens that the repeated request found in the cache.
    """

    first: Float32Array
    again: Float32Array
    items: Int32Array
    logits: Float32Array
    cached: npt.NDArray[np.int64]

    @classmethod
    def load(cls, archive: np.lib.npyio.NpzFile, index: int) -> _Answer:
        return cls(**{field.name: archive[f"{field.name}_{index}"] for field in dataclasses.fields(cls)})


def _requests(checkpoint: Checkpoint, seed: int) -> list[_Request]:
    generator = np.random.default_rng(seed)
    requests = []
    for length, count in SHAPES:
        tokens = min(length, checkpoint.schema.max_context)
        context, candidates = random_rows(checkpoint.schema, checkpoint.catalog, 1, tokens, count, generator)
        requests.append((context[0].numpy(), candidates[0].numpy()))
    return requests


def _named(requests: list[_Request]) -> dict[str, Int32Array]:
    return {
        f"{name}_{index}": rows
        for index, request in enumerate(requests)
        for name, rows in zip(("context", "candidates"), request, strict=True)
    }


def _small(settings: VLLMSettings) -> VLLMSettings:
    """Exact arithmetic, and memory for two requests: a server may run beside the export."""
    pages = 2 * settings.max_pages
    return dataclasses.replace(
        settings,
        dtype="float32",
        num_gpu_blocks_override=pages,
        # The number of pages decides; this keeps vLLM from claiming a part of the GPU first.
        kv_cache_memory_bytes=1 << 20,
        gpu_memory_utilization=0.01,
    )


def _run(trial: Path) -> None:
    command = [sys.executable, "-m", "export.vllm_check", str(trial), str(torch.get_num_threads())]
    try:
        done = subprocess.run(
            command,
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError(f"{MODEL}: vLLM did not answer within {_TIMEOUT} s; {_REMEDY}") from error
    if done.returncode == 0:
        return
    print(f"\n{done.stdout[-_LOG_CHARS:]}", file=sys.stderr)
    failure = trial / _FAILURE
    reason = failure.read_text(encoding="utf-8") if failure.exists() else f"it ended with code {done.returncode}"
    raise ConfigurationError(f"{MODEL} was not installed, as vLLM failed, see above ({reason}); {_REMEDY}")


def _error(checkpoint: Checkpoint, request: _Request, answer: _Answer, block_size: int, tolerance: float) -> float:
    """Largest difference of task scores, and of the similarities of what is retrieved."""
    context, candidates = request
    shape = f"{len(context)} x {len(candidates)} tokens"
    scores, similarities, best = _reference(checkpoint.model, request)
    errors = {
        "cold": _difference(answer.first, scores),
        "cached": _difference(answer.again, scores),
        "retrieved": max(
            # Items of almost equal score may change places; the similarity of what stands at a place may not differ.
            _difference(_found(similarities, answer.items), best),
            _difference(answer.logits * checkpoint.config.temperature, best),
        ),
    }
    for name, error in errors.items():
        if not error <= tolerance:
            raise ConfigurationError(
                f"{MODEL} differs from PyTorch by {error:.1e} at {shape} ({name}), more than {tolerance:.0e}; "
                "it was not installed."
            )
    if answer.cached[0] < len(context) // block_size * block_size:
        raise ConfigurationError(
            f"{MODEL} found {answer.cached[0]} of {len(context)} context tokens in its cache when a request of {shape} "
            "was repeated; it was not installed."
        )
    return max(errors.values())


def _rounding_error(model: MTGR, requests: list[_Request]) -> float:
    """Largest difference that FP8 makes in PyTorch, of task scores and of similarities."""
    twin = fp8_in_pytorch(model)
    return max(
        float(np.abs(rounded - exact).max(initial=0.0))
        for request in requests
        for rounded, exact in zip(_reference(twin, request), _reference(model, request), strict=True)
    )


def _reference(model: MTGR, request: _Request) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Task scores, FP32 [k, T]; similarities of all items but the reserved, FP32 [I - 2], and the best of them."""
    rows, targets = (torch.from_numpy(part)[None] for part in request)
    with torch.inference_mode():
        return (
            model(rows, targets)[0].numpy(),
            model.next_item_logits(rows)[0].numpy() * model.config.temperature,
            model.retrieve(rows)[1][0].numpy() * model.config.temperature,
        )


def _found(similarities: Float32Array, items: Int32Array) -> Float32Array:
    """Similarities of the items at their places; NaN if they are not distinct items of the catalogue."""
    places = items.astype(np.int64) - FIRST_ID
    if len(np.unique(places)) != len(places) or (places < 0).any() or (places >= len(similarities)).any():
        return np.full(len(items), np.nan, dtype=np.float32)
    found: Float32Array = similarities[places]
    return found


def _difference(found: Float32Array, expected: Float32Array) -> float:
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max(initial=0.0))


async def answer_requests(trial: Path, threads: int) -> None:
    """Start the engine of a directory and write its answers beside the requests."""
    engine = await VLLMRowEngine.start(trial, threads)
    answers: dict[str, npt.NDArray[Any]] = {}
    try:
        with np.load(trial / _REQUESTS) as requests:
            for index in range(len(requests.files) // 2):
                context, candidates = requests[f"context_{index}"], requests[f"candidates_{index}"]
                # Ranking and retrieval cache a context for each other: now the one comes first, now the other.
                retrieved = await engine.retrieve(context) if index % 2 else None
                first = await engine.rank(context, candidates)
                before = engine.statistics().context_tokens_cached
                again = await engine.rank(context, candidates)
                cached = engine.statistics().context_tokens_cached - before
                items, logits = retrieved or await engine.retrieve(context)
                answer = _Answer(first, again, items, logits, np.array([cached]))
                answers |= {f"{name}_{index}": value for name, value in vars(answer).items()}
    finally:
        engine.shutdown()
    np.savez(trial / _ANSWERS, **answers)


def main(arguments: list[str]) -> int:
    """``python -m export.vllm_check DIRECTORY THREADS``; 2 with a sentence in a file if vLLM failed."""
    trial = Path(arguments[0])
    try:
        asyncio.run(answer_requests(trial, int(arguments[1])))
    except MTGRError as error:
        (trial / _FAILURE).write_text(" ".join(str(error).split()), encoding="utf-8")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
