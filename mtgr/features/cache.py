"""A cache in front of a feature store: what it knows is answered at once, also for a while when the store is down."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy.typing as npt

from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.features.bounded import BoundedCache
from mtgr.features.frequency import FrequencySketch
from mtgr.features.store import DamagedRecordError, FeatureStore, UserRecord

# What an entry takes beside its arrays: objects, dictionaries, and their keys.
_ENTRY_BYTES = 1200
_PROFILE_BYTES = 160
_TYPICAL_BYTES = 2048  # an entry's size, for the number of users that frequencies are counted of


@dataclass(frozen=True)
class CacheConfig:
    """How much is kept, and for how long.

    Attributes:
        max_bytes: Memory for records.
        ttl_seconds: How long a record is answered without asking the store.
        negative_ttl_seconds: Likewise that a user is not known: shorter, for new users become known.
        stale_seconds: How old a record may be that is answered because the store is down.
        retry_seconds: How long a store that failed is left alone, so that not every request waits for it.
    """

    max_bytes: int = 64 << 20
    ttl_seconds: float = 60.0
    negative_ttl_seconds: float = 5.0
    stale_seconds: float = 3600.0
    retry_seconds: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigurationError: If a value is negative.
        """
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ConfigurationError(f"feature cache: {field.name} must not be negative.")


@dataclass
class CacheStatistics:
    """Counts since the start, and the present size.

    Attributes:
        hits: Answers out of the cache, those about unknown users included.
        negative_hits: Answers out of the cache that a user is not known.
        misses: Requests that had to ask the store, or to wait for another one that asked it.
        stale: Answers that were too old, given because the store was down.
        unavailable: Requests that could not be answered at all.
        loads: Times that the store was asked.
        load_seconds: Time spent on that.
        load_failures: Times that it did not answer.
        invalidations: Changes of users that the store announced.
        evictions: Entries that made room for others.
        entries: Users in the cache.
        bytes: Their size.
    """

    hits: int = 0
    negative_hits: int = 0
    misses: int = 0
    stale: int = 0
    unavailable: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    load_failures: int = 0
    invalidations: int = 0
    evictions: int = 0
    entries: int = 0
    bytes: int = 0

    @property
    def hit_ratio(self) -> float:
        """Hits among all requests; 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)


@dataclass
class _Entry:
    record: UserRecord | None
    loaded: float
    expires: float
    generation: int


class _Flight:
    """One load that several threads may wait for."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.record: UserRecord | None = None
        self.error: UnavailableError | None = None
        self.outdated = False  # the user changed meanwhile: this answer is old already


class CachedStore:
    """Answers out of memory, asks the store once for many threads, and forgets users that change.

    Args:
        store: Where users come from; its announcements of changes are followed.
        config: Sizes and times.
        clock: Gives seconds that never go back.

    Attributes:
        problem: Why the store was of no use when it was last asked, or None.
    """

    def __init__(
        self,
        store: FeatureStore,
        config: CacheConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config or CacheConfig()
        self.problem: UnavailableError | None = None
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        sketch = FrequencySketch(self.config.max_bytes // _TYPICAL_BYTES)
        self._entries: BoundedCache[_Entry] = BoundedCache(self.config.max_bytes, sketch)
        self._flights: dict[str, _Flight] = {}
        self._counts = CacheStatistics()
        self._generation = 0  # entries of an earlier one are no longer fresh
        self._retry = float("-inf")
        store.subscribe(self.invalidate)

    def get(self, user_id: str) -> UserRecord | None:
        """The record of a user, or None if the user is not known; ``stale`` if the store is down.

        Raises:
            UnavailableError: If the store is down and nothing young enough is known of the user.
        """
        with self._lock:
            entry = self._entries.get(user_id)
            if entry is not None and entry.generation == self._generation and self._clock() < entry.expires:
                self._counts.hits += 1
                self._counts.negative_hits += entry.record is None
                return entry.record
            self._counts.misses += 1
            flight = self._flights.get(user_id)
            leads = flight is None
            if flight is None:
                flight = self._flights[user_id] = _Flight()
        if leads:
            self._load(user_id, flight)
        else:
            flight.done.wait()
        if flight.error is None:
            return flight.record
        return self._answer_without_store(user_id, flight.error)

    def append_events(self, user_id: str, items: npt.ArrayLike, actions: npt.ArrayLike, times: npt.ArrayLike) -> None:
        """Pass events on to the store; the next ``get`` sees them."""
        self._store.append_events(user_id, items, actions, times)
        self.invalidate(user_id)

    def invalidate(self, user_id: str | None) -> None:
        """Ask the store again before the next answer about this user, or about anyone; older answers stay at hand."""
        with self._lock:
            self._counts.invalidations += 1
            if user_id is None:
                self._generation += 1
                flights = list(self._flights.values())
                self._flights.clear()
            else:
                entry = self._entries.peek(user_id)
                if entry is not None:
                    entry.expires = float("-inf")
                flights = [self._flights.pop(user_id)] if user_id in self._flights else []
            for flight in flights:
                flight.outdated = True
            # Announcements come from a store that works.
            self._retry = float("-inf")

    def statistics(self) -> CacheStatistics:
        """A copy of the counts."""
        with self._lock:
            return dataclasses.replace(
                self._counts,
                evictions=self._entries.evictions,
                entries=len(self._entries),
                bytes=self._entries.bytes,
            )

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def _load(self, user_id: str, flight: _Flight) -> None:
        """Ask the store, keep the answer, and wake whoever waits for it."""
        flight.error = UnavailableError("the feature store failed in a way nobody expected; see the log.")
        with self._lock:
            resting = self.problem if self._clock() < self._retry else None
        start = self._clock()
        try:
            if resting is None:
                flight.record, flight.error = self._store.get(user_id), None
            else:
                flight.error = resting
        except UnavailableError as error:
            flight.error = error
        finally:
            with self._lock:
                if resting is None:
                    self._note_load(flight.error, self._clock() - start)
                if flight.error is None:
                    self._keep(user_id, flight.record, flight.outdated)
                if self._flights.get(user_id) is flight:
                    del self._flights[user_id]
            flight.done.set()

    def _note_load(self, error: UnavailableError | None, seconds: float) -> None:
        self._counts.loads += 1
        self._counts.load_seconds += seconds
        self._counts.load_failures += error is not None
        # One damaged record says nothing about the store.
        if not isinstance(error, DamagedRecordError):
            self.problem = error
            self._retry = float("-inf") if error is None else self._clock() + self.config.retry_seconds

    def _keep(self, user_id: str, record: UserRecord | None, outdated: bool) -> None:
        now = self._clock()
        if outdated:
            # Still better than nothing while the store is down, but not than what was loaded later.
            if self._entries.peek(user_id) is None:
                entry = _Entry(record, now, float("-inf"), self._generation)
                self._entries.put(user_id, entry, _size(user_id, record))
            return
        known = record is not None
        ttl = self.config.ttl_seconds if known else min(self.config.negative_ttl_seconds, self.config.ttl_seconds)
        self._entries.put(user_id, _Entry(record, now, now + ttl, self._generation), _size(user_id, record))

    def _answer_without_store(self, user_id: str, error: UnavailableError) -> UserRecord | None:
        with self._lock:
            entry = self._entries.peek(user_id)
            if entry is None or self._clock() - entry.loaded > self.config.stale_seconds:
                self._counts.unavailable += 1
                # A new one: an error that is raised again and again would hold ever more frames.
                raise UnavailableError(str(error)) from error
            self._counts.stale += 1
            record = entry.record or UserRecord()
        return dataclasses.replace(record, stale=True)


def _size(user_id: str, record: UserRecord | None) -> int:
    """About the bytes of memory that an entry takes."""
    if record is None:
        return _ENTRY_BYTES // 2 + len(user_id)
    arrays = record.items.nbytes + record.actions.nbytes + record.times.nbytes
    return _ENTRY_BYTES + len(user_id) + _PROFILE_BYTES * len(record.profile) + arrays
