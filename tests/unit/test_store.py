"""Feature stores, embedded and in Redis: what is written comes back in order, damage is an error with a sentence."""

from __future__ import annotations

import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mtgr.errors import ConfigurationError, InvalidRequestError, UnavailableError
from mtgr.features.context import context_rows
from mtgr.features.encoding import decode_record
from mtgr.features.redis import EVENTS_PREFIX, FOLD_BLOCKS, RECORD_PREFIX, RedisStore
from mtgr.features.sqlite import SQLiteStore, write_store
from mtgr.features.store import DamagedRecordError, FeatureStore, HistoryLimit, UserRecord
from mtgr.serving.ports import free_ports
from tests.unit.models import small_catalog, small_schema
from tests.unit.records import assert_equal, record
from tests.unit.redis_server import RedisServer

LIMIT = HistoryLimit(max_history=200, realtime_step=50)
Opener = Callable[[], FeatureStore]


def many(count: int) -> list[tuple[str, UserRecord]]:
    return [(f"user-{index}", record(50, index)) for index in range(count)]


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


@pytest.fixture(params=["sqlite", "redis"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens one and the same store as often as a test likes."""
    stores: list[FeatureStore] = []
    if request.param == "sqlite":
        SQLiteStore.create(tmp_path / "store.sqlite").close()
    server = request.getfixturevalue("redis_server") if request.param == "redis" else None

    def open_store() -> FeatureStore:
        stores.append(
            SQLiteStore(tmp_path / "store.sqlite", LIMIT, writable=True)
            if server is None
            else RedisStore(server.url, LIMIT, timeout=5.0)
        )
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def store(opened: Opener) -> FeatureStore:
    return opened()


def append(store: FeatureStore, user_id: str, times: list[int], first_item: int = 0) -> None:
    """Events with items first_item, first_item + 1, ..."""
    store.append_events(user_id, range(first_item, first_item + len(times)), [1] * len(times), times)


# What both stores do.


def test_round_trip(store: FeatureStore) -> None:
    users = {"b": record(3), "a": record(0), "日本 '\"; DROP TABLE users": record(200, 1), "nobody": UserRecord()}
    for user_id, expected in users.items():
        store.put_user(user_id, expected)
    for user_id, expected in users.items():
        assert_equal(store.get(user_id), expected)
    assert set(store.user_ids()) == set(users)


def test_many_at_once(store: FeatureStore) -> None:
    store.put_many(many(30))
    append(store, "new", [5, 6])
    wanted = ["user-7", "nobody", "user-3", "new", "user-7"]
    found = store.get_many(wanted)
    assert [one is None for one in found] == [False, True, False, False, False]
    assert_equal(found[0], record(50, 7))
    assert_equal(found[2], record(50, 3))
    assert found[3] is not None
    assert found[3].times.tolist() == [5, 6]
    assert store.get_many([]) == []
    assert len(store.user_ids()) == 31


def test_unknown_users_have_no_record(store: FeatureStore) -> None:
    store.put_many(many(2))
    for user_id in ("", "user-", "user-2", "USER-1", "user-1 ", "%", "*"):
        assert store.get(user_id) is None


def test_a_user_is_replaced_as_a_whole(store: FeatureStore) -> None:
    store.put_user("ann", record(40))
    append(store, "ann", [2**34 + 1])
    store.put_user("ann", record(3, seed=5))
    assert_equal(store.get("ann"), record(3, seed=5))


def test_events_are_added_behind_the_profile(store: FeatureStore) -> None:
    before = record(10)
    store.put_user("ann", before)
    store.append_events("ann", [7, 2**40], [0, 4], [2**34 + 1, 2**34 + 2])
    found = store.get("ann")
    assert found is not None
    assert found.profile == before.profile
    assert found.items[-2:].tolist() == [7, 2**40]
    assert found.actions[-2:].tolist() == [0, 4]
    assert len(found.times) == 12


def test_late_and_repeated_events_come_out_by_time_and_arrival(store: FeatureStore) -> None:
    append(store, "ann", [50, 10, 50], first_item=0)  # items 0, 1, 2
    append(store, "ann", [30], first_item=3)
    append(store, "ann", [50, 10], first_item=4)  # items 4, 5
    append(store, "ann", [30], first_item=3)  # the same event once more
    found = store.get("ann")
    assert found is not None
    assert found.times.tolist() == [10, 10, 30, 30, 50, 50, 50]
    assert found.items.tolist() == [1, 5, 3, 3, 0, 2, 4]


def test_an_unordered_record_is_ordered_when_written(store: FeatureStore) -> None:
    store.put_user("ann", UserRecord({}, np.array([1, 2, 3]), np.zeros(3, dtype=np.int32), np.array([9, 5, 9])))
    found = store.get("ann")
    assert found is not None
    assert found.items.tolist() == [2, 1, 3]


@pytest.mark.parametrize("block", [1, 7, 49, 50, 130, 700])
def test_length_is_bounded_and_trimmed_in_steps(store: FeatureStore, block: int) -> None:
    total = 700
    for start in range(0, total, block):
        append(store, "ann", list(range(start, min(start + block, total))), first_item=start)
    found = store.get("ann")
    assert found is not None
    # All but the oldest, in order, and as many dropped as S and R need to meet at the same event.
    first = int(found.items[0])
    assert first % LIMIT.realtime_step == 0
    assert found.items.tolist() == list(range(first, total))
    assert len(found.items) == 200  # 700 is a multiple of the step: R is empty
    assert len(found.items) <= LIMIT.max_events


def test_a_long_record_is_trimmed_when_written(store: FeatureStore) -> None:
    store.put_user("ann", UserRecord({}, np.arange(777), np.zeros(777, dtype=np.int32), np.arange(777)))
    found = store.get("ann")
    assert found is not None
    assert found.items.tolist() == list(range(550, 777))


def test_trimming_does_not_change_a_context(store: FeatureStore) -> None:
    schema, catalog = small_schema(), small_catalog()
    generator = np.random.default_rng(1)
    limit = HistoryLimit.of(schema)
    total = 3 * limit.max_events
    items = generator.choice(catalog.raw_ids, total)
    actions = generator.integers(0, schema.num_actions, total).astype(np.int32)
    times = schema.epoch + np.sort(generator.integers(0, 10_000, total))
    store._limit = limit  # type: ignore[attr-defined]
    position = 0
    while position < total:
        size = int(generator.integers(1, 40))
        part = slice(position, min(position + size, total))
        store.append_events("ann", items[part], actions[part], times[part])
        position = part.stop
        found = store.get("ann")
        assert found is not None
        kept = context_rows(schema, {}, catalog.to_internal(found.items), found.actions, found.times)
        whole = context_rows(schema, {}, catalog.to_internal(items[:position]), actions[:position], times[:position])
        # The first event of all has no gap to an earlier one; what was dropped cannot give it one.
        gap = 2 + schema.event_columns.index("gap")
        first = len(schema.profile)
        kept[first, gap] = whole[first, gap]
        np.testing.assert_array_equal(kept, whole)


def test_concurrent_writers_lose_nothing(opened: Opener) -> None:
    writers, each = 4, 45
    stores = [opened() for _ in range(writers)]

    def write(index: int) -> None:
        for event in range(each):
            append(stores[index], "ann", [event], first_item=1000 * index + event)

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))
    found = stores[0].get("ann")
    assert found is not None
    expected = sorted(1000 * index + event for index in range(writers) for event in range(each))
    assert sorted(found.items.tolist()) == expected


def test_one_store_serves_many_threads(store: FeatureStore) -> None:
    store.put_many(many(50))
    with ThreadPoolExecutor(8) as pool:
        for (_, expected), found in zip(many(50) * 4, pool.map(store.get, [u for u, _ in many(50)] * 4), strict=True):
            assert_equal(found, expected)


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (([1, 2], [1], [5, 6]), "lengths 2, 1, 2"),
        (([-1], [1], [5]), "items holds -1 at index 0"),
        (([1], [2**31], [5]), "actions holds 2147483648 at index 0"),
        (([1, 1], [1, 1], [5, 1_700_000_000_000]), "milliseconds"),
        (([1.5], [1], [5]), "list of integers"),
        (([[1]], [[1]], [[5]]), "list of integers"),
    ],
)
def test_wrong_events_are_refused_as_a_whole(store: FeatureStore, events: tuple[list[int], ...], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        store.append_events("ann", *events)
    assert store.get("ann") is None


def test_nothing_to_append_is_no_event(store: FeatureStore) -> None:
    store.put_user("ann", record(3))
    store.append_events("ann", [], [], [])
    assert_equal(store.get("ann"), record(3))


def test_listeners_hear_of_changes_by_others(opened: Opener) -> None:
    reader, writer = opened(), opened()
    heard: list[str | None] = []
    reader.subscribe(heard.append)
    time.sleep(0.2)  # until Redis has taken the subscription up
    heard.clear()
    append(writer, "ann", [1])
    wait_until(lambda: "ann" in heard)
    writer.put_user("bob", record(1))
    wait_until(lambda: "bob" in heard)
    assert set(heard) == {"ann", "bob"}
    reader.get("ann")
    time.sleep(0.2)
    assert len(heard) == 2


# The embedded store alone.


def test_users_keep_their_order(tmp_path: Path) -> None:
    users = [("b", record(3)), ("a", record(0)), ("c", record(2000, 1))]
    write_store(tmp_path / "store.sqlite", users)
    store = SQLiteStore(tmp_path / "store.sqlite")
    assert store.user_ids() == ["b", "a", "c"]
    for user_id, expected in users:
        assert_equal(store.get(user_id), expected)


def test_one_user_cannot_be_written_twice(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        write_store(tmp_path / "store.sqlite", [("a", record(1)), ("a", record(2))])


def test_a_missing_file_says_what_to_run(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.sqlite", tmp_path):
        with pytest.raises(ConfigurationError, match="make export"):
            SQLiteStore(path)
    assert not (tmp_path / "nothing.sqlite").exists()


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    noise = tmp_path / "noise.sqlite"
    noise.write_bytes(np.random.default_rng(0).bytes(10_000))
    empty = tmp_path / "empty.sqlite"
    empty.touch()
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE users (name TEXT)")
    newer = tmp_path / "newer.sqlite"
    write_store(newer, many(1))
    with sqlite3.connect(newer) as database:
        database.execute("PRAGMA user_version = 3")
    for path in (noise, empty, other, newer):
        for writable in (False, True):
            with pytest.raises(ConfigurationError, match="is not a feature store"):
                SQLiteStore(path, writable=writable)


def test_a_page_that_is_damaged_later_makes_the_store_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    write_store(path, many(2000))
    store = SQLiteStore(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 4)
        file.write(b"\xff" * (size // 2))

    def read_everyone() -> None:
        for user_id, _ in many(2000):
            store.get(user_id)

    with pytest.raises(UnavailableError, match="cannot be read"):
        read_everyone()


def test_reading_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    write_store(path, many(3))
    before = path.read_bytes()
    path.chmod(0o444)
    store = SQLiteStore(path)
    store.get("user-1")
    store.subscribe(lambda user_id: None)
    with pytest.raises(ConfigurationError, match="read-only; name a writable copy"):
        append(store, "user-1", [1])
    store.close()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["store.sqlite"]


def test_a_failed_transaction_leaves_nothing_behind(tmp_path: Path) -> None:
    store = SQLiteStore.create(tmp_path / "store.sqlite")

    def records() -> Iterator[tuple[str, UserRecord]]:
        yield "ann", record(3)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        store.put_many(records())
    assert store.get("ann") is None
    store.put_user("ann", record(3))
    store.close()


# Redis alone.


def test_waiting_events_are_folded_into_the_record(redis_server: RedisServer) -> None:
    store = RedisStore(redis_server.url, LIMIT, timeout=5.0)
    client = redis_server.client()
    lengths = []
    for event in range(2 * FOLD_BLOCKS):
        append(store, "ann", [event], first_item=event)
        lengths.append(client.llen(EVENTS_PREFIX + "ann"))
    assert max(lengths) == FOLD_BLOCKS - 1
    assert lengths[-1] == 0
    assert len(decode_record(client.get(RECORD_PREFIX + "ann")).items) == 2 * FOLD_BLOCKS  # type: ignore[arg-type]
    store.close()


def test_a_server_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    store = RedisStore("redis://ann:secret@127.0.0.1:1/0", LIMIT)
    for call in (lambda: store.get("ann"), lambda: append(store, "ann", [1]), lambda: store.user_ids()):
        with pytest.raises(UnavailableError, match=r"redis://127.0.0.1:1/0 cannot be used") as caught:
            call()
        assert "secret" not in str(caught.value)
    store.close()


def test_a_server_that_hangs_is_given_up(redis_server: RedisServer) -> None:
    store = RedisStore(redis_server.url, LIMIT, timeout=0.1)
    store.put_user("ann", record(3))
    redis_server.pause()
    try:
        start = time.monotonic()
        with pytest.raises(UnavailableError, match="does not answer in time"):
            store.get("ann")
        assert time.monotonic() - start < 1.0
    finally:
        redis_server.resume()
    assert_equal(store.get("ann"), record(3))
    store.close()


def test_a_server_that_comes_back_is_used_again(redis_server: RedisServer) -> None:
    store = RedisStore(redis_server.url, LIMIT, timeout=1.0)
    store.put_user("ann", record(3))
    heard: list[str | None] = []
    store.subscribe(heard.append)
    wait_until(lambda: heard == [None])
    redis_server.kill()
    with pytest.raises(UnavailableError):
        store.get("ann")
    redis_server.start()
    assert store.get("ann") is None  # it kept nothing on disk
    wait_until(lambda: heard == [None, None])  # changes may have been missed meanwhile
    append(store, "ann", [1])
    wait_until(lambda: heard[-1] == "ann")
    store.close()


def test_a_silent_connection_is_made_anew(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtgr.features.redis._LISTEN_SECONDS", 0.1)
    store = RedisStore(redis_server.url, LIMIT, timeout=0.2)
    heard: list[str | None] = []
    store.subscribe(heard.append)
    wait_until(lambda: heard == [None])
    time.sleep(0.6)  # quiet, but it answers
    assert heard == [None]
    redis_server.pause()
    time.sleep(1.0)
    redis_server.resume()
    wait_until(lambda: heard == [None, None])
    append(store, "ann", [1])
    wait_until(lambda: heard[-1] == "ann")
    store.close()


def test_a_damaged_record_is_the_trouble_of_one_user(redis_server: RedisServer) -> None:
    store = RedisStore(redis_server.url, LIMIT, timeout=5.0)
    store.put_many(many(2))
    redis_server.client().set(RECORD_PREFIX + "user-0", b"noise")
    with pytest.raises(DamagedRecordError, match="damaged"):
        store.get("user-0")
    assert_equal(store.get("user-1"), record(50, 1))
    store.close()


def test_threads_that_wait_end_with_the_store(opened: Opener) -> None:
    store = opened()
    before = threading.active_count()
    store.subscribe(lambda user_id: None)
    assert threading.active_count() == before + 1
    store.close()
    assert threading.active_count() == before


def test_user_and_password_open_the_door() -> None:
    with tempfile.TemporaryDirectory() as directory:
        server = RedisServer(Path(directory), "--requirepass", "p@ss")
        try:
            store = RedisStore(f"unix://default:p%40ss@{server.socket}", LIMIT, timeout=5.0)
            append(store, "ann", [1])
            assert store.get("ann") is not None
            store.close()
            for url in (f"unix://default:wrong@{server.socket}", server.url):
                store = RedisStore(url, LIMIT, timeout=5.0)
                with pytest.raises(UnavailableError, match="credentials") as caught:
                    store.get("ann")
                assert "wrong@" not in str(caught.value)
                store.close()
        finally:
            server.kill()


def test_tls_checks_the_server(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    (port,) = free_ports("127.0.0.1", 1)
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    made = ("-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "2")
    subprocess.run(["openssl", "req", "-x509", *made, *subject], check=True, capture_output=True)
    options = ("--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key))
    with tempfile.TemporaryDirectory() as directory:
        server = RedisServer(Path(directory), *options, "--tls-auth-clients", "no", "--bind", "127.0.0.1")
        try:
            store = RedisStore(f"rediss://localhost:{port}/0?ssl_ca_certs={certificate}", LIMIT, timeout=5.0)
            append(store, "ann", [1])
            assert store.get("ann") is not None
            store.close()
            stranger = RedisStore(f"rediss://localhost:{port}/0", LIMIT, timeout=5.0)
            with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
                stranger.get("ann")
            stranger.close()
        finally:
            server.kill()
