"""The four ways to reach Triton: gRPC or HTTP, blocking or asyncio, each one connection that is kept.

A protocol's packages are imported when a client of it is made: a gRPC user loads neither gevent nor aiohttp.
"""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from mtgr.client.failures import translated
from mtgr.client.settings import Settings
from mtgr.client.types import Recommendation
from mtgr.client.wire import Tensor, decode, to_inputs
from mtgr.errors import ConfigurationError

Result = TypeVar("Result")


class Transport(Protocol):
    """A blocking connection; what goes wrong comes as MTGRError."""

    def infer(self, tensors: list[Tensor], headers: dict[str, str], timeout: float, started: float) -> Recommendation:
        """Send one request, ``timeout`` seconds at most; latency counts from ``started`` (perf_counter)."""

    def is_ready(self, timeout: float) -> bool:
        """Ask whether the door's model is ready."""

    def close(self) -> None:
        """Close the connection."""


class AsyncTransport(Protocol):
    """The same for asyncio."""

    async def infer(
        self, tensors: list[Tensor], headers: dict[str, str], timeout: float, started: float
    ) -> Recommendation:
        """Send one request, ``timeout`` seconds at most; latency counts from ``started`` (perf_counter)."""

    async def is_ready(self, timeout: float) -> bool:
        """Ask whether the door's model is ready."""

    async def close(self) -> None:
        """Close the connection."""


class GrpcTransport:
    """Blocking gRPC; threads may share it."""

    def __init__(self, settings: Settings) -> None:
        import tritonclient.grpc as triton

        self._settings = settings
        self._infer_input = triton.InferInput
        self._client = triton.InferenceServerClient(
            settings.url, channel_args=settings.grpc_channel_args, **settings.grpc_tls
        )

    def infer(self, tensors: list[Tensor], headers: dict[str, str], timeout: float, started: float) -> Recommendation:
        """Send one request."""
        inputs = to_inputs(tensors, self._infer_input)
        with translated(self._settings):
            result = self._client.infer(
                self._settings.model,
                inputs,
                headers=headers,
                timeout=microseconds(timeout),
                client_timeout=timeout,
                compression_algorithm=self._settings.compression,
            )
            return decode(result, _milliseconds_since(started))

    def is_ready(self, timeout: float) -> bool:
        """Ask whether the door's model is ready."""
        with translated(self._settings):
            return bool(self._client.is_model_ready(self._settings.model, client_timeout=timeout))

    def close(self) -> None:
        """Close the channel."""
        self._client.close()


class AsyncGrpcTransport:
    """gRPC on asyncio. The channel belongs to the event loop of the first call, and so it is made there."""

    def __init__(self, settings: Settings) -> None:
        import tritonclient.grpc.aio as triton

        self._settings = settings
        self._triton = triton
        self._client: Any = None

    def _connected(self) -> Any:
        if self._client is None:
            self._client = self._triton.InferenceServerClient(
                self._settings.url, channel_args=self._settings.grpc_channel_args, **self._settings.grpc_tls
            )
        return self._client

    async def infer(
        self, tensors: list[Tensor], headers: dict[str, str], timeout: float, started: float
    ) -> Recommendation:
        """Send one request."""
        inputs = to_inputs(tensors, self._triton.InferInput)
        with translated(self._settings):
            result = await self._connected().infer(
                self._settings.model,
                inputs,
                headers=headers,
                timeout=microseconds(timeout),
                client_timeout=timeout,
                compression_algorithm=self._settings.compression,
            )
            return decode(result, _milliseconds_since(started))

    async def is_ready(self, timeout: float) -> bool:
        """Ask whether the door's model is ready."""
        with translated(self._settings):
            return bool(await self._connected().is_model_ready(self._settings.model, client_timeout=timeout))

    async def close(self) -> None:
        """Close the channel."""
        if self._client is not None:
            await self._client.close()


class HttpTransport:
    """Blocking HTTP. tritonclient's sockets are gevent's, bound to the thread that first used them."""

    def __init__(self, settings: Settings) -> None:
        import gevent.ssl  # type: ignore[import-untyped]
        import geventhttpclient.response
        import tritonclient.http as triton

        self._settings = settings
        self._gevent = gevent
        self._connection_closed: type[Exception] = geventhttpclient.response.HTTPConnectionClosed
        self._triton = triton
        self._client: Any = None
        self._hub: object = None

    def infer(self, tensors: list[Tensor], headers: dict[str, str], timeout: float, started: float) -> Recommendation:
        """Send one request."""
        inputs = to_inputs(tensors, self._triton.InferInput)
        compression = self._settings.compression

        def call(client: Any) -> Recommendation:
            result = client.infer(
                self._settings.model,
                inputs,
                headers=headers,
                timeout=microseconds(timeout),
                request_compression_algorithm=compression,
                response_compression_algorithm=compression,
            )
            return decode(result, _milliseconds_since(started))

        return self._within(timeout, call)

    def is_ready(self, timeout: float) -> bool:
        """Ask whether the door's model is ready."""
        return self._within(timeout, lambda client: bool(client.is_model_ready(self._settings.model)))

    def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _within(self, timeout: float, call: Callable[[Any], Result]) -> Result:
        """Run ``call`` on the connection; tritonclient's own HTTP timeouts count anew with every packet."""
        client = self._connected()
        with translated(self._settings):
            timer = self._gevent.Timeout(timeout)
            try:
                with timer:
                    return call(client)
            except self._gevent.Timeout as fired:
                if fired is not timer:
                    raise
                # The interrupted request may still hold the pool's only slot.
                self.close()
                raise TimeoutError from fired
            except self._connection_closed as error:
                raise ConnectionError(str(error)) from error

    def _connected(self) -> Any:
        hub = self._gevent.get_hub()
        if self._hub is None:
            self._hub = hub
        elif self._hub is not hub:
            raise ConfigurationError(
                "an HTTP client belongs to the thread of its first call; make one per thread or use gRPC."
            )
        if self._client is None:
            tls = self._settings.tls
            self._client = self._triton.InferenceServerClient(
                self._settings.url,
                connection_timeout=self._settings.timeout,
                network_timeout=self._settings.timeout,
                ssl=tls is not None,
                ssl_context_factory=tls and partial(tls.context, self._gevent.ssl.create_default_context),
            )
        return self._client


class AsyncHttpTransport:
    """HTTP on asyncio. The session belongs to the event loop of the first call, and so it is made there."""

    def __init__(self, settings: Settings) -> None:
        import aiohttp
        import tritonclient.http.aio as triton

        self._settings = settings
        self._aiohttp = aiohttp
        self._triton = triton
        self._client: Any = None

    async def infer(
        self, tensors: list[Tensor], headers: dict[str, str], timeout: float, started: float
    ) -> Recommendation:
        """Send one request."""
        inputs = to_inputs(tensors, self._triton.InferInput)
        compression = self._settings.compression

        async def call(client: Any) -> Recommendation:
            result = await client.infer(
                self._settings.model,
                inputs,
                headers=headers,
                timeout=microseconds(timeout),
                request_compression_algorithm=compression,
                response_compression_algorithm=compression,
            )
            return decode(result, _milliseconds_since(started))

        return await self._within(timeout, call)

    async def is_ready(self, timeout: float) -> bool:
        """Ask whether the door's model is ready."""

        async def call(client: Any) -> bool:
            return bool(await client.is_model_ready(self._settings.model))

        return await self._within(timeout, call)

    async def close(self) -> None:
        """Close the session."""
        if self._client is not None:
            await self._client.close()

    async def _within(self, timeout: float, call: Callable[[Any], Awaitable[Result]]) -> Result:
        with translated(self._settings):
            try:
                async with asyncio.timeout(timeout):
                    return await call(self._connected())
            except TimeoutError:
                raise
            except self._aiohttp.ClientConnectionError as error:
                raise ConnectionError(getattr(error, "strerror", None) or str(error)) from error
            except self._aiohttp.ClientError as error:
                raise http.client.HTTPException(str(error)) from error

    def _connected(self) -> Any:
        if self._client is None:
            # Without the session's own limit, which would cut a longer timeout short.
            tls = self._settings.tls
            self._client = self._triton.InferenceServerClient(
                self._settings.url, conn_timeout=None, ssl=tls is not None, ssl_context=tls and tls.context()
            )
        return self._client


def _milliseconds_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3


def microseconds(timeout: float) -> int:
    """A time limit for the server, which stops working for a caller who is gone."""
    return max(1, round(timeout * 1e6))
