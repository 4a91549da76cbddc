"""User records out of a Parquet file of events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mtgr.errors import ConfigurationError, InvalidRequestError
from mtgr.features.store import UserRecord, checked_events

COLUMNS = ("user_id", "item_id", "action", "time")
PROFILE_COLUMN = "profile"


def read_parquet(path: Path) -> tuple[int, Iterator[tuple[str, UserRecord]]]:
    """How many users a file holds, and their records.

    Rows may be in any order; those of one second stay in the order of the file.

    Args:
        path: Columns ``user_id`` (text or integers), ``item_id``, ``action``, ``time`` (integers; unix seconds), and
            perhaps ``profile`` (a JSON object as text; a user's last one counts).

    Raises:
        ConfigurationError: If pyarrow is not installed, or the file is not such a table.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow import parquet as pq
    except ImportError as error:
        raise ConfigurationError("reading Parquet needs pyarrow: pip install 'mtgr[parquet]'.") from error
    try:
        table: Any = pq.read_table(path)
    except (OSError, ArrowException) as error:
        raise ConfigurationError(f"{path} cannot be read as Parquet: {error}.") from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ConfigurationError(f"{path} has no column {missing[0]!r}; it needs {', '.join(COLUMNS)}.")
    empty = [name for name in COLUMNS if table[name].null_count]
    if empty:
        raise ConfigurationError(f"{path} has rows without {empty[0]}; leave them out.")
    try:
        events = checked_events(*(table[name].to_numpy() for name in COLUMNS[1:]))
    except InvalidRequestError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    names, user = np.unique(table["user_id"].to_numpy().astype(str), return_inverse=True)
    order = np.argsort(user, kind="stable")
    ends = np.searchsorted(user[order], np.arange(len(names)), side="right")
    profiles = table[PROFILE_COLUMN].to_pylist() if PROFILE_COLUMN in table.column_names else None

    def records() -> Iterator[tuple[str, UserRecord]]:
        for name, start, end in zip(names.tolist(), [0, *ends[:-1]], ends, strict=True):
            own = order[start:end]
            texts = [profiles[row] for row in own if profiles[row]] if profiles else []
            profile = _profile(path, name, texts[-1]) if texts else {}
            yield name, UserRecord(profile, events.items[own], events.actions[own], events.times[own])

    return len(names), records()


def _profile(path: Path, user_id: str, text: str) -> dict[str, str | float]:
    try:
        profile = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"{path}: the profile of user {user_id!r} is not JSON.") from error
    if not isinstance(profile, dict):
        raise ConfigurationError(f"{path}: the profile of user {user_id!r} is not a JSON object.")
    return profile
