"""The feature store: who a user is and what the user did."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mtgr.errors import ConfigurationError, UnavailableError

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class UserRecord:
    """What is stored of one user.

    Attributes:
        profile: Profile values by field name.
        items: INT64 [E], raw item ids, ascending in time.
        actions: INT32 [E], actions from 0.
        times: INT64 [E], unix seconds.
    """

    profile: Mapping[str, str | float] = field(default_factory=dict)
    items: Int64Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    actions: Int32Array = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    times: Int64Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))


class FeatureStore(Protocol):
    """Where records come from."""

    def get(self, user_id: str) -> UserRecord | None:
        """The record of a user, or None if the user is not known.

        Raises:
            UnavailableError: If the store cannot answer now.
        """


class SQLiteStore:
    """Records in one SQLite file, opened read-only; a look-up takes tens of microseconds.

    Not thread-safe: one store per thread.

    Args:
        path: The file, written by ``write_store``.

    Raises:
        ConfigurationError: If the file is missing or not such a store.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigurationError(f"there is no feature store at {path}; run `make train` and `make export`.")
        # `immutable` skips locks and journals: the file is replaced as a whole, never written in place.
        self._database = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )
        try:
            self._database.execute("SELECT user_id, profile, items, actions, times FROM users LIMIT 1").fetchone()
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(f"{path} is not a feature store ({error}); run `make export` again.") from error

    def get(self, user_id: str) -> UserRecord | None:
        """The record of a user, or None if the user is not known.

        Raises:
            UnavailableError: If the file can no longer be read, or the record is damaged.
        """
        query = "SELECT profile, items, actions, times FROM users WHERE user_id = ?"
        try:
            row = self._database.execute(query, (user_id,)).fetchone()
        except sqlite3.Error as error:
            raise UnavailableError(f"the feature store cannot be read ({error}); try again later.") from error
        if row is None:
            return None
        try:
            return UserRecord(
                json.loads(row[0]),
                np.frombuffer(row[1], dtype="<i8"),
                np.frombuffer(row[2], dtype="<i4"),
                np.frombuffer(row[3], dtype="<i8"),
            )
        except ValueError as error:
            raise UnavailableError(f"the feature store's record of this user is damaged: {error}.") from error

    def user_ids(self) -> list[str]:
        """All known users, in the order they were written."""
        return [row[0] for row in self._database.execute("SELECT user_id FROM users ORDER BY rowid")]

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def write_store(path: Path, records: Iterable[tuple[str, UserRecord]]) -> None:
    """Write records into a new store at ``path``, which must not exist yet."""

    def rows() -> Iterator[tuple[str, str, bytes, bytes, bytes]]:
        for user_id, record in records:
            yield (
                user_id,
                json.dumps(dict(record.profile)),
                record.items.astype("<i8").tobytes(),
                record.actions.astype("<i4").tobytes(),
                record.times.astype("<i8").tobytes(),
            )

    with closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "CREATE TABLE users (user_id TEXT PRIMARY KEY, profile TEXT NOT NULL, "
            "items BLOB NOT NULL, actions BLOB NOT NULL, times BLOB NOT NULL)"
        )
        database.executemany("INSERT INTO users VALUES (?, ?, ?, ?, ?)", rows())
