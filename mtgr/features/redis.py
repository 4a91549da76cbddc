"""The feature store in Redis: shared by many servers, fed with events while they serve.

A user is two keys. ``mtgr:user:<id>`` holds the long-term record, ``mtgr:events:<id>`` a list of blocks of real-time
events, each encoded as a record without a profile, so that an append costs one round trip whatever the history's
length. A reader puts both together. Once many blocks wait, the writer folds them into the long-term record. Ids of
changed users are published on ``mtgr:changed``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy.typing as npt
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.features.encoding import decode_record, encode_record
from mtgr.features.store import HistoryLimit, Listener, UserRecord, checked_events, merged, redacted

RECORD_PREFIX = "mtgr:user:"
EVENTS_PREFIX = "mtgr:events:"
CHANGED_CHANNEL = "mtgr:changed"

FOLD_BLOCKS = 32
_FOLD_EVENTS = 100
_FOLD_ATTEMPTS = 3
_CONNECTIONS = 16
_LISTEN_SECONDS = 1.0
_UNANSWERED_PINGS = 3
_RECONNECT_SECONDS = 0.2
_SCAN_COUNT = 1000


class RedisStore:
    """Records in one Redis server (or a replicated one behind one address; not a cluster of shards).

    Nothing is asked of the server until a method is called, so that a service starts while Redis is down.

    Args:
        url: ``redis://``, ``rediss://`` (TLS), or ``unix://``, with user, password, and database as in redis-py.
        limit: Events that are kept of a user; None keeps all.
        timeout: Seconds to wait for a connection, and for each answer.

    Raises:
        ConfigurationError: If the URL is not one of Redis.
    """

    def __init__(self, url: str, limit: HistoryLimit | None = None, timeout: float = 0.05) -> None:
        self.address = redacted(url)
        self._limit = limit
        self._closed = threading.Event()
        self._listening: threading.Thread | None = None
        options: dict[str, Any] = {
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            # A caller that may serve an earlier answer does not gain from waiting through retries.
            "retry": Retry(NoBackoff(), 0),
        }
        try:
            pool = redis.BlockingConnectionPool.from_url(url, max_connections=_CONNECTIONS, timeout=timeout, **options)
        except ValueError as error:
            raise ConfigurationError(
                f"{self.address} is not the address of a Redis server; write redis://host:port/database."
            ) from error
        self._client = redis.Redis(connection_pool=pool)

    def get(self, user_id: str) -> UserRecord | None:
        """The record of a user, or None if the user is not known.

        Raises:
            UnavailableError: If Redis does not answer in time or refuses, or the record is damaged.
        """
        return self.get_many([user_id])[0]

    def get_many(self, user_ids: Sequence[str]) -> list[UserRecord | None]:
        """Records in the order of ``user_ids``, None for users that are not known; one round trip."""
        with self._errors(), self._client.pipeline() as pipeline:
            for user_id in user_ids:
                _ask(pipeline, user_id)
            answers = pipeline.execute()
        pairs = zip(answers[::2], answers[1::2], strict=True)
        return [self._record(record, blocks) for record, blocks in pairs]

    def put_user(self, user_id: str, record: UserRecord) -> None:
        """Replace all that is stored of a user, or add the user."""
        self.put_many([(user_id, record)])

    def put_many(self, records: Iterable[tuple[str, UserRecord]]) -> None:
        """``put_user`` for each record, in one transaction and one round trip."""
        with self._errors(), self._client.pipeline() as pipeline:
            for user_id, record in records:
                pipeline.set(RECORD_PREFIX + user_id, encode_record(merged([record], self._limit)))
                pipeline.delete(EVENTS_PREFIX + user_id)
                pipeline.publish(CHANGED_CHANNEL, user_id)
            pipeline.execute()

    def append_events(self, user_id: str, items: npt.ArrayLike, actions: npt.ArrayLike, times: npt.ArrayLike) -> None:
        """Add events of a user, known or new, in one round trip; see ``FeatureStore``."""
        events = checked_events(items, actions, times)
        if not len(events.items):
            return
        with self._errors(), self._client.pipeline() as pipeline:
            pipeline.rpush(EVENTS_PREFIX + user_id, encode_record(events))
            pipeline.publish(CHANGED_CHANNEL, user_id)
            blocks, _ = pipeline.execute()
        if blocks >= FOLD_BLOCKS or len(events.items) >= _FOLD_EVENTS:
            # The events are stored; what is not folded now, the next append will fold.
            with suppress(UnavailableError):
                self._fold(user_id)

    def user_ids(self) -> list[str]:
        """All known users, in no particular order."""
        seen = set()
        with self._errors():
            for prefix in (RECORD_PREFIX, EVENTS_PREFIX):
                for key in self._client.scan_iter(match=f"{prefix}*", count=_SCAN_COUNT):
                    seen.add(key.decode().removeprefix(prefix))
        return list(seen)

    def subscribe(self, listener: Listener) -> None:
        """Call ``listener`` after every change, and with None each time that the connection was made anew."""
        self._listening = threading.Thread(target=self._listen, args=(listener,), name="store-changes", daemon=True)
        self._listening.start()

    def close(self) -> None:
        """Close all connections."""
        self._closed.set()
        if self._listening is not None:
            self._listening.join()
        self._client.close()
        self._client.connection_pool.disconnect()

    def _record(self, record: bytes | None, blocks: list[bytes]) -> UserRecord | None:
        if record is None and not blocks:
            return None
        first = UserRecord() if record is None else decode_record(record)
        return merged([first, *map(decode_record, blocks)], self._limit)

    def _fold(self, user_id: str) -> None:
        """Write long-term record and waiting events as one record, unless another writer comes between."""
        record_key, events_key = RECORD_PREFIX + user_id, EVENTS_PREFIX + user_id
        pipeline: Any  # redis-py's types cover asynchronous clients too
        with self._errors(), self._client.pipeline() as pipeline:
            for _ in range(_FOLD_ATTEMPTS):
                with suppress(redis.WatchError):
                    pipeline.watch(record_key, events_key)
                    folded = self._record(pipeline.get(record_key), pipeline.lrange(events_key, 0, -1))
                    if folded is None:
                        return
                    pipeline.multi()
                    pipeline.set(record_key, encode_record(folded))
                    pipeline.delete(events_key)
                    pipeline.execute()
                    return

    def _listen(self, listener: Listener) -> None:
        while not self._closed.is_set():
            with suppress(redis.RedisError, OSError), _untyped(self._client).pubsub() as subscription:
                subscription.subscribe(CHANGED_CHANNEL)
                unanswered = 0
                while not self._closed.is_set() and unanswered < _UNANSWERED_PINGS:
                    message = subscription.get_message(timeout=_LISTEN_SECONDS)
                    if message is None:
                        # A connection that is lost without a word is as quiet as one without news.
                        subscription.ping()
                        unanswered += 1
                        continue
                    unanswered = 0
                    if message["type"] == "subscribe":
                        listener(None)
                    elif message["type"] == "message":
                        listener(message["data"].decode())
            self._closed.wait(_RECONNECT_SECONDS)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except redis.TimeoutError as error:
            raise UnavailableError(f"the feature store at {self.address} does not answer in time.") from error
        except redis.RedisError as error:
            raise UnavailableError(
                f"the feature store at {self.address} cannot be used ({type(error).__name__}: {error}); "
                "check that Redis runs and accepts these credentials."
            ) from error


def _untyped(client: Any) -> Any:
    """Past a method that redis-py leaves without types."""
    return client


def _ask(pipeline: Any, user_id: str) -> None:
    pipeline.get(RECORD_PREFIX + user_id)
    pipeline.lrange(EVENTS_PREFIX + user_id, 0, -1)
