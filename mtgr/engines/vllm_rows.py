"""The ``vllm`` engine: rows in, scores out, through one engine of vLLM's."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mtgr.config import ModelConfig
from mtgr.engines.row_reader import RowReader
from mtgr.engines.vllm_arguments import engine_arguments, prepare_environment
from mtgr.engines.vllm_prompt import Context, Prompt
from mtgr.engines.vllm_runner import Answer, ProcessRunner, Recorder, Runner, ThreadRunner
from mtgr.engines.vllm_settings import SETTINGS_FILE, VLLMSettings
from mtgr.errors import ConfigurationError, InvalidRequestError, MTGRError, UnavailableError
from mtgr.files import read_json
from mtgr.schema import FIRST_ID, SLOT_COLUMN, TYPE_COLUMN, Schema, TokenType
from mtgr.vllm_plugin import register
from mtgr.vllm_plugin.orphans import mark_children
from mtgr.vllm_plugin.parallel import check_ranks

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
UInt8Array = npt.NDArray[np.uint8]
Done = Callable[[Float32Array | Exception], object]


@dataclass(frozen=True)
class EngineStatistics:
    """Counters since the engine's start, and gauges.

    Attributes:
        requests: Requests answered; one of many candidates may count several times.
        aborted: Requests whose caller gave up.
        failed: Requests without an answer for another reason.
        context_tokens: Context tokens of answered requests.
        context_tokens_cached: Those whose keys and values were in the cache.
        candidate_tokens: Candidates of answered requests.
        running: Requests in a step right now.
        waiting: Requests that wait for a step.
        kv_usage: Part of the cache's pages that requests in flight hold, 0 to 1.
        preemptions: Requests put back for want of pages.
        queue_seconds: Time from arrival to being scheduled, summed over requests.
    """

    requests: int = 0
    aborted: int = 0
    failed: int = 0
    context_tokens: int = 0
    context_tokens_cached: int = 0
    candidate_tokens: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    preemptions: int = 0
    queue_seconds: float = 0.0


class VLLMRowEngine:
    """Ranks and retrieves rows; made by ``start``, and used in the event loop that it was started in, or by ``submit``.

    Requests run side by side, each answered when it is done. One that is cancelled is taken out of the engine.
    """

    def __init__(
        self,
        runner: Runner,
        recorder: Recorder,
        settings: VLLMSettings,
        config: ModelConfig,
        schema: Schema,
        version: str,
    ) -> None:
        self.schema = schema
        self.retrieve_count = min(config.retrieve_count, schema.num_items - FIRST_ID)
        self.max_candidates = max(1, settings.max_model_len - schema.max_context)
        self._runner = runner
        self._recorder = recorder
        self._max_tokens = settings.max_model_len
        self._most_tokens = min(settings.max_model_len, config.max_positions)
        self._dtype = runner.dtype
        self._reader = RowReader(schema, config.max_positions, config.static_attention)
        self._identity = hashlib.sha256(f"{version} {schema.hash}".encode())
        self._counters: dict[str, Any] = {}
        self._counting = threading.Lock()

    @classmethod
    async def start(
        cls, version_directory: Path, threads: int = 1, more: Mapping[str, Any] | None = None
    ) -> VLLMRowEngine:
        """Start the engine of a model's version directory, which holds ``model.json``.

        Args:
            version_directory: Where the model is.
            threads: Threads of its processes within an operator, where they compute on a CPU.
            more: Arguments of vLLM beyond those that ``model.json`` has, such as a profiler's.

        Raises:
            ConfigurationError: If vLLM is missing or of an untested version, or the engine does not start.
        """
        settings = VLLMSettings.load(version_directory / "model.json")
        folder = version_directory / settings.model
        values = read_json(folder / "config.json")
        try:
            described = values["mtgr"]
            config = ModelConfig.from_dict(described["model"])
            schema = Schema.from_dict(described["schema"])
            version = str(described["model_version"])
        except (KeyError, TypeError) as error:
            raise ConfigurationError(f"{folder / 'config.json'} is not a model of MTGR; run `make export`.") from error
        check_ranks(settings.tensor_parallel_size, config, SETTINGS_FILE)
        prepare_environment(threads)
        mark_children()
        register()
        arguments = engine_arguments(settings, folder, more or {})
        recorder = Recorder()

        def make() -> Runner:
            if settings.in_process:
                return ThreadRunner(arguments, recorder, threads)
            return ProcessRunner(arguments, recorder)

        try:
            # In a thread: it takes ten seconds, and the loop has requests to refuse meanwhile.
            runner = await asyncio.to_thread(make)
        except MTGRError:
            raise
        except Exception as error:  # vLLM has no base class of its errors; whatever it is, the engine is not there
            raise ConfigurationError(f"vLLM did not start: {error}") from error
        return cls(runner, recorder, settings, config, schema, version)

    @classmethod
    async def start_warm(
        cls, version_directory: Path, threads: int = 1, more: Mapping[str, Any] | None = None
    ) -> VLLMRowEngine:
        """``start`` and ``warm_up``; an engine that cannot be warmed up is ended.

        Raises:
            ConfigurationError: As ``start``.
            UnavailableError: If it does not answer.
        """
        engine = await cls.start(version_directory, threads, more)
        try:
            await engine.warm_up()
        except BaseException:
            await asyncio.to_thread(engine.shutdown)
            raise
        return engine

    async def rank(self, context: Int32Array, candidates: Int32Array, timeout: float | None = None) -> Float32Array:
        """Score candidates.

        Args:
            context: INT32 [n, W]; padding at its end is ignored.
            candidates: INT32 [k, W], any number.
            timeout: Seconds; None waits.

        Returns:
            FP32 [k, T], probabilities; NaN for padding among the candidates.

        Raises:
            InvalidRequestError: If rows are malformed.
            UnavailableError: If the engine is dead or does not answer in time.
        """
        known, parts = self._ranked(context, candidates)
        async with _limit(timeout):
            # The first part caches the context, and the others find it there.
            scored = [await self._run(known.prompt(part)) for part in parts[:1]]
            scored += await gather_all([self._run(known.prompt(part)) for part in parts[1:]])
        return self._scores(scored, len(candidates))

    def submit(self, context: Int32Array, candidates: Int32Array, done: Done) -> Callable[[], None] | None:
        """``rank`` for threads, where no event loop takes a share of the time.

        Args:
            context: INT32 [n, W], as of ``rank``; not read any more once this returns.
            candidates: INT32 [k, W], likewise.
            done: Called once with FP32 [k, T], or with the error, from any thread.

        Returns:
            What takes the request out of the engine, though ``done`` may be called once more until it is out; None
            where the request has to go through ``rank``: the engine is a process of its own, or there are more
            candidates than a step computes.

        Raises:
            InvalidRequestError: If rows are malformed.
        """
        if not isinstance(self._runner, ThreadRunner):
            return None
        known, parts = self._ranked(context, candidates)
        if len(parts) != 1:
            return None
        prompt = known.prompt(parts[0])

        count = len(candidates)

        def settle(answer: Answer | Exception) -> None:
            found: Float32Array | Exception
            try:
                found = self._scores([self._checked(prompt, answer)], count)
            except UnavailableError as error:
                found = error
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets it
                found = UnavailableError(f"vLLM failed: {error}")
            done(found)

        abort = self._runner.submit(prompt.embeds, prompt.params, prompt.salt, settle)

        def give_up() -> None:
            abort()
            self._count(aborted=1)

        return give_up

    async def retrieve(self, context: Int32Array, timeout: float | None = None) -> tuple[Int32Array, Float32Array]:
        """The items most likely to come next.

        Args:
            context: INT32 [n, W]; padding at its end is ignored.
            timeout: Seconds; None waits.

        Returns:
            INT32 [m] internal item ids, best first, and FP32 [m] logits.

        Raises:
            InvalidRequestError: If rows are malformed.
            UnavailableError: If the engine is dead or does not answer in time.
        """
        known = self._context(context)
        async with _limit(timeout):
            found = await self._run(known.prompt())
        return found[:, 0].to(torch.int32).numpy(), found[:, 1].float().numpy()

    async def warm_up(self) -> None:
        """Run requests of several sizes, so that the first real one finds everything compiled and allocated."""
        longest = min(self.schema.max_context, self._max_tokens - 1)
        for tokens, candidates in ((1, 1), (min(64, longest), 16), (longest, self.max_candidates)):
            context = np.zeros((tokens, self.schema.width), dtype=np.int32)
            context[:, TYPE_COLUMN] = TokenType.HISTORY
            context[tokens // 2 + 1 :, TYPE_COLUMN] = TokenType.REALTIME
            context[:, SLOT_COLUMN] = np.arange(tokens)
            rows = np.zeros((candidates, self.schema.width), dtype=np.int32)
            rows[:, TYPE_COLUMN] = TokenType.CANDIDATE
            for _ in range(2):  # the second finds its context in the cache
                await self.rank(context, rows)
            await self.retrieve(context)

    @property
    def failure(self) -> str | None:
        """Why the engine cannot answer any more; None while it can."""
        return "vLLM's engine has ended; the log says why." if self._runner.errored else None

    def statistics(self) -> EngineStatistics:
        """What the engine did so far."""
        return EngineStatistics(**self._counters, **self._recorder.values())

    async def profile(self, run: bool) -> None:
        """Start or stop the profiler that ``start`` was given in ``more``."""
        await self._runner.profile(run)

    def shutdown(self) -> None:
        """End the engine, which takes seconds; requests in flight fail. From any thread."""
        self._runner.shutdown()

    def _context(self, rows: Int32Array) -> Context:
        packed, static = self._reader.context(rows)
        if len(packed) > self._max_tokens:
            raise InvalidRequestError(f"context has {len(packed)} tokens; the engine takes {self._max_tokens}.")
        # A static token's keys depend on all of U and S: blocks are shared only by requests that agree on them.
        salt = self._identity.copy()
        salt.update(static.to_bytes(4, "little"))
        salt.update(packed[:static].data)
        return Context(packed, static, salt.hexdigest(), self._dtype)

    def _ranked(self, context: Int32Array, candidates: Int32Array) -> tuple[Context, list[UInt8Array]]:
        """The context, and the candidates' bytes without padding in as many parts as steps are needed."""
        known = self._context(context)
        tokens = len(known.packed)
        packed = self._reader.candidates(candidates, tokens)
        # A candidate takes a token's place, and stands at the position after the context's last.
        if len(packed) and tokens >= self._most_tokens:
            raise InvalidRequestError(
                f"context has {tokens} tokens; with candidates the engine takes {self._most_tokens - 1}."
            )
        step = max(1, self._max_tokens - tokens)
        return known, [packed[start : start + step] for start in range(0, len(packed), step)]

    def _scores(self, parts: list[torch.Tensor], count: int) -> Float32Array:
        """FP32 [count, T] of the parts' scores, FP32 [k, T], and NaN after them."""
        if not parts:
            return np.full((count, len(self.schema.tasks)), np.nan, dtype=np.float32)
        answer = np.concatenate([part.numpy() for part in parts])
        missing = count - len(answer)
        return np.pad(answer, ((0, missing), (0, 0)), constant_values=np.nan) if missing else answer

    async def _run(self, prompt: Prompt) -> torch.Tensor:
        """One request of vLLM: FP32 [k, T], or FP64 [m, 2] without candidates."""
        answer: Answer | Exception
        try:
            answer = await self._runner.run(prompt.embeds, prompt.params, prompt.salt)
        except asyncio.CancelledError:
            self._count(aborted=1)
            raise
        except Exception as error:  # noqa: BLE001 - vLLM's errors share no base class
            answer = error
        return self._checked(prompt, answer)

    def _checked(self, prompt: Prompt, answer: Answer | Exception) -> torch.Tensor:
        """An answer's numbers, counted."""
        if isinstance(answer, Exception):
            self._count(failed=1)
            raise UnavailableError(self.failure or f"vLLM failed: {answer}") from answer
        if answer.data is None:  # as of pages that could not be loaded
            self._count(failed=1)
            raise UnavailableError("vLLM ended the request without an answer")
        if not np.isfinite(answer.data.numpy()).all():  # for so few numbers quicker than PyTorch
            self._count(failed=1)
            raise UnavailableError("vLLM returned scores that are not finite numbers")
        self._count(
            requests=1,
            context_tokens=prompt.context_tokens,
            context_tokens_cached=answer.cached,
            candidate_tokens=len(prompt.embeds) - prompt.context_tokens,
        )
        return answer.data

    def _count(self, **amounts: int) -> None:
        with self._counting:  # the engine's thread and others
            for name, amount in amounts.items():
                self._counters[name] = self._counters.get(name, 0) + amount


class _limit:  # noqa: N801 - used as a statement
    """A time limit whose end is an UnavailableError."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(seconds)
        self._start = time.monotonic()

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._timeout.__aexit__(*error)
        except TimeoutError as late:
            raise UnavailableError(f"vLLM did not answer within {self._seconds:g} s") from late


async def gather_all(calls: list[Any]) -> list[Any]:
    """Run all; the first failure cancels the rest."""
    if len(calls) == 1:
        return [await calls[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]
