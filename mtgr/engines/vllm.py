"""The ``vllm`` strategy in Python, without Triton: one engine for any number of coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.bundle import load_bundle
from mtgr.client.types import History, Integers, Recommendation, RecommendationRequest
from mtgr.door import LocalDoor
from mtgr.engines.vllm_rows import EngineStatistics, VLLMRowEngine
from mtgr.errors import InvalidRequestError, UnavailableError
from mtgr.manifest import latest_version
from mtgr.routing.policy import Policy
from mtgr.routing.readiness import artifact_problem

MODEL = "mtgr_vllm"
Arrays = dict[str, npt.NDArray[Any]]
Behaviors = History | Sequence[Sequence[int]] | Sequence[Mapping[str, int]]


@dataclass(frozen=True)
class VLLMEngineConfig:
    """Where the model comes from and how it runs.

    Attributes:
        model_repository: A repository into which ``make vllm export`` put ``mtgr_vllm``.
        threads: Threads of the engine on a CPU.
        timeout: Seconds for one call of the engine.
        policy: Settings of the router; the profile ``prod`` by default.
    """

    model_repository: Path | str = "model_repository"
    threads: int = 1
    timeout: float = 8.0
    policy: Policy | None = None


class VLLMEngine:
    """Recommends and ranks; features and ranking are those of the door, the engine is vLLM alone.

    It starts with ``start``, or ``async with``, or the first request, and belongs to the event loop of that moment.

    Args:
        config: Settings.

    Raises:
        ConfigurationError: If no checkpoint is installed in the model repository.
    """

    def __init__(self, config: VLLMEngineConfig | None = None) -> None:
        self.config = config or VLLMEngineConfig()
        self._repository = Path(self.config.model_repository)
        self._engines = _RowEngines(self.config.timeout)
        bundle = load_bundle(self._repository)
        self._schema_hash = bundle.schema.hash
        self._door = LocalDoor(bundle, self._engines, self.config.policy)
        self._changing = asyncio.Lock()
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the engine, which takes some ten seconds; does nothing if it runs.

        Raises:
            UnavailableError: If the model is not exported, or of another schema.
            ConfigurationError: If vLLM is missing, of an untested version, or does not start.
        """
        if self._engines.engine is not None:
            return
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        # A caller that gives up does not end it: vLLM's start cannot be ended, and a second one beside it finds the
        # GPU's memory taken.
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        try:
            async with self._changing:
                problem = artifact_problem(self._repository, MODEL, self._schema_hash)
                version = latest_version(self._repository / MODEL)
                if problem is not None or version is None:
                    raise UnavailableError(f"{problem}.")
                self._engines.engine = await VLLMRowEngine.start_warm(version, self.config.threads)
        finally:
            self._starting = None

    async def generate_recommendations(
        self,
        user_id: str,
        user_behaviors: Behaviors | None = None,
        num_recommendations: int = 5,
        *,
        candidates: Integers | None = None,
        request_time: int | None = None,
        profile: Mapping[str, Any] | None = None,
    ) -> Recommendation:
        """Recommend items to a user, or rank candidates; concurrent calls share the engine's steps.

        Args:
            user_id: The user.
            user_behaviors: Events to use instead of the feature store's: columns (``History``), or one
                ``(item, action, time)`` or mapping with these keys for each.
            num_recommendations: Most items to return.
            candidates: Raw item ids to rank; None retrieves items.
            request_time: Unix seconds; None is now.
            profile: Profile values that override the store's.

        Raises:
            InvalidRequestError: If the request is wrong.
            UnavailableError: If the engine is not exported, has ended, or does not answer in time.
            ConfigurationError: If the engine does not start.
        """
        history = as_history(user_behaviors)
        await self.start()
        return await self._door.answer(
            RecommendationRequest(
                user_id, history, candidates, request_time, profile, strategy="vllm", top_k=num_recommendations
            )
        )

    def statistics(self) -> EngineStatistics:
        """What the engine did so far."""
        return EngineStatistics() if self._engines.engine is None else self._engines.engine.statistics()

    async def close(self) -> None:
        """End the engine, one that is being started once it is up; a later request would start it again."""
        if self._starting is not None:
            await asyncio.wait((self._starting,))
        async with self._changing:
            engine, self._engines.engine = self._engines.engine, None
            if engine is not None:
                await asyncio.to_thread(engine.shutdown)

    async def __aenter__(self) -> VLLMEngine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def as_history(behaviors: Behaviors | None) -> History | None:
    """Events in columns.

    Raises:
        InvalidRequestError: If an event has not its three parts.
    """
    if behaviors is None or isinstance(behaviors, History):
        return behaviors
    rows = []
    for index, event in enumerate(behaviors):
        parts = [event.get(name) for name in ("item", "action", "time")] if isinstance(event, Mapping) else event
        parts = list(parts) if isinstance(parts, Iterable) else []
        if len(parts) != 3 or not all(isinstance(part, int | np.integer) for part in parts):
            raise InvalidRequestError(
                f"user_behaviors[{index}] is {event!r}; it must be an item, an action and a time."
            )
        rows.append(parts)
    # Numbers as they came, of any size: what does not fit is refused with the request, not cut off here.
    items, actions, times = zip(*rows, strict=True) if rows else ((), (), ())
    return History(items, actions, times)


class _RowEngines:
    """One row engine under the name of its Triton model."""

    def __init__(self, timeout: float) -> None:
        self.engine: VLLMRowEngine | None = None
        self._timeout = timeout

    def unready_reason(self, model: str) -> str | None:
        """None while the engine can answer."""
        if model != MODEL:
            return f"{model} is not part of this engine"
        return "the engine is closed" if self.engine is None else self.engine.failure

    async def infer(self, model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """Answer one request, tensors with a leading dimension of 1."""
        engine = self.engine
        if engine is None:
            raise UnavailableError("the engine is closed")
        context = inputs["context"][0]
        if "candidates" in inputs:
            return {"task_scores": (await engine.rank(context, inputs["candidates"][0], self._timeout))[None]}
        items, scores = await engine.retrieve(context, self._timeout)
        return {"items": items[None], "scores": scores[None]}
