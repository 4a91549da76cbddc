"""The embedded feature store: one SQLite file, in the process that asks."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.features.encoding import decode_record, encode_record
from mtgr.features.store import HistoryLimit, Listener, UserRecord, checked_events, merged

LAYOUT = 2  # the file's `user_version`; 1 and 0 had a column for each array
_CREATE = (
    "CREATE TABLE users (user_id TEXT PRIMARY KEY, record BLOB NOT NULL, revision INTEGER NOT NULL)",
    "CREATE INDEX revisions ON users (revision)",
    f"PRAGMA user_version = {LAYOUT}",
)
_SELECT = "SELECT record FROM users WHERE user_id = ?"
# Revisions only grow, so that what changed since a revision is found by its index.
_PUT = (
    "INSERT INTO users VALUES (?, ?, (SELECT COALESCE(MAX(revision), 0) + 1 FROM users)) "
    "ON CONFLICT (user_id) DO UPDATE SET record = excluded.record, revision = excluded.revision"
)
_BUSY_SECONDS = 5.0
_POLL_SECONDS = 0.05


class SQLiteStore:
    """Records in one SQLite file; a look-up takes tens of microseconds.

    Opened read-only, the file is taken to stay as it is. Opened writable, it is kept in WAL mode, and several processes
    may read and write it at once.

    Args:
        path: The file, written by ``write_store`` or ``create``.
        limit: Events that are kept of a user; None keeps all.
        writable: Whether users and events can be written.

    Raises:
        ConfigurationError: If the file is missing or not such a store.
    """

    def __init__(self, path: Path, limit: HistoryLimit | None = None, *, writable: bool = False) -> None:
        if not path.is_file():
            raise ConfigurationError(f"there is no feature store at {path}; run `make train` and `make export`.")
        self._path = path
        self._limit = limit
        self._writable = writable
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._poller: threading.Thread | None = None
        try:
            self._database = self._connect()
            layout = self._database.execute("PRAGMA user_version").fetchone()[0]
            self._database.execute("SELECT user_id, record, revision FROM users LIMIT 1").fetchone()
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(
                f"{path} is not a feature store of this release ({error}); run `make export` again, or "
                "`python -m mtgr.training --force` if it is a checkpoint's."
            ) from error
        if layout != LAYOUT:
            raise ConfigurationError(
                f"{path} is not a feature store of this release (layout {layout} instead of {LAYOUT}); make it again."
            )

    @classmethod
    def create(cls, path: Path, limit: HistoryLimit | None = None) -> SQLiteStore:
        """Open the file for writing, and make it first if there is none."""
        if not path.exists():
            write_store(path, ())
        return cls(path, limit, writable=True)

    def get(self, user_id: str) -> UserRecord | None:
        """The record of a user, or None if the user is not known.

        Raises:
            UnavailableError: If the file can no longer be read, or the record is damaged.
        """
        with self._lock:
            rows = self._execute(_SELECT, (user_id,))
        return decode_record(rows[0][0]) if rows else None

    def get_many(self, user_ids: Sequence[str]) -> list[UserRecord | None]:
        """Records in the order of ``user_ids``, None for users that are not known."""
        return [self.get(user_id) for user_id in user_ids]

    def put_user(self, user_id: str, record: UserRecord) -> None:
        """Replace all that is stored of a user, or add the user."""
        self.put_many([(user_id, record)])

    def put_many(self, records: Iterable[tuple[str, UserRecord]]) -> None:
        """``put_user`` for each record, in one transaction."""
        with self._transaction():
            for user_id, record in records:
                self._execute(_PUT, (user_id, encode_record(merged([record], self._limit))))

    def append_events(self, user_id: str, items: npt.ArrayLike, actions: npt.ArrayLike, times: npt.ArrayLike) -> None:
        """Add events of a user, known or new, in one transaction; see ``FeatureStore``."""
        events = checked_events(items, actions, times)
        if not len(events.items):
            return
        with self._transaction():
            rows = self._execute(_SELECT, (user_id,))
            record = decode_record(rows[0][0]) if rows else UserRecord()
            self._execute(_PUT, (user_id, encode_record(merged([record, events], self._limit))))

    def user_ids(self) -> list[str]:
        """All known users, in the order they were first written."""
        with self._lock:
            rows = self._execute("SELECT user_id FROM users ORDER BY rowid")
        return [row[0] for row in rows]

    def subscribe(self, listener: Listener) -> None:
        """Call ``listener`` after every change, within a twentieth of a second; a read-only file does not change."""
        if not self._writable:
            return
        last = self._revision(self._database)
        self._poller = threading.Thread(target=self._poll, args=(listener, last), name="store-changes", daemon=True)
        self._poller.start()

    def close(self) -> None:
        """Close the file."""
        self._closed.set()
        if self._poller is not None:
            self._poller.join()
        self._database.close()

    def _connect(self) -> sqlite3.Connection:
        # `immutable` skips locks and journals: a read-only file is replaced as a whole, never written in place.
        mode = "mode=rw" if self._writable else "mode=ro&immutable=1"
        database = sqlite3.connect(
            f"{self._path.absolute().as_uri()}?{mode}",
            uri=True,
            check_same_thread=False,
            isolation_level=None,
            timeout=_BUSY_SECONDS,
        )
        if self._writable:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
        return database

    def _execute(self, query: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise UnavailableError(
                f"the feature store cannot be read or written ({error}); try again later."
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if not self._writable:
            raise ConfigurationError(
                f"{self._path} is opened read-only; name a writable copy as sqlite:///path, or a Redis server."
            )
        with self._lock:
            self._execute("BEGIN IMMEDIATE")
            try:
                yield
                self._execute("COMMIT")
            except BaseException:
                # Fails where SQLite itself has rolled back already.
                with suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                raise

    def _poll(self, listener: Listener, last: int) -> None:
        with closing(self._connect()) as database:
            version = None
            while not self._closed.wait(_POLL_SECONDS):
                try:
                    seen = database.execute("PRAGMA data_version").fetchone()[0]
                    if seen == version:
                        continue
                    rows = database.execute(
                        "SELECT user_id, revision FROM users WHERE revision > ? ORDER BY revision", (last,)
                    ).fetchall()
                    version = seen
                except sqlite3.Error:  # changes may be missed: whoever keeps records must ask again
                    listener(None)
                    continue
                for user_id, _ in rows:
                    listener(user_id)
                last = rows[-1][1] if rows else last

    @staticmethod
    def _revision(database: sqlite3.Connection) -> int:
        return int(database.execute("SELECT COALESCE(MAX(revision), 0) FROM users").fetchone()[0])


def write_store(path: Path, records: Iterable[tuple[str, UserRecord]]) -> None:
    """Write records, untrimmed, into a new store at ``path``, which must not exist yet."""
    rows = ((user_id, encode_record(merged([record], None))) for user_id, record in records)
    with closing(sqlite3.connect(path)) as database, database:
        for statement in _CREATE:
            database.execute(statement)
        database.executemany("INSERT INTO users VALUES (?, ?, 0)", rows)
