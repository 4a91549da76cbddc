"""Settings of feature extraction: where users come from and how long they are kept, and the store they name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from mtgr.errors import ConfigurationError
from mtgr.features.cache import CacheConfig
from mtgr.features.sqlite import SQLiteStore
from mtgr.features.store import FeatureStore, HistoryLimit, redacted

STORE_URL_VARIABLE = "MTGR_STORE_URL"
STORE_URL_FILE_VARIABLE = "MTGR_STORE_URL_FILE"

_REDIS_SCHEMES = frozenset({"redis", "rediss", "unix"})
_SQLITE_SCHEME = "sqlite"
_CACHE_PARAMETERS = {
    "cache_ttl_seconds": "ttl_seconds",
    "cache_negative_ttl_seconds": "negative_ttl_seconds",
    "stale_seconds": "stale_seconds",
    "store_retry_seconds": "retry_seconds",
}


@dataclass(frozen=True)
class FeatureSettings:
    """Settings of ``mtgr_features``.

    Attributes:
        store_url: Where users come from; empty for the store inside the model repository.
        store_timeout: Seconds to wait for a store on the network.
        cache: The cache's settings.
    """

    store_url: str = ""
    store_timeout: float = 0.05
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigurationError: If there is no time to wait for the store.
        """
        if self.store_timeout <= 0:
            raise ConfigurationError("mtgr_features: store_timeout_ms must be positive.")


def feature_settings(
    parameters: Mapping[str, str] | None = None, environment: Mapping[str, str] = os.environ
) -> FeatureSettings:
    """Parse and check the string parameters of a ``config.pbtxt``; absent ones keep their defaults.

    The store's address may hold a password. So it may also come from the variable ``MTGR_STORE_URL`` or from the file
    that ``MTGR_STORE_URL_FILE`` names, which come first, and only from there if it does.

    Raises:
        ConfigurationError: If a parameter is unknown, its value is wrong, or it holds a password.
    """
    given = dict(parameters or {})
    known = {"store_url", "store_timeout_ms", "cache_bytes", *_CACHE_PARAMETERS}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ConfigurationError(f"mtgr_features: unknown parameter {unknown[0]!r}; remove it or fix its name.")
    configured = given.get("store_url", "")
    if urlsplit(configured).password is not None or "password" in parse_qs(urlsplit(configured).query):
        raise ConfigurationError(
            "mtgr_features: store_url holds a password; give it in the environment variable "
            f"{STORE_URL_VARIABLE} or in the file that {STORE_URL_FILE_VARIABLE} names."
        )
    numbers = {field: _number(given, name) for name, field in _CACHE_PARAMETERS.items() if name in given}
    cache = CacheConfig(CacheConfig.max_bytes, **numbers)
    if "cache_bytes" in given:
        cache = dataclasses.replace(cache, max_bytes=int(_number(given, "cache_bytes")))
    settings = FeatureSettings(store_url(environment) or configured, cache=cache)
    if "store_timeout_ms" in given:
        settings = dataclasses.replace(settings, store_timeout=_number(given, "store_timeout_ms") / 1e3)
    return settings


def store_url(environment: Mapping[str, str] = os.environ) -> str:
    """The address that the environment gives, or an empty text.

    Raises:
        ConfigurationError: If the file that it names cannot be read.
    """
    if environment.get(STORE_URL_VARIABLE):
        return environment[STORE_URL_VARIABLE]
    path = environment.get(STORE_URL_FILE_VARIABLE)
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{STORE_URL_FILE_VARIABLE} names {path}, which cannot be read ({error}); name a file with the address."
        ) from error


def open_store(
    url: str, limit: HistoryLimit | None, timeout: float = FeatureSettings.store_timeout, *, create: bool = False
) -> FeatureStore:
    """The store of an address: ``redis://``, ``rediss://``, ``unix://``, or ``sqlite:///path`` of a writable file.

    Args:
        url: The address.
        limit: Events that are kept of a user; None keeps all.
        timeout: Seconds to wait for a store on the network.
        create: Whether to make a file that does not exist.

    Raises:
        ConfigurationError: If the address is not understood, there is no such file, or redis-py is not installed.
    """
    parts = urlsplit(url)
    if parts.scheme in _REDIS_SCHEMES:
        try:
            from mtgr.features.redis import RedisStore
        except ImportError as error:
            raise ConfigurationError("a store in Redis needs redis-py: pip install 'mtgr[serve]'.") from error
        return RedisStore(url, limit, timeout)
    if parts.scheme == _SQLITE_SCHEME and not parts.netloc and len(parts.path) > 1:
        path = Path(unquote(parts.path))
        return SQLiteStore.create(path, limit) if create else SQLiteStore(path, limit, writable=True)
    raise ConfigurationError(
        f"{redacted(url)} is not the address of a feature store; write redis://host:port/database, rediss:// for TLS, "
        "unix:///path of a socket, or sqlite:///path of a file."
    )


def _number(parameters: Mapping[str, str], name: str) -> float:
    try:
        value = float(parameters[name])
    except ValueError as error:
        raise ConfigurationError(f"mtgr_features: {name} is {parameters[name]!r}; it must be a number.") from error
    if not 0 <= value < float("inf"):
        raise ConfigurationError(f"mtgr_features: {name} is {parameters[name]!r}; it must not be negative or infinite.")
    return value
