"""The whole way of a request in one process: for notebooks and debugging, without a server.

Features, routing, and engines are the very code that the Triton models call; only the transport differs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
import torch

from mtgr.bundle import load_bundle
from mtgr.client.types import History, Integers, Recommendation, RecommendationRequest
from mtgr.client.wire import encode
from mtgr.engines.baseline import BaselineEngine
from mtgr.engines.onnx import OnnxEngine
from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.features.extract import FeatureExtractor
from mtgr.features.settings import feature_settings
from mtgr.manifest import latest_version
from mtgr.routing.readiness import artifact_problem
from mtgr.routing.router import Router, RoutingConfig
from mtgr.routing.settings import load_routing_config

Optimization = Literal["auto", "baseline", "onnx", "tensorrt", "vllm"]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class PipelineConfig:
    """Where models come from and how they run.

    Attributes:
        model_repository: A repository that ``make export`` filled.
        threads: Threads of PyTorch and of ONNX Runtime.
        routing: Settings of the router; the repository's own by default.
    """

    model_repository: Path | str = "model_repository"
    threads: int = 1
    routing: RoutingConfig | None = None


class OptimizedInferencePipeline:
    """Recommends and ranks in process.

    Not thread-safe, and not to be called inside a running event loop's thread without ``asyncio.to_thread``.

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
        self._extractor = FeatureExtractor(bundle.schema, bundle.catalog, bundle.open_store(feature_settings()))
        engines = _LocalEngines(repository, bundle.schema.hash, self.config.threads)
        routing = self.config.routing or load_routing_config(repository)
        self._router = Router(bundle.schema, bundle.catalog, engines, routing)

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
            use_optimization: The strategy; ``auto`` takes the first that is ready.

        Raises:
            InvalidRequestError: If the request is wrong.
            UnavailableError: If the strategy cannot serve.
        """
        start = time.perf_counter()
        request = RecommendationRequest(
            user_id, history, candidates, request_time, profile, strategy=use_optimization, top_k=top_k
        )
        features = self._extractor.extract({tensor.name: tensor.data for tensor in encode(request)})
        ranking = asyncio.run(self._router.route(features))
        return Recommendation(
            items=ranking.items,
            scores=ranking.scores,
            task_scores=ranking.task_scores,
            strategy=ranking.strategy,
            arm=ranking.arm,
            labels=ranking.labels,
            latency_ms=(time.perf_counter() - start) * 1e3,
        )


class _LocalEngines:
    """Engines of a model repository, loaded when first needed."""

    def __init__(self, model_repository: Path, schema_hash: str, threads: int) -> None:
        self._repository = model_repository
        self._schema_hash = schema_hash
        self._threads = threads
        self._engines: dict[str, BaselineEngine | OnnxEngine] = {}

    def unready_reason(self, model: str) -> str | None:
        problem = artifact_problem(self._repository, model, self._schema_hash)
        if problem is None and model.startswith(("mtgr_tensorrt", "mtgr_vllm")):
            return f"{model} runs inside Triton only; start a server"
        return problem

    async def infer(self, model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        engine = self._engine(model)
        answer = engine.infer(inputs, outputs) if isinstance(engine, OnnxEngine) else engine.infer(inputs)
        return {name: answer[name] for name in outputs}

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
