"""A small made-up dataset in which users like one of two kinds of item."""

from __future__ import annotations

import numpy as np

from mtgr.data.dataset import Interactions, Item, Task, User
from mtgr.data.tasks import engagement, monetization, retention
from mtgr.features.catalog import ItemCatalog, build_catalog
from mtgr.schema import CANDIDATE_COLUMNS, FIRST_COLUMN, ProfileField, Schema, TaskSpec

CATEGORIES = ("odd", "even", "third")
LIKED = 3


class SyntheticDataset:
    """40 users, 24 items; half of the users rate odd items high, the others even ones. Implements ``Dataset``."""

    name = "synthetic"

    def __init__(self, num_users: int = 40, events_per_user: int = 30, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        shape = (num_users, events_per_user)
        item = generator.integers(1, 25, shape)
        fits = (item % 2) == (np.arange(num_users)[:, None] % 2)
        action = np.clip(np.where(fits, 4, 1) + generator.integers(-1, 2, shape), 0, 4)
        steps = generator.choice([0, 5, 60, 7200], shape, p=[0.2, 0.4, 0.3, 0.1])
        time = 1_000_000_000 + 86_400 * generator.integers(0, 20, (num_users, 1)) + steps.cumsum(axis=1)
        user = np.repeat(np.arange(num_users), events_per_user)
        self._interactions = Interactions(
            user.astype(np.int64), item.ravel(), action.ravel().astype(np.int32), time.ravel()
        )
        self._num_users = num_users

    def interactions(self) -> Interactions:
        return self._interactions

    def users(self) -> list[User]:
        return [User(f"user-{i}", {"age": 20 + i, "kind": "ab"[i % 2]}) for i in range(self._num_users)]

    def items(self) -> list[Item]:
        return make_items()

    def tasks(self) -> tuple[Task, ...]:
        return (engagement(LIKED), retention(), monetization(4))


def make_items() -> list[Item]:
    def categories(i: int) -> tuple[str, ...]:
        return ("odd" if i % 2 else "even", *(("third",) if i % 3 == 0 else ()))

    return [Item(i, f"item {i}", categories(i), 1950 + 2 * i) for i in range(1, 25)]


def make_catalog() -> ItemCatalog:
    return build_catalog(make_items(), CATEGORIES, SyntheticDataset().interactions(), LIKED)


def make_schema(catalog: ItemCatalog, max_history: int = 8, realtime_step: int = 4) -> Schema:
    """A schema with every known candidate column."""
    return Schema(
        name="synthetic",
        epoch=999_990_000,
        profile=(ProfileField("age", boundaries=(30.0, 40.0)), ProfileField("kind", values=("a", "b"))),
        num_items=catalog.num_items,
        items_hash=catalog.hash,
        num_actions=5,
        liked_action=LIKED,
        categories=CATEGORIES,
        tasks=tuple(TaskSpec(name, "a test's") for name in ("engagement", "retention", "monetization")),
        width=FIRST_COLUMN + len(CANDIDATE_COLUMNS),
        candidate_columns=CANDIDATE_COLUMNS,
        max_history=max_history,
        realtime_step=realtime_step,
    )
