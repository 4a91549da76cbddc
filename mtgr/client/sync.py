"""The blocking client."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from mtgr.client.retry import Attempts, RetryPolicy
from mtgr.client.settings import TLS, Compression, Protocol, Settings
from mtgr.client.transports import GrpcTransport, HttpTransport, Transport
from mtgr.client.types import History, Integers, Recommendation, RecommendationRequest
from mtgr.client.wire import affinity, encode
from mtgr.errors import ConfigurationError, MTGRError, UnavailableError


class MTGRClient:
    """Calls the door and waits for its answer.

    One connection is made at the first call and kept. Over gRPC, threads may share a client. Over HTTP,
    tritonclient ties the connection to the thread of the first call, so each thread needs a client of its own;
    a call from another thread is refused.

    Args:
        url: ``host:port``; None is 127.0.0.1:8001 for gRPC and 127.0.0.1:8000 for HTTP.
        protocol: ``grpc`` or ``http``.
        timeout: Seconds for a call, all its tries and waits together.
        retries: Tries after the first one, made only while the server is unavailable.
        compression: ``gzip`` or ``deflate``; None sends messages as they are.
        model: Name of the door's model.
        tls: How to encrypt; None sends plain text.
        rng: Where the jitter of the waits comes from.

    Raises:
        ConfigurationError: If a value is not allowed.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        protocol: Protocol = "grpc",
        timeout: float = 10.0,
        retries: int = 2,
        compression: Compression | None = None,
        model: str = "mtgr",
        tls: TLS | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._settings = Settings.checked(url, protocol, timeout, retries, compression, model, tls)
        self._policy = RetryPolicy(retries, timeout, rng or random.Random())
        self._transport: Transport = (GrpcTransport if protocol == "grpc" else HttpTransport)(self._settings)
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; closing twice is fine, calling afterwards is not."""
        if not self._closed:
            self._closed = True
            self._transport.close()

    def recommend(
        self,
        user_id: str,
        *,
        top_k: int | None = 10,
        history: History | None = None,
        request_time: int | None = None,
        profile: Mapping[str, Any] | None = None,
        strategy: str | None = None,
    ) -> Recommendation:
        """The best items for a user, retrieved and ranked by the server; raises what ``infer`` raises."""
        return self.infer(
            RecommendationRequest(
                user_id,
                history,
                None,
                request_time=request_time,
                profile=profile,
                strategy=strategy,
                top_k=top_k,
            )
        )

    def rank(
        self,
        user_id: str,
        candidates: Integers,
        *,
        top_k: int | None = None,
        history: History | None = None,
        request_time: int | None = None,
        profile: Mapping[str, Any] | None = None,
        strategy: str | None = None,
    ) -> Recommendation:
        """``candidates`` (item ids [k]) ordered for a user; raises what ``infer`` raises."""
        return self.infer(
            RecommendationRequest(
                user_id,
                history,
                candidates,
                request_time=request_time,
                profile=profile,
                strategy=strategy,
                top_k=top_k,
            )
        )

    def infer(self, request: RecommendationRequest) -> Recommendation:
        """Answer one request.

        Raises:
            InvalidRequestError: If the request cannot be encoded or the server refuses it.
            UnavailableError: If nothing could serve it, after all tries.
            RequestTimeoutError: If no answer came within the timeout.
            ServerError: If the server failed.
            ConfigurationError: If the client is closed or belongs to another thread.
        """
        self._require_open()
        tensors = encode(request)
        headers = affinity(request.user_id)
        started = time.perf_counter()
        attempts = Attempts(self._policy)
        while True:
            try:
                return self._transport.infer(tensors, headers, attempts.remaining(), started)
            except UnavailableError as error:
                delay = attempts.backoff(error)
            time.sleep(delay)

    def is_ready(self) -> bool:
        """Whether the door answers that it is ready; False also when nothing answers within the timeout."""
        self._require_open()
        try:
            return self._transport.is_ready(self._settings.timeout)
        except ConfigurationError:
            raise
        except MTGRError:
            return False

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigurationError("this client is closed; make a new one.")
