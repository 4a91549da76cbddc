"""What a dataset gives to training and serving: interactions, users, items, and tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
Int8Array = npt.NDArray[np.int8]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Interactions:
    """Events in columns of equal length E, sorted by (user, time, position in the source file).

    Attributes:
        user: INT64 [E], index into ``Dataset.users()``.
        item: INT64 [E], the dataset's own item ids.
        action: INT32 [E], what the user did, from 0 (MovieLens: rating - 1).
        time: INT64 [E], unix seconds.
    """

    user: Int64Array
    item: Int64Array
    action: Int32Array
    time: Int64Array

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: npt.NDArray[np.int64] | BoolArray) -> Interactions:
        """The events at ``index`` (integers or a boolean mask), in that order."""
        return Interactions(self.user[index], self.item[index], self.action[index], self.time[index])

    def offsets(self, num_users: int) -> Int64Array:
        """INT64 [num_users + 1]: the events of user u are ``offsets[u]:offsets[u + 1]``."""
        return np.searchsorted(self.user, np.arange(num_users + 1)).astype(np.int64)


@dataclass(frozen=True)
class Item:
    """Static facts about an item."""

    id: int
    title: str
    categories: tuple[str, ...]
    year: int | None


@dataclass(frozen=True)
class User:
    """A user's id, as requests carry it, and scalar profile features."""

    id: str
    profile: Mapping[str, str | int]


@dataclass(frozen=True)
class Task:
    """A binary target.

    Attributes:
        name: engagement, retention or monetization.
        definition: One line that says when the label is 1.
        label: Maps all interactions a viewer may know of to INT8 [E] labels.
        looks_ahead: Whether a label depends on events after its own.
    """

    name: str
    definition: str
    label: Callable[[Interactions], Int8Array]
    looks_ahead: bool = False


class Dataset(Protocol):
    """Everything training needs; a second dataset implements these five members."""

    @property
    def name(self) -> str:
        """Short name, used in schemas and paths."""

    def interactions(self) -> Interactions:
        """All events."""

    def users(self) -> list[User]:
        """All users; ``Interactions.user`` indexes this list."""

    def items(self) -> list[Item]:
        """All items, in ascending order of id."""

    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in the order of the model's heads."""
