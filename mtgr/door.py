"""The door in process: request to features to engines to result, with the very code that the Triton models call."""

from __future__ import annotations

import time

from mtgr.bundle import Bundle
from mtgr.client.types import Recommendation, RecommendationRequest
from mtgr.client.wire import encode
from mtgr.features.extract import FeatureExtractor
from mtgr.features.settings import feature_settings
from mtgr.routing.policy import Policy
from mtgr.routing.router import Engines, Router


class LocalDoor:
    """Answers requests with the engines it is given; any number at a time in one event loop.

    Args:
        bundle: Of a repository that ``make export`` filled.
        engines: How to reach engines.
        policy: Settings of the router; the profile ``prod`` by default.

    Raises:
        ConfigurationError: If the feature store cannot be opened.
    """

    def __init__(self, bundle: Bundle, engines: Engines, policy: Policy | None = None) -> None:
        self._store = bundle.open_store(feature_settings())
        self._extractor = FeatureExtractor(bundle.schema, bundle.catalog, self._store)
        self._router = Router(bundle.schema, bundle.catalog, engines, policy)

    async def answer(self, request: RecommendationRequest) -> Recommendation:
        """Answer one request.

        Raises:
            InvalidRequestError: If the request is wrong.
            UnavailableError: If the strategy cannot serve.
        """
        start = time.perf_counter()
        features = self._extractor.extract({tensor.name: tensor.data for tensor in encode(request)})
        ranking = await self._router.route(features)
        return Recommendation(
            items=ranking.items,
            scores=ranking.scores,
            task_scores=ranking.task_scores,
            strategy=ranking.strategy,
            arm=ranking.arm,
            labels=ranking.labels,
            latency_ms=(time.perf_counter() - start) * 1e3,
        )

    def close(self) -> None:
        """Close the feature store."""
        self._store.close()
