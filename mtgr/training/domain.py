"""Datasets with fewer or more items than another one: what a model was trained on, and what it is to learn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtgr.data.dataset import BoolArray, Dataset, Interactions, Item, Task, User
from mtgr.errors import ConfigurationError
from mtgr.features.catalog import ItemCatalog
from mtgr.schema import FIRST_ID, Schema

_FIRST_DECADE = 1900  # as in the catalogue's side features


class NarrowedDataset:
    """A dataset before some of its items came.

    Args:
        dataset: The whole one.
        without: Categories whose items are not there yet, and no event with them.
        until: BOOL [E], the events of the whole one that have happened by then; all of them if None.

    Raises:
        ConfigurationError: If a category is unknown, or nothing is left out or left over.
    """

    def __init__(self, dataset: Dataset, without: Sequence[str], until: BoolArray | None = None) -> None:
        items = dataset.items()
        known = {category for item in items for category in item.categories}
        unknown = sorted(set(without) - known)
        if unknown:
            raise ConfigurationError(f"there is no category {unknown[0]!r}; choose out of {', '.join(sorted(known))}.")
        self._dataset = dataset
        self._items = [item for item in items if not set(without) & set(item.categories)]
        log = dataset.interactions()
        kept = np.isin(log.item, [item.id for item in self._items])
        self._interactions = log.take(kept if until is None else kept & until)
        if len(self._items) == len(items) or not len(self._interactions):
            raise ConfigurationError("categories to hold back must leave some items out and others in; name others.")
        self.name = f"{dataset.name}-without-{'-'.join(sorted(without))}"

    def interactions(self) -> Interactions:
        """Events with the items that are there."""
        return self._interactions

    def users(self) -> list[User]:
        """All users, also those without an event."""
        return self._dataset.users()

    def items(self) -> list[Item]:
        """The items that are there."""
        return self._items

    def tasks(self) -> tuple[Task, ...]:
        """The whole dataset's."""
        return self._dataset.tasks()


class GrownDataset:
    """A dataset and the items of an earlier catalogue that it lacks, which a grown model goes on knowing.

    Args:
        dataset: The log and the items of today.
        schema: Of the earlier catalogue.
        catalog: The earlier catalogue.
    """

    def __init__(self, dataset: Dataset, schema: Schema, catalog: ItemCatalog) -> None:
        self._dataset = dataset
        self.name = dataset.name
        today = {item.id: item for item in dataset.items()}
        gone = {item.id: item for item in catalog_items(schema, catalog) if item.id not in today}
        self._items = [item for _, item in sorted((today | gone).items())]

    def interactions(self) -> Interactions:
        """The log."""
        return self._dataset.interactions()

    def users(self) -> list[User]:
        """The users."""
        return self._dataset.users()

    def items(self) -> list[Item]:
        """Items of both."""
        return self._items

    def tasks(self) -> tuple[Task, ...]:
        """The tasks."""
        return self._dataset.tasks()


def catalog_items(schema: Schema, catalog: ItemCatalog) -> list[Item]:
    """Items as a catalogue knows them: categories, and the first year of the decade; titles are lost."""
    decades = catalog.features[:, len(schema.categories) :]
    items = []
    for internal, raw in enumerate(catalog.raw_ids.tolist(), start=FIRST_ID):
        names = tuple(name for name, flag in zip(schema.categories, catalog.categories[internal], strict=True) if flag)
        decade = np.flatnonzero(decades[internal])
        items.append(Item(raw, "", names, _FIRST_DECADE + 10 * int(decade[0]) if len(decade) else None))
    return items
