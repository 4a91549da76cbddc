"""The feature cache: asks once, forgets what changed, stays within its bound, and helps out while the store is down."""

from __future__ import annotations

import dataclasses
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.features.bounded import BoundedCache
from mtgr.features.cache import CacheConfig, CachedStore, CacheStatistics
from mtgr.features.frequency import FrequencySketch
from mtgr.features.metrics import FeatureMetrics
from mtgr.features.redis import RedisStore
from mtgr.features.sqlite import SQLiteStore
from mtgr.features.store import DamagedRecordError, Listener, UserRecord
from perf.cache_policy import hit_ratio
from tests.unit.redis_server import RedisServer

CONFIG = CacheConfig(
    max_bytes=1 << 20, ttl_seconds=10.0, negative_ttl_seconds=2.0, stale_seconds=100.0, retry_seconds=1.0
)


def record(events: int = 3, item: int = 1) -> UserRecord:
    return UserRecord({"age": 30}, np.full(events, item), np.zeros(events, dtype=np.int32), np.arange(events))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class CountingStore:
    """Answers from a dictionary, counts how often it is asked, and can be slow, down, or damaged."""

    def __init__(self, **records: UserRecord) -> None:
        self.records = records
        self.asked: list[str] = []
        self.error: UnavailableError | None = None
        self.gate: threading.Event | None = None
        self.listener: Listener | None = None

    def get(self, user_id: str) -> UserRecord | None:
        self.asked.append(user_id)
        found = self.records.get(user_id)
        if self.gate is not None:
            assert self.gate.wait(5)
        if self.error is not None:
            raise self.error
        return found

    def append_events(self, user_id: str, items: npt.ArrayLike, actions: npt.ArrayLike, times: npt.ArrayLike) -> None:
        self.records[user_id] = record(len(np.asarray(items)))

    def subscribe(self, listener: Listener) -> None:
        self.listener = listener

    def close(self) -> None:
        self.listener = None

    get_many: Any = None
    put_user: Any = None
    put_many: Any = None
    user_ids: Any = None


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> CountingStore:
    return CountingStore(ann=record(), bob=record(5))


@pytest.fixture
def cache(store: CountingStore, clock: Clock) -> CachedStore:
    return CachedStore(store, CONFIG, clock)


def test_a_user_is_asked_for_once_until_the_time_is_over(
    cache: CachedStore, store: CountingStore, clock: Clock
) -> None:
    answers = [cache.get("ann") for _ in range(5)]
    assert all(answer is answers[0] for answer in answers)
    assert answers[0] is store.records["ann"]
    clock.now += 9.9
    cache.get("ann")
    assert store.asked == ["ann"]
    clock.now += 0.2
    cache.get("ann")
    assert store.asked == ["ann", "ann"]
    statistics = cache.statistics()
    assert (statistics.hits, statistics.misses, statistics.loads, statistics.entries) == (5, 2, 2, 1)
    assert statistics.hit_ratio == pytest.approx(5 / 7)


def test_that_a_user_is_unknown_is_kept_too_but_for_less_time(
    cache: CachedStore, store: CountingStore, clock: Clock
) -> None:
    assert cache.get("eve") is None
    assert cache.get("eve") is None
    assert store.asked == ["eve"]
    assert cache.statistics().negative_hits == 1
    store.records["eve"] = record()
    clock.now += 2.1
    assert cache.get("eve") is store.records["eve"]


def test_appended_events_are_seen_at_once(cache: CachedStore, store: CountingStore) -> None:
    cache.get("ann")
    cache.get("eve")
    for user in ("ann", "eve"):
        cache.append_events(user, [1, 2, 3, 4], [0] * 4, [5] * 4)
        found = cache.get(user)
        assert found is not None
        assert len(found.items) == 4
    cache.get("bob")
    assert store.asked == ["ann", "eve", "ann", "eve", "bob"]


def test_announced_changes_are_seen_at_once(cache: CachedStore, store: CountingStore) -> None:
    assert store.listener is not None
    for user in ("ann", "bob"):
        cache.get(user)
    store.listener("ann")
    for user in ("ann", "bob"):
        cache.get(user)
    assert store.asked == ["ann", "bob", "ann"]
    store.listener(None)
    for user in ("ann", "bob"):
        cache.get(user)
    assert store.asked == ["ann", "bob", "ann", "ann", "bob"]
    assert cache.statistics().invalidations == 2


@pytest.mark.parametrize("announced", ["ann", None])
def test_an_answer_that_a_change_overtook_is_not_kept(
    cache: CachedStore, store: CountingStore, announced: str | None
) -> None:
    old, new = store.records["ann"], record(9)
    slow = store.gate = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(cache.get, "ann")
        while not store.asked:
            time.sleep(0.001)
        # The store has read the old record and is about to answer it.
        store.records["ann"] = new
        cache.invalidate(announced)
        store.gate = None
        assert cache.get("ann") is new  # whoever asks after the change does not wait for the old answer
        slow.set()
        assert early.result() is old
    assert cache.get("ann") is new
    assert len(store.asked) == 2


def test_many_threads_make_one_request(cache: CachedStore, store: CountingStore) -> None:
    store.gate = threading.Event()
    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(cache.get, "ann") for _ in range(16)]
        while cache.statistics().misses < 16:
            time.sleep(0.001)
        store.gate.set()
        assert all(one.result() is store.records["ann"] for one in waiting)
    assert store.asked == ["ann"]


def test_threads_do_not_wait_for_each_others_users(cache: CachedStore, store: CountingStore) -> None:
    slow = store.gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.get, "ann")
        while not store.asked:
            time.sleep(0.001)
        store.gate = None
        assert cache.get("bob") is store.records["bob"]
        slow.set()
        waiting.result()


def test_an_unexpected_error_reaches_all_who_wait_and_nobody_waits_for_ever(
    cache: CachedStore, store: CountingStore, clock: Clock
) -> None:
    store.gate = threading.Event()
    store.error = RuntimeError("a bug")  # type: ignore[assignment]
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(cache.get, "ann") for _ in range(4)]
        while cache.statistics().misses < 4:
            time.sleep(0.001)
        store.gate.set()
        errors = [type(one.exception(timeout=5)) for one in waiting]
    assert sorted(error.__name__ for error in errors) == ["RuntimeError", *["UnavailableError"] * 3]
    store.error = None
    clock.now += 1.1
    assert cache.get("ann") is store.records["ann"]


def test_while_the_store_is_down_old_answers_are_given_and_marked(
    cache: CachedStore, store: CountingStore, clock: Clock
) -> None:
    fresh = cache.get("ann")
    cache.get("eve")
    store.error = UnavailableError("it is down.")
    assert cache.get("ann") is fresh  # still within its time
    clock.now += 11
    for user, profile in (("ann", {"age": 30}), ("eve", {})):
        answer = cache.get(user)
        assert answer is not None
        assert answer.stale
        assert answer.profile == profile
    assert fresh is not None
    assert not fresh.stale
    with pytest.raises(UnavailableError, match="it is down"):
        cache.get("bob")
    clock.now += 90  # older than allowed
    with pytest.raises(UnavailableError, match="it is down"):
        cache.get("ann")
    statistics = cache.statistics()
    assert (statistics.stale, statistics.unavailable) == (2, 2)


def test_a_store_that_is_down_is_left_alone_for_a_while(cache: CachedStore, store: CountingStore, clock: Clock) -> None:
    store.error = UnavailableError("it is down.")
    for _ in range(20):
        with pytest.raises(UnavailableError, match="it is down"):
            cache.get("ann")
    assert store.asked == ["ann"]
    assert str(cache.problem) == "it is down."
    clock.now += 1.1
    with pytest.raises(UnavailableError):
        cache.get("bob")
    assert store.asked == ["ann", "bob"]
    store.error = None
    clock.now += 1.1
    assert cache.get("ann") is store.records["ann"]
    assert cache.problem is None
    assert cache.statistics().load_failures == 2


def test_a_store_that_announces_changes_is_asked_again_at_once(cache: CachedStore, store: CountingStore) -> None:
    store.error = UnavailableError("it is down.")
    with pytest.raises(UnavailableError):
        cache.get("ann")
    store.error = None
    cache.invalidate(None)
    assert cache.get("ann") is store.records["ann"]


def test_a_damaged_record_does_not_keep_others_from_the_store(cache: CachedStore, store: CountingStore) -> None:
    store.error = DamagedRecordError("this user's record is damaged.")
    with pytest.raises(UnavailableError):
        cache.get("ann")
    store.error = None
    assert cache.get("bob") is store.records["bob"]
    assert cache.get("ann") is store.records["ann"]


def test_memory_is_bounded_and_counted_about_right() -> None:
    generator = np.random.default_rng(0)

    class Endless(CountingStore):
        def get(self, user_id: str) -> UserRecord:
            return dataclasses.replace(
                record(int(generator.integers(0, 200))), profile={"age": int(user_id), "gender": "F" + user_id}
            )

    cache = CachedStore(Endless(), dataclasses.replace(CONFIG, max_bytes=4 << 20))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for user in range(5000):
        for _ in range(1 + user // 500):  # ever more often, so that newcomers are let in
            cache.get(str(user))
        assert cache.statistics().bytes <= 4 << 20
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    statistics = cache.statistics()
    assert statistics.evictions > 1000
    assert statistics.bytes > 0.95 * (4 << 20)
    assert 0.7 < used / statistics.bytes < 1.1


def test_a_record_larger_than_the_cache_is_answered_and_not_kept(store: CountingStore) -> None:
    store.records["ann"] = record(10_000)
    cache = CachedStore(store, dataclasses.replace(CONFIG, max_bytes=10_000))
    cache.get("bob")
    assert cache.get("ann") is store.records["ann"]
    assert cache.statistics().entries == 1
    assert cache.get("bob") is store.records["bob"]
    assert store.asked == ["bob", "ann"]


def test_an_entry_may_grow() -> None:
    cache: BoundedCache[str] = BoundedCache(100, FrequencySketch(16))
    for key in "abcde":
        cache.put(key, key, 20)
    for _ in range(5):
        cache.get("a")
    assert cache.put("e", "larger", 40)
    assert cache.get("e") == "larger"
    assert cache.bytes == 100
    assert cache.peek("b") is None
    assert not cache.put("a", "too large", 101)
    assert cache.peek("a") is None  # the old value would be wrong


def test_what_is_asked_for_often_is_not_pushed_out_by_what_is_not() -> None:
    cache: BoundedCache[int] = BoundedCache(1000, FrequencySketch(1000))
    for _ in range(4):
        for key in range(100):
            if cache.get(f"often-{key}") is None:
                cache.put(f"often-{key}", key, 10)
    for key in range(10_000):
        if cache.get(f"once-{key}") is None:
            cache.put(f"once-{key}", key, 10)
    assert sum(cache.peek(f"often-{key}") is not None for key in range(100)) > 90


def test_old_popularity_fades() -> None:
    sketch = FrequencySketch(16)
    for _ in range(15):
        sketch.add("old")
    assert sketch.count("old") == 15
    for index in range(1500):
        sketch.add(index % 4)
    assert sketch.count("old") <= 4


def test_hit_ratio_on_zipf_traffic() -> None:
    shape = {"users": 10_000, "share": 0.6, "exponent": 1.0, "requests": 200_000, "seed": 7}
    lru, tiny = (hit_ratio(policy, **shape) for policy in ("lru", "tinylfu"))  # type: ignore[arg-type]
    assert tiny > 0.9
    assert tiny > lru  # else the simpler policy would do


def test_hit_ratio_of_the_whole_cache_on_zipf_traffic() -> None:
    weights = 1.0 / np.arange(1, 10_001)
    drawn = np.random.default_rng(5).choice(10_000, 150_000, p=weights / weights.sum())
    store = CountingStore(**{str(user): record(100) for user in range(10_000)})
    one = CachedStore(store, CONFIG)
    one.get("0")
    room = 6000 * (one.statistics().bytes + 3)
    cache = CachedStore(store, dataclasses.replace(CONFIG, max_bytes=room, ttl_seconds=600.0))
    for user in drawn.tolist():
        cache.get(str(user))
    statistics = cache.statistics()
    assert statistics.entries <= 6000
    assert statistics.hit_ratio > 0.9  # cold start included
    assert statistics.hits + statistics.misses == len(drawn)


def test_negative_settings_are_refused() -> None:
    for field in dataclasses.fields(CacheConfig):
        with pytest.raises(ConfigurationError, match=f"{field.name} must not be negative"):
            CacheConfig(**{field.name: -1})


def test_metrics_grow_by_what_happened_since() -> None:
    metrics = FeatureMetrics()
    metrics.count(("cold_start",))
    first = {spec.name: value for spec, value in metrics.changes(CacheStatistics(hits=5, entries=3, load_seconds=0.5))}
    metrics.count(("cold_start", "stale_features"))
    second = {
        (spec.name, *spec.labels): value
        for spec, value in metrics.changes(CacheStatistics(hits=7, entries=2, load_seconds=0.75))
    }
    assert first["mtgr_features_cache_hits_total"] == 5
    assert first["mtgr_features_labels_total"] == 1
    assert second[("mtgr_features_cache_hits_total",)] == 2
    assert second[("mtgr_features_cache_entries",)] == 2
    assert second[("mtgr_features_store_seconds",)] == 0.25
    assert second["mtgr_features_labels_total", ("label", "cold_start")] == 1
    assert second["mtgr_features_labels_total", ("label", "stale_features")] == 1


# In front of real stores.


def test_events_that_another_process_appends_to_a_file_are_seen(tmp_path: Any) -> None:
    writer = SQLiteStore.create(tmp_path / "store.sqlite")
    cache = CachedStore(SQLiteStore(tmp_path / "store.sqlite", writable=True))
    assert_sees_appended_events(cache, writer)


def test_events_that_another_process_appends_to_redis_are_seen(redis_server: RedisServer) -> None:
    writer = RedisStore(redis_server.url, timeout=5.0)
    cache = CachedStore(RedisStore(redis_server.url, timeout=5.0))
    time.sleep(0.2)  # until the subscription is taken up
    assert_sees_appended_events(cache, writer)


def assert_sees_appended_events(cache: CachedStore, writer: Any) -> None:
    assert cache.get("ann") is None
    for count in range(1, 4):
        writer.append_events("ann", [count], [0], [count])
        deadline = time.monotonic() + 2.0
        while (found := cache.get("ann")) is None or len(found.items) < count:
            assert time.monotonic() < deadline, "the cache keeps what is no longer true"
            time.sleep(0.005)
    loads = cache.statistics().loads
    for _ in range(10):
        cache.get("ann")
    assert cache.statistics().loads == loads
    cache.close()
    writer.close()


def test_redis_dies_and_comes_back(redis_server: RedisServer) -> None:
    store = RedisStore(redis_server.url, timeout=1.0)
    store.put_user("ann", record())
    cache = CachedStore(store, dataclasses.replace(CONFIG, ttl_seconds=0.05, retry_seconds=0.05))
    fresh = cache.get("ann")
    assert fresh is not None
    assert not fresh.stale
    while not cache.statistics().invalidations:  # as it subscribes
        time.sleep(0.01)
    redis_server.kill()
    time.sleep(0.1)
    stale = cache.get("ann")
    assert stale is not None
    assert stale.stale
    np.testing.assert_array_equal(stale.items, fresh.items)
    with pytest.raises(UnavailableError):
        cache.get("bob")
    redis_server.start()
    RedisStore(redis_server.url, timeout=1.0).put_user("ann", record(7))
    time.sleep(0.1)
    back = cache.get("ann")
    assert back is not None
    assert (back.stale, len(back.items)) == (False, 7)
    cache.close()
