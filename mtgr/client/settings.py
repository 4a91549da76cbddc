"""How a client reaches the server, checked once when the client is made."""

from __future__ import annotations

import math
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mtgr.errors import ConfigurationError

Protocol = Literal["grpc", "http"]
Compression = Literal["gzip", "deflate"]

DEFAULT_URLS: dict[str, str] = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}


@dataclass(frozen=True)
class TLS:
    """An encrypted connection, which also makes sure who answers.

    Attributes:
        root_certificates: PEM file of who signs the gateway's certificate; None for those that the system trusts.
        certificate: PEM file of the caller's own certificate, where the gateway asks for one.
        key: PEM file of its private key.
    """

    root_certificates: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def context(self, create: Callable[..., Any] = ssl.create_default_context) -> Any:
        """For Python's own TLS, or what has its interface.

        Raises:
            ConfigurationError: If a file cannot be used.
        """
        try:
            context = create(cafile=self.root_certificates)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except OSError as error:  # ssl's errors are among them
            raise ConfigurationError(f"the TLS files cannot be used ({error}); give PEM files.") from error
        return context


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
        tls: How to encrypt; None sends plain text.
    """

    url: str
    protocol: Protocol
    timeout: float
    retries: int
    compression: Compression | None
    model: str
    tls: TLS | None = None

    @classmethod
    def checked(
        cls,
        url: str | None,
        protocol: Protocol,
        timeout: float,
        retries: int,
        compression: Compression | None,
        model: str,
        tls: TLS | None = None,
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
        if tls is not None:
            tls.context()  # refuses files that cannot be used
        return cls(url, protocol, timeout, retries, compression, model, tls)

    @property
    def grpc_tls(self) -> dict[str, Any]:
        """Arguments of tritonclient's gRPC clients."""
        if self.tls is None:
            return {}
        files = {
            "root_certificates": self.tls.root_certificates,
            "certificate_chain": self.tls.certificate,
            "private_key": self.tls.key,
        }
        return {"ssl": True} | {name: str(path) for name, path in files.items() if path is not None}

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
