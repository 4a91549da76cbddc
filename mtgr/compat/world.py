"""The schema and the catalogue that go with a foreign network: nothing but ids, times, and actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtgr.features.catalog import ItemCatalog
from mtgr.schema import FIRST_ID, ProfileField, Schema, TaskSpec

# A schema has profile tokens; networks without any take this one for padding.
NO_PROFILE = ProfileField("profile", values=("none",))


@dataclass(frozen=True)
class World:
    """The rows that a network reads, and the items it knows."""

    schema: Schema
    catalog: ItemCatalog


def make_world(
    name: str,
    *,
    num_items: int,
    first_item: int,
    max_history: int,
    tasks: Sequence[str],
    contextual: Sequence[tuple[str, int]] = (),
    num_actions: int = 1,
) -> World:
    """Schema and catalogue of items whose raw ids are consecutive.

    Times count from 1970, so that a network may read the hour of the day off them. All events are history: foreign
    networks know no real-time segment, and of longer histories see the latest ``max_history`` events.

    Args:
        name: Of the schema.
        num_items: Items.
        first_item: Raw id of the first.
        max_history: Most events of a context.
        tasks: Names of the outputs.
        contextual: Names of the profile fields, and the number of values of each: the numbers from 0.
        num_actions: Kinds of action.
    """
    total = num_items + FIRST_ID
    catalog = ItemCatalog(
        raw_ids=np.arange(first_item, first_item + num_items, dtype=np.int64),
        features=np.zeros((total, 1), dtype=np.float32),
        categories=np.zeros((total, 0), dtype=np.uint8),
        popularity=np.zeros((1, total), dtype=np.uint8),
        liked_rate=np.zeros((1, total), dtype=np.uint8),
        expected=np.zeros((total, 2), dtype=np.int32),
        neighbours=np.zeros((total, 1), dtype=np.int32),
        similarity=np.zeros((total, 1), dtype=np.int32),
        first_snapshot=0,
    )
    profile = tuple(ProfileField(field, values=tuple(map(str, range(size)))) for field, size in contextual)
    schema = Schema(
        name=name,
        epoch=0,
        profile=profile or (NO_PROFILE,),
        num_items=total,
        items_hash=catalog.hash,
        num_actions=num_actions,
        liked_action=num_actions,
        categories=(),
        tasks=tuple(TaskSpec(task, f"output of a {name} checkpoint") for task in tasks),
        event_columns=("item", "time", "action"),
        candidate_columns=("item", "time"),
        max_history=max_history,
        realtime_step=1,
    )
    return World(schema, catalog)
