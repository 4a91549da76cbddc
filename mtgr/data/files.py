"""Files of datasets that users have to fetch themselves: where they are looked for, and checks of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mtgr.data.dataset import Int32Array, Int64Array, Interactions
from mtgr.errors import ConfigurationError, UnavailableError


@dataclass(frozen=True)
class Counts:
    """What a complete copy of a dataset holds.

    Attributes:
        events: Rows of the log.
        users: Users.
        items: Items.
    """

    events: int
    users: int
    items: int

    def check(self, dataset: str, folder: Path, found: Counts) -> None:
        """Compare with what was read.

        Raises:
            ConfigurationError: If a number differs.
        """
        for name in ("events", "users", "items"):
            if getattr(self, name) != getattr(found, name):
                raise ConfigurationError(
                    f"{dataset} has {getattr(self, name):,} {name}, but {getattr(found, name):,} were read in "
                    f"{folder}: unpack the published archive there again."
                )


def required_file(folder: Path, name: str, dataset: str, fetch: str) -> Path:
    """The path of ``name`` in ``folder``.

    Args:
        folder: Where the files belong.
        name: The file.
        dataset: Name of the dataset in messages.
        fetch: What the user does to get it: one clause.

    Raises:
        UnavailableError: If the file is not there.
    """
    path = folder / name
    if not path.is_file():
        raise UnavailableError(f"{dataset} is not here ({path} is missing): {fetch}.")
    return path


def check_header(path: Path, needed: Sequence[str]) -> dict[str, int]:
    """Index by column of a CSV file's header.

    Raises:
        ConfigurationError: If a needed column is missing.
    """
    with open(path, encoding="utf-8") as file:
        columns = file.readline().strip().split(",")
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ConfigurationError(f"{path} has no column {missing[0]}: unpack the published archive there again.")
    return {name: index for index, name in enumerate(columns)}


def read_numbers(path: Path, columns: Sequence[int], skip_rows: int, separator: str = ",") -> npt.NDArray[np.float64]:
    """FP64 [rows, columns] of a text file of numbers; exact for ids and times below 2^53.

    Raises:
        ConfigurationError: If a cell is not a number or a row is too short.
    """
    try:
        with open(path, encoding="latin-1") as file:
            lines = (line.replace(separator, ",") for line in file) if separator != "," else file
            return np.loadtxt(lines, delimiter=",", skiprows=skip_rows, usecols=columns, ndmin=2)
    except ValueError as error:
        raise ConfigurationError(f"{path} is damaged ({error}): unpack the published archive there again.") from error


def sorted_interactions(
    user_ids: Int64Array, raw_user: Int64Array, item: Int64Array, action: Int32Array, time: Int64Array
) -> Interactions:
    """Interactions sorted by (user, time, position in the source).

    Args:
        user_ids: INT64 [U], all users in ascending order.
        raw_user: INT64 [E], each one of ``user_ids``.
        item: INT64 [E].
        action: INT32 [E].
        time: INT64 [E], any unit.

    Raises:
        ConfigurationError: If a user is unknown.
    """
    user = np.minimum(np.searchsorted(user_ids, raw_user), len(user_ids) - 1).astype(np.int64)
    unknown = raw_user[user_ids[user] != raw_user]
    if len(unknown):
        raise ConfigurationError(f"user {unknown[0]} of the log is not among the users: unpack the archive again.")
    order = np.lexsort((time, user))  # stable: what happened at one time keeps the order of the file
    return Interactions(user[order], item[order], action[order], time[order])
