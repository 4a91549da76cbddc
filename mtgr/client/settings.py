"""How a client reaches the server, checked once when the client is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mtgr.errors import ConfigurationError

Protocol = Literal["grpc", "http"]
Compression = Literal["gzip", "deflate"]

DEFAULT_URLS: dict[str, str] = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}


@dataclass(frozen=True)
class Settings:
    """Where to and how.

    Attributes:
        url: ``host:port``, without a scheme.
        protocol: ``grpc`` or ``http``.
        timeout: Seconds for a call, all its tries and waits together.
        retries: Tries after the first one.
        compression: ``gzip`` or ``deflate`` for messages; None sends them as they are.
        model: Name of the door's model.
    """

    url: str
    protocol: Protocol
    timeout: float
    retries: int
    compression: Compression | None
    model: str

    @classmethod
    def checked(
        cls,
        url: str | None,
        protocol: Protocol,
        timeout: float,
        retries: int,
        compression: Compression | None,
        model: str,
    ) -> Settings:
        """Settings with the protocol's default address where ``url`` is None.

        Raises:
            ConfigurationError: If a value is not allowed.
        """
        if protocol not in DEFAULT_URLS:
            raise ConfigurationError(f"protocol is {protocol!r}; it must be 'grpc' or 'http'.")
        if url is None:
            url = DEFAULT_URLS[protocol]
        if not url or "://" in url:
            raise ConfigurationError(f"url is {url!r}; give host:port without a scheme, e.g. {DEFAULT_URLS[protocol]}.")
        if not 0 < timeout < math.inf:
            raise ConfigurationError(f"timeout is {timeout!r}; it must be a positive number of seconds.")
        if retries < 0:
            raise ConfigurationError(f"retries is {retries!r}; it must be 0 or more.")
        if compression is not None and compression not in get_args(Compression):
            raise ConfigurationError(f"compression is {compression!r}; it must be 'gzip', 'deflate' or None.")
        return cls(url, protocol, timeout, retries, compression, model)

    @property
    def grpc_channel_args(self) -> list[tuple[str, int]]:
        """Options of a gRPC channel, complete as tritonclient wants them.

        After a refused connection a channel answers UNAVAILABLE by itself until its reconnect backoff is over,
        1 s to 120 s by default; the short one here lets a retry reach a server that has just come back. Proxies
        from the environment are for the web, and the other transports do not use them either.
        """
        return [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 500),
            ("grpc.enable_http_proxy", 0),
        ]
