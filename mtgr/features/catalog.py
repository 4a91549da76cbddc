"""What is known of items: the id vocabulary, static side features, and statistics over time."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mtgr.data.dataset import Interactions, Item
from mtgr.errors import ConfigurationError
from mtgr.features.buckets import log_bucket, rate_bucket
from mtgr.features.native import INT, NONE, array, compiled, group
from mtgr.schema import FIRST_ID, LOG_COUNT_SIZE, RATE_SIZE, UNKNOWN

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
UInt8Array = npt.NDArray[np.uint8]

CATALOG_FILE = "catalog.safetensors"
SNAPSHOT_PERIOD = 86_400  # seconds: statistics are as of the start of the day, as a nightly job would give them
STRENGTH = 1024  # the strength of the strongest action; the weakest has 0
SIMILARITY = 1024  # the similarity of two items that all of their users share
_NEIGHBOURS = 64
_PRIOR_EVENTS = 2  # events of the overall mean that are added to an item's own
_PRIOR_USERS = 1  # common users at which a similarity is halved
_SPARSE = 4  # a table of raw ids may have so many places for each item
_FIRST_DECADE = 1900
_DECADES = 15


@dataclass(frozen=True)
class ItemCatalog:
    """Items by internal id; ids 0 and 1 are reserved and have no features.

    Attributes:
        raw_ids: INT64 [I - 2], ascending ids as requests carry them; internal id = index + 2.
        features: FP32 [I, F], static side features for the model: categories and decade, each one-hot or multi-hot.
        categories: UINT8 [I, G], 1 where the item has the category.
        popularity: UINT8 [D, I], popularity bucket at the start of snapshot d, from earlier events only.
        liked_rate: UINT8 [D, I], bucketed share of liked events likewise.
        expected: INT32 [I, 2], smoothed means of what ``strength`` says of the item's actions.
        neighbours: INT32 [I, K], items that the same users had events with, the most similar first; 0 where there are
            fewer.
        similarity: INT32 [I, K], similarity to each neighbour, 0 to ``SIMILARITY``.
        first_snapshot: Unix seconds of snapshot 0; snapshots are ``SNAPSHOT_PERIOD`` apart.
    """

    raw_ids: Int64Array
    features: npt.NDArray[np.float32]
    categories: UInt8Array
    popularity: UInt8Array
    liked_rate: UInt8Array
    expected: Int32Array
    neighbours: Int32Array
    similarity: Int32Array
    first_snapshot: int

    @property
    def num_items(self) -> int:
        """Internal ids, reserved ones included."""
        return len(self.raw_ids) + FIRST_ID

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the id vocabulary."""
        return hashlib.sha256(self.raw_ids.astype("<i8").tobytes()).hexdigest()

    def to_internal(self, raw: npt.ArrayLike) -> Int64Array:
        """Internal ids of raw ids; unknown ones get the reserved id."""
        values = np.asarray(raw, dtype=np.int64)
        if self._table is not None:
            # What lies below the first id wraps around to beyond the last one.
            places = (values - self.raw_ids[0]).astype(np.uint64)
            internal: Int64Array = self._table[np.minimum(places, len(self._table) - 1).astype(np.intp)]
            return internal
        index = np.minimum(self.raw_ids.searchsorted(values), len(self.raw_ids) - 1)
        return np.where(self.raw_ids[index] == values, index + FIRST_ID, UNKNOWN)

    @functools.cached_property
    def _table(self) -> Int64Array | None:
        """Internal ids from the first raw id on, the unknown one at the end; None where most places would be empty."""
        if not len(self.raw_ids):
            return None
        span = int(self.raw_ids[-1]) - int(self.raw_ids[0]) + 1
        if span > _SPARSE * len(self.raw_ids):
            return None
        table = np.full(span + 1, UNKNOWN, dtype=np.int64)
        table[self.raw_ids - self.raw_ids[0]] = np.arange(FIRST_ID, self.num_items)
        return table

    def to_raw(self, internal: npt.ArrayLike) -> Int64Array:
        """Raw ids of internal ids, none of them reserved."""
        raw: Int64Array = self.raw_ids[np.asarray(internal, dtype=np.int64) - FIRST_ID]
        return raw

    def save(self, path: Path) -> None:
        """Write the catalog as safetensors."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "raw_ids": self.raw_ids,
            "features": self.features,
            "categories": self.categories,
            "popularity": self.popularity,
            "liked_rate": self.liked_rate,
            "expected": self.expected,
            "neighbours": self.neighbours,
            "similarity": self.similarity,
            "first_snapshot": np.array([self.first_snapshot], dtype=np.int64),
        }
        save_file(arrays, path)

    @classmethod
    def load(cls, path: Path) -> ItemCatalog:
        """Read a catalog written by ``save``.

        Raises:
            ConfigurationError: If the file is missing or damaged.
        """
        try:
            arrays = load_file(path)
            first = int(arrays.pop("first_snapshot")[0])
            catalog = cls(first_snapshot=first, **arrays)
        except FileNotFoundError as error:
            raise ConfigurationError(f"{path} does not exist; run `make train`.") from error
        except (SafetensorError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{path} is not an item catalog ({error}); run `make train` again.") from error
        # Loops look items up without asking how many there are.
        if not catalog.fits():
            raise ConfigurationError(f"{path} has arrays that do not fit together; run `make train` again.")
        return catalog

    def fits(self) -> bool:
        """Whether every array is of its type and has its place for each item, and there is a snapshot."""
        of_items = (self.categories, self.expected, self.neighbours, self.similarity)
        of_days = (self.popularity, self.liked_rate)
        return (
            [array.dtype for array in (self.raw_ids, *of_items, *of_days)]
            == [np.int64, np.uint8, np.int32, np.int32, np.int32, np.uint8, np.uint8]
            and all(array.ndim == 2 and len(array) == self.num_items for array in of_items)
            and all(array.ndim == 2 and array.shape[1] == self.num_items for array in of_days)
            and len(self.popularity) == len(self.liked_rate) > 0
            and self.expected.shape[1] == 2
            and self.neighbours.shape == self.similarity.shape
        )


def build_catalog(
    items: Sequence[Item], categories: Sequence[str], known: Interactions, liked_action: int
) -> ItemCatalog:
    """Make a catalog out of a dataset's items and the interactions that may be known (the training part).

    Args:
        items: All items.
        categories: Names of the categories, in the order of the columns.
        known: Interactions that statistics may be drawn from.
        liked_action: Actions from this one on count as liked.
    """
    ordered = sorted(items, key=lambda item: item.id)
    raw_ids = np.array([item.id for item in ordered], dtype=np.int64)
    num_items = len(raw_ids) + FIRST_ID
    column = {name: index for index, name in enumerate(categories)}
    flags = np.zeros((num_items, len(categories)), dtype=np.uint8)
    decades = np.zeros((num_items, _DECADES), dtype=np.float32)
    for row, item in enumerate(ordered, start=FIRST_ID):
        flags[row, [column[name] for name in item.categories]] = 1
        if item.year is not None:
            decades[row, min(max((item.year - _FIRST_DECADE) // 10, 0), _DECADES - 1)] = 1.0

    days = known.time // SNAPSHOT_PERIOD
    first_day = int(days.min())
    internal = np.searchsorted(raw_ids, known.item) + FIRST_ID
    liked = known.action >= liked_action
    # Snapshot d counts the events of days before d; the last one counts all.
    shape = (int(days.max()) - first_day + 2, num_items)
    counts = np.zeros(shape, dtype=np.int64)
    likes = np.zeros(shape, dtype=np.int64)
    np.add.at(counts, (days - first_day + 1, internal), 1)
    np.add.at(likes, (days - first_day + 1, internal), liked.astype(np.int64))
    counts, likes = counts.cumsum(axis=0), likes.cumsum(axis=0)
    neighbours, similarity = similar_items(internal, known.user, num_items)
    return ItemCatalog(
        raw_ids=raw_ids,
        features=np.concatenate([flags.astype(np.float32), decades], axis=1),
        categories=flags,
        popularity=log_bucket(counts, LOG_COUNT_SIZE).astype(np.uint8),
        liked_rate=rate_bucket(likes, counts, RATE_SIZE).astype(np.uint8),
        expected=expected_strength(internal, known.action, num_items, int(known.action.max()) + 1),
        neighbours=neighbours,
        similarity=similarity,
        first_snapshot=first_day * SNAPSHOT_PERIOD,
    )


def strength(actions: npt.ArrayLike, num_actions: int) -> Int64Array:
    """How strong actions are, 0 to ``STRENGTH``, in two ways: by rank, and whether they are the strongest there is.

    Args:
        actions: Actions from 0 of any shape; a schema's are in ascending order of strength.
        num_actions: Kinds of action.

    Returns:
        INT64 [..., 2].
    """
    given = np.asarray(actions, dtype=np.int64)
    strengths = np.empty((given.size, 2), dtype=np.int64)
    _fill_strengths(np.ascontiguousarray(given).reshape(-1), num_actions, strengths)
    return strengths.reshape(*given.shape, 2)


@compiled(group(INT, INT), INT, INT)
def strength_of(action: int, num_actions: int) -> tuple[int, int]:
    """``strength`` of one action."""
    known = min(max(action, 0), num_actions - 1)
    return known * STRENGTH // max(num_actions - 1, 1), int(known == num_actions - 1) * STRENGTH


@compiled(NONE, array("int64"), INT, array("int64", 2, written=True))
def _fill_strengths(actions: Int64Array, num_actions: int, strengths: Int64Array) -> None:
    for index in range(len(actions)):
        strengths[index] = strength_of(actions[index], num_actions)


def expected_strength(items: Int64Array, actions: npt.ArrayLike, num_items: int, num_actions: int) -> Int32Array:
    """INT32 [I, 2]: mean strength of each item's events, drawn towards the mean of all.

    Args:
        items: INT64 [E], internal ids.
        actions: INT32 [E].
        num_items: Internal ids, I.
        num_actions: Kinds of action.
    """
    strengths = strength(actions, num_actions)
    overall = strengths.sum(axis=0) // len(items)
    sums = np.tile(_PRIOR_EVENTS * overall, (num_items, 1))
    np.add.at(sums, items, strengths)
    counts = np.bincount(items, minlength=num_items) + _PRIOR_EVENTS
    expected: Int32Array = (sums // counts[:, None]).astype(np.int32)
    return expected


def similar_items(items: Int64Array, users: Int64Array, num_items: int) -> tuple[Int32Array, Int32Array]:
    """Each item's nearest neighbours by common users, and the similarities.

    Of c common users and n_i users of item i the similarity is c / sqrt(n_i n_j) x c / (c + 1). Items are taken one by
    one, so that memory grows with the log and not with the square of the catalogue.

    Args:
        items: INT64 [E], internal ids.
        users: INT64 [E], user indices.
        num_items: Internal ids, I.

    Returns:
        INT32 [I, neighbours] ids, nearest first, 0 where there are no more; INT32 of that shape, similarities.
    """
    pairs = np.unique(users.astype(np.int64) * num_items + items)
    user, item = pairs // num_items, pairs % num_items
    of_user = np.searchsorted(user, np.arange(int(user.max()) + 2))
    by_item = np.argsort(item, kind="stable")
    of_item = np.searchsorted(item[by_item], np.arange(num_items + 1))
    count = np.diff(of_item).astype(np.float64)
    neighbours = np.zeros((num_items, _NEIGHBOURS), dtype=np.int32)
    similarity = np.zeros((num_items, _NEIGHBOURS), dtype=np.int32)
    for index in np.flatnonzero(count).tolist():
        its_users = user[by_item[of_item[index] : of_item[index + 1]]].tolist()
        met = np.concatenate([item[of_user[one] : of_user[one + 1]] for one in its_users])
        common = np.bincount(met, minlength=num_items).astype(np.float64)
        common[index] = 0.0
        others = np.flatnonzero(common)
        met_times = common[others]
        values = met_times * met_times / ((met_times + _PRIOR_USERS) * np.sqrt(count[index] * count[others]))
        scaled = np.rint(values * SIMILARITY).astype(np.int64)
        nearest = np.argsort(-scaled, kind="stable")[:_NEIGHBOURS]
        nearest = nearest[scaled[nearest] > 0]
        neighbours[index, : len(nearest)] = others[nearest]
        similarity[index, : len(nearest)] = scaled[nearest]
    return neighbours, similarity


@compiled(INT, INT, INT, INT)
def snapshot_of(time: int, first: int, count: int) -> int:
    """Index of the latest of ``count`` snapshots, the first at ``first``, that was taken at or before unix ``time``."""
    return min(max((time - first) // SNAPSHOT_PERIOD, 0), count - 1)
