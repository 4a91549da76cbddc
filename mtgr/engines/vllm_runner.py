"""What runs vLLM's engine: a process of its own, or a thread of this one."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mtgr.errors import UnavailableError

# Before the engine clears up what finished requests leave behind, which holds the interpreter's lock: once the answer
# is sent, and before the next request of the same caller can be here.
_REST_SECONDS = 0.001


@dataclass(frozen=True)
class Answer:
    """What the engine says to a request.

    Attributes:
        data: What the model's pooler made of the request; None if the engine ended it before.
        cached: Tokens of it whose keys and values were in the cache.
    """

    data: Tensor | None
    cached: int


Done = Callable[[Answer | Exception], object]


class Runner(Protocol):
    """A running engine, used in the event loop that it was started in."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the rows that it takes."""

    @property
    def errored(self) -> bool:
        """Whether it has ended by an error."""

    async def run(self, embeds: Tensor, params: Any, salt: str) -> Answer:
        """Answer a request; one that is cancelled is taken out of the engine."""

    async def profile(self, run: bool) -> None:
        """Start or stop the profiler that the engine was configured with."""

    def shutdown(self) -> None:
        """End the engine; requests in flight fail. From any thread."""


class Recorder:
    """Takes vLLM's statistics as they come."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def attach(self, vllm_config: Any, engine_index: int = 0) -> Recorder:
        """Be the logger that vLLM asks for."""
        return self

    def values(self) -> dict[str, Any]:
        """Values by the names of ``EngineStatistics``."""
        return dict(self._values)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Called by vLLM after every step."""
        if scheduler_stats is not None:
            self.schedule(scheduler_stats)
        if iteration_stats is not None:
            queued = sum(request.queued_time for request in iteration_stats.finished_requests)
            self.step(iteration_stats.num_preempted_reqs, queued)

    def schedule(self, stats: Any) -> None:
        """The scheduler's gauges."""
        self._values |= {
            "running": stats.num_running_reqs,
            "waiting": stats.num_waiting_reqs,
            "kv_usage": float(stats.kv_cache_usage),
        }

    def step(self, preemptions: int, queued: float) -> None:
        """Add requests put back, and seconds that the ones now done had waited."""
        values = self._values
        values["preemptions"] = values.get("preemptions", 0) + preemptions
        values["queue_seconds"] = values.get("queue_seconds", 0.0) + queued

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def log(self) -> None:
        """Nothing to write."""

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
        """The engine never sleeps."""


class ProcessRunner:
    """vLLM's own way, AsyncLLM: the engine in a process of its own.

    Args:
        arguments: AsyncEngineArgs.
        recorder: Takes statistics.
    """

    def __init__(self, arguments: Any, recorder: Recorder) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(arguments, stat_loggers=[recorder.attach])
        self._numbers = itertools.count()

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        dtype: torch.dtype = self._engine.model_config.dtype
        return dtype

    @property
    def errored(self) -> bool:
        """Whether the process has ended."""
        return bool(self._engine.errored)

    async def run(self, embeds: Tensor, params: Any, salt: str) -> Answer:
        """Answer a request."""
        from vllm.inputs import embeds_input

        # In the form that vLLM makes of a prompt: it is not handed to a thread that would make it.
        prompt: Any = embeds_input(embeds, cache_salt=salt)
        # There is one output: the engine computes a request in one step.
        outputs = [out async for out in self._engine.encode(prompt, params, request_id=str(next(self._numbers)))]
        return Answer(outputs[-1].outputs.data, int(outputs[-1].num_cached_tokens or 0))

    async def profile(self, run: bool) -> None:
        """Start or stop the profiler."""
        await (self._engine.start_profile() if run else self._engine.stop_profile())

    def shutdown(self) -> None:
        """End the process, which takes seconds."""
        listener = self._engine.output_handler
        if listener is not None:  # or it would report as an error that the processes ended
            listener.get_loop().call_soon_threadsafe(listener.cancel)
        self._engine.shutdown()


@dataclass(eq=False)
class _Request:
    """A request of the thread's: what to do, and what is called with the answer or the error."""

    core: Any
    done: Done
    queued: float = field(default_factory=time.monotonic)

    def tell(self, found: Answer | Exception) -> None:
        """Call it; whoever cannot be told must not end the engine for all others."""
        try:
            self.done(found)
        except Exception:
            logging.getLogger(__name__).exception("an answer of vLLM's engine found nobody")


class ThreadRunner:
    """The engine in a thread of this process: requests and answers are handed over, not sent.

    Args:
        arguments: AsyncEngineArgs.
        recorder: Takes statistics.
        threads: Threads within an operator on the CPU.
    """

    def __init__(self, arguments: Any, recorder: Recorder, threads: int) -> None:
        self._arguments, self._recorder, self._threads = arguments, recorder, threads
        self._numbers = itertools.count()
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._waiting: dict[str, _Request] = {}
        self._failed = False
        self._started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._core: Any = None
        self._thread = threading.Thread(target=self._live, name="vllm-engine", daemon=True)
        self._thread.start()
        problem = self._started.get()
        if problem is not None:
            self._thread.join()
            raise problem

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        dtype: torch.dtype = self._core.vllm_config.model_config.dtype
        return dtype

    @property
    def errored(self) -> bool:
        """Whether a step failed."""
        return self._failed

    async def run(self, embeds: Tensor, params: Any, salt: str) -> Answer:
        """Answer a request."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        abort = self.submit(embeds, params, salt, lambda found: loop.call_soon_threadsafe(_settle, answer, found))
        try:
            return await answer
        except asyncio.CancelledError:
            abort()
            raise

    def submit(self, embeds: Tensor, params: Any, salt: str, done: Done) -> Callable[[], None]:
        """Hand a request over, from any thread.

        Args:
            embeds: Float [n, width], rows in the precision of the model.
            params: PoolingParams.
            salt: Of the cache.
            done: Called once with the answer or the error, in the engine's thread, which waits for it; once the engine
                has ended, in whichever thread hands something over.

        Returns:
            What takes the request out of the engine again.
        """
        from vllm.v1.engine import EngineCoreRequest

        name = str(next(self._numbers))
        params.verify(self._core.vllm_config.model_config)
        request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=None,
            mm_features=None,
            sampling_params=None,
            pooling_params=params,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=salt,
            data_parallel_rank=None,
            prompt_embeds=embeds,
            external_req_id=name,
        )
        self._inbox.put(("add", _Request(request, done)))
        if self._failed:
            self._refuse_new("it was shut down")  # nobody looks into the inbox any more
        return lambda: self._inbox.put(("abort", name))

    async def profile(self, run: bool) -> None:
        """Start or stop the profiler."""
        done = asyncio.get_running_loop().create_future()
        self._inbox.put(("profile", (run, done)))
        await done

    def shutdown(self) -> None:
        """End the thread and give its memory back."""
        self._inbox.put(("stop", None))
        self._thread.join()

    def _live(self) -> None:
        """The thread: start, step while there is work, end."""
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.executor import Executor

        try:
            config = self._arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
            torch.set_num_threads(self._threads)
            self._core = EngineCore(config, Executor.get_class(config), not self._arguments.disable_log_stats)
        except BaseException as error:  # noqa: BLE001 - raised where the engine is started
            self._started.put(error)
            return
        self._started.put(None)
        reason: object = "it was shut down"
        try:
            while self._receive():
                self._step()
        except BaseException as error:
            logging.getLogger(__name__).exception("vLLM's engine has ended")
            reason = error
        finally:
            self._fail(reason)
            self._core.shutdown()
            gc.collect()

    def _receive(self) -> bool:
        """Take up what has come, waiting for it if there is nothing else to do; False at the end."""
        core = self._core
        while True:
            try:
                if core.scheduler.has_unfinished_requests() or core.batch_queue:
                    what, value = self._inbox.get_nowait()
                else:
                    # Those who were answered, or ask next, go before the step that only clears up.
                    what, value = self._inbox.get(timeout=_REST_SECONDS if core.scheduler.has_requests() else None)
            except queue.Empty:
                return True
            if what == "stop":
                return False
            if what == "add":
                self._add(value)
            elif what == "abort":
                self._waiting.pop(value, None)
                core.abort_requests([value])
            else:
                core.profile(value[0])
                value[1].get_loop().call_soon_threadsafe(value[1].set_result, None)

    def _add(self, value: _Request) -> None:
        self._waiting[value.core.request_id] = value  # first: whatever comes of it, it is told
        try:
            request, wave = self._core.preprocess_add_request(value.core)
            self._core.add_request(request, wave)
        except ValueError as error:  # what vLLM refuses is one request's fault
            self._waiting.pop(value.core.request_id, None)
            value.tell(error)

    def _step(self) -> None:
        core = self._core
        outputs, executed = core.step_fn()
        for made in (outputs or {}).values():
            if made.scheduler_stats is not None:
                self._recorder.schedule(made.scheduler_stats)
            self._deliver(made.outputs)
        core.post_step(executed)
        if not executed and core.scheduler.has_requests():
            time.sleep(0.001)  # something is on its way to the cache or from it, in threads that need the lock

    def _deliver(self, outputs: list[Any]) -> None:
        """Give the answers of a step to those who asked."""
        from vllm.v1.engine import EngineCoreEventType

        preempted, queued = 0, 0.0
        for output in outputs:
            events = output.events or ()
            preempted += sum(event.type is EngineCoreEventType.PREEMPTED for event in events)
            times = [event.timestamp for event in events if event.type is EngineCoreEventType.SCHEDULED]
            request = self._waiting.get(output.request_id)
            if request is None or output.finish_reason is None:
                continue
            del self._waiting[output.request_id]
            queued += times[0] - request.queued if times else 0.0
            stats = output.prefill_stats
            answer = Answer(output.pooling_output, 0 if stats is None else int(stats.num_cached_tokens))
            request.tell(answer)
        self._recorder.step(preempted, queued)

    def _fail(self, reason: object) -> None:
        """Tell everyone who waits, and those who come, that there will be no answer."""
        self._failed = True
        waiting = list(self._waiting.values())
        self._waiting.clear()
        for request in waiting:
            request.tell(_ended(reason))
        self._refuse_new(reason)

    def _refuse_new(self, reason: object) -> None:
        """Answer those in the inbox; by the engine's thread as it ends, and by whoever comes later."""
        while True:
            try:
                what, value = self._inbox.get_nowait()
            except queue.Empty:
                return
            if what == "add":
                value.tell(_ended(reason))


def _ended(reason: object) -> UnavailableError:
    return UnavailableError(f"vLLM's engine has ended: {reason}")


def _settle(future: asyncio.Future[Answer], found: Answer | Exception) -> None:
    if future.done():
        return
    if isinstance(found, Exception):
        future.set_exception(found)
    else:
        future.set_result(found)
