"""The whole way of a request in one process: for notebooks and debugging, without a server.

Features, routing, and engines are the very code that the Triton models call; only the transport differs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy.typing as npt
import torch

from mtgr.bundle import load_bundle
from mtgr.client.types import History, Integers, Recommendation, RecommendationRequest
from mtgr.door import LocalDoor
from mtgr.engines.baseline import BaselineEngine
from mtgr.engines.onnx import OnnxEngine
from mtgr.engines.vllm_service import Call, ServiceConfig, VLLMService
from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.manifest import latest_version
from mtgr.routing.policy import Policy
from mtgr.routing.readiness import artifact_problem

Optimization = Literal["auto", "baseline", "onnx", "tensorrt", "vllm"]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class PipelineConfig:
    """Where models come from and how they run.

    Attributes:
        model_repository: A repository that ``make export`` filled.
        threads: Threads of PyTorch, of ONNX Runtime, and of vLLM on a CPU.
        policy: Settings of the router; the profile ``prod`` by default.
    """

    model_repository: Path | str = "model_repository"
    threads: int = 1
    policy: Policy | None = None


class OptimizedInferencePipeline:
    """Recommends and ranks in process.

    Not thread-safe, and not to be called inside a running event loop's thread without ``asyncio.to_thread``. Engines
    are loaded when first asked for. vLLM, which takes ten seconds to start and processes of its own, is started only by
    a request that names it; from then on ``auto`` counts with it, until ``close``.

    Args:
        config: Settings.

    Raises:
        ConfigurationError: If no checkpoint is installed in the model repository.
    """

    def __init__(self, config: PipelineConfig | None = None) -> None:
        self.config = config or PipelineConfig()
        torch.set_num_threads(self.config.threads)
        repository = Path(self.config.model_repository)
        bundle = load_bundle(repository)
        self._engines = _LocalEngines(repository, bundle.schema.hash, self.config.threads)
        self._door = LocalDoor(bundle, self._engines, self.config.policy)

    def __enter__(self) -> OptimizedInferencePipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End vLLM's processes, if they were started, and close the feature store."""
        self._engines.close()
        self._door.close()

    def infer_recommendations(
        self,
        user_id: str,
        *,
        candidates: Integers | None = None,
        history: History | None = None,
        request_time: int | None = None,
        profile: Mapping[str, Any] | None = None,
        top_k: int | None = None,
        use_optimization: Optimization = "auto",
    ) -> Recommendation:
        """Rank ``candidates``, or recommend items if there are none; arguments as in the door's request.

        Args:
            user_id: The user.
            candidates: Raw item ids to rank; None retrieves items.
            history: Events instead of the feature store's.
            request_time: Unix seconds; None is now.
            profile: Profile values that override the store's.
            top_k: Items to return.
            use_optimization: The strategy; ``auto`` takes the one that was quickest of late.

        Raises:
            InvalidRequestError: If the request is wrong.
            UnavailableError: If the strategy cannot serve.
        """
        request = RecommendationRequest(
            user_id, history, candidates, request_time, profile, strategy=use_optimization, top_k=top_k
        )
        if use_optimization == "vllm":
            self._engines.start_vllm()
        return asyncio.run(self._door.answer(request))


class _LocalEngines:
    """Engines of a model repository, loaded when first needed."""

    def __init__(self, model_repository: Path, schema_hash: str, threads: int) -> None:
        self._repository = model_repository
        self._schema_hash = schema_hash
        self._threads = threads
        self._engines: dict[str, BaselineEngine | OnnxEngine] = {}
        self._vllm: VLLMService | None = None

    def unready_reason(self, model: str) -> str | None:
        problem = artifact_problem(self._repository, model, self._schema_hash)
        if problem is None and model.startswith("mtgr_tensorrt"):
            return f"{model} runs inside Triton only; start a server"
        if problem is None and model == "mtgr_vllm":
            return "it is not started before it is asked for by name" if self._vllm is None else self._vllm.failure
        return problem

    def start_vllm(self) -> None:
        """Start vLLM, unless it runs or is not exported, which the router will say.

        Raises:
            UnavailableError: If it does not start.
        """
        if self._vllm is not None or artifact_problem(self._repository, "mtgr_vllm", self._schema_hash) is not None:
            return
        version = latest_version(self._repository / "mtgr_vllm")
        assert version is not None
        try:
            self._vllm = VLLMService(version, ServiceConfig(self._threads))
        except ConfigurationError as error:
            raise UnavailableError(f"strategy vllm: {error}") from error

    def close(self) -> None:
        service, self._vllm = self._vllm, None
        if service is not None:
            service.close()

    async def infer(self, model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        if model == "mtgr_vllm":
            answer = await self._ask_vllm(inputs)
        else:
            engine = self._engine(model)
            answer = engine.infer(inputs, outputs) if isinstance(engine, OnnxEngine) else engine.infer(inputs)
        return {name: answer[name] for name in outputs}

    async def _ask_vllm(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        if self._vllm is None:
            raise UnavailableError("vLLM was closed")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Arrays | Exception] = loop.create_future()
        self._vllm.submit(Call(inputs, lambda result: loop.call_soon_threadsafe(answer.set_result, result)))
        result = await answer
        if isinstance(result, Exception):
            raise result
        return result

    def _engine(self, model: str) -> BaselineEngine | OnnxEngine:
        if model not in self._engines:
            version = latest_version(self._repository / model)
            if version is None:
                raise UnavailableError(f"{model} is not installed")
            try:
                self._engines[model] = (
                    BaselineEngine(version)
                    if model == "mtgr_baseline"
                    else OnnxEngine(version / "model.onnx", self._threads)
                )
            except ConfigurationError as error:
                raise UnavailableError(str(error)) from error
        return self._engines[model]
