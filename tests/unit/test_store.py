"""The embedded feature store: what is written comes back, and damage is an error with a sentence."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.features.store import SQLiteStore, UserRecord, write_store


def record(events: int, seed: int = 0) -> UserRecord:
    generator = np.random.default_rng(seed)
    return UserRecord(
        {"age": 30, "score": 1.5, "gender": "Ü"},
        generator.integers(-(2**62), 2**62, events),
        generator.integers(0, 5, events).astype(np.int32),
        np.sort(generator.integers(0, 2**40, events)),
    )


def many(count: int) -> list[tuple[str, UserRecord]]:
    return [(f"user-{index}", record(50, index)) for index in range(count)]


def assert_equal(found: UserRecord | None, expected: UserRecord) -> None:
    assert found is not None
    assert found.profile == expected.profile
    for name, dtype in (("items", np.int64), ("actions", np.int32), ("times", np.int64)):
        array = getattr(found, name)
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, getattr(expected, name))


def test_round_trip(tmp_path: Path) -> None:
    users = [
        ("b", record(3)),
        ("a", record(0)),
        ("日本 '\"; DROP TABLE users", record(2000, 1)),
        ("nobody", UserRecord()),
    ]
    write_store(tmp_path / "store.sqlite", users)
    store = SQLiteStore(tmp_path / "store.sqlite")
    for user_id, expected in users:
        assert_equal(store.get(user_id), expected)
    assert store.user_ids() == [user_id for user_id, _ in users]
    store.close()


def test_unknown_users_have_no_record(tmp_path: Path) -> None:
    write_store(tmp_path / "store.sqlite", many(2))
    store = SQLiteStore(tmp_path / "store.sqlite")
    for user_id in ("", "user-", "user-2", "USER-1", "user-1 ", "%"):
        assert store.get(user_id) is None


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
    for path in (noise, empty, other):
        with pytest.raises(ConfigurationError, match="is not a feature store"):
            SQLiteStore(path)


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
    store.close()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["store.sqlite"]
