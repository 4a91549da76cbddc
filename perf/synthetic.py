"""A catalogue, users, and an untrained model of any size, for benchmarks that need no data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from mtgr.bundle import STORE_FILE
from mtgr.checkpoint import Checkpoint, build_model, save_checkpoint
from mtgr.config import ModelConfig
from mtgr.data.dataset import Interactions, Item
from mtgr.features.catalog import CATALOG_FILE, ItemCatalog, build_catalog
from mtgr.features.sqlite import write_store
from mtgr.features.store import UserRecord
from mtgr.schema import CANDIDATE_COLUMNS, FIRST_COLUMN, SCHEMA_FILE, ProfileField, Schema, TaskSpec

CATEGORIES = ("action", "comedy", "drama", "documentary")
EPOCH = 1_704_067_200  # 2024-01-01
SPAN = 200 * 86_400


def synthetic_catalog(num_items: int, generator: np.random.Generator) -> ItemCatalog:
    """A random catalogue with a long log behind its statistics."""
    items = [
        Item(index, f"item {index}", (CATEGORIES[index % len(CATEGORIES)],), 1950 + index % 70)
        for index in range(1, num_items + 1)
    ]
    events = 20 * num_items
    log = Interactions(
        np.zeros(events, dtype=np.int64),
        generator.integers(1, num_items + 1, events),
        generator.integers(0, 5, events).astype(np.int32),
        np.sort(generator.integers(EPOCH, EPOCH + SPAN, events)),
    )
    return build_catalog(items, CATEGORIES, log, liked_action=3)


def synthetic_schema(catalog: ItemCatalog, max_history: int = 1900) -> Schema:
    """A schema with every known candidate column."""
    return Schema(
        name="synthetic",
        epoch=EPOCH,
        profile=(ProfileField("age", boundaries=(18.0, 30.0, 50.0)), ProfileField("gender", values=("F", "M"))),
        num_items=catalog.num_items,
        items_hash=catalog.hash,
        num_actions=5,
        liked_action=3,
        categories=CATEGORIES,
        tasks=tuple(TaskSpec(name, "synthetic") for name in ("engagement", "retention", "monetization")),
        width=FIRST_COLUMN + len(CANDIDATE_COLUMNS),
        candidate_columns=CANDIDATE_COLUMNS,
        max_history=max_history,
    )


def synthetic_checkpoint(config: ModelConfig, num_items: int, seed: int, max_history: int = 1900) -> Checkpoint:
    """A randomly initialised model on a random catalogue."""
    catalog = synthetic_catalog(num_items, np.random.default_rng(seed))
    schema = synthetic_schema(catalog, max_history)
    torch.manual_seed(seed)
    return Checkpoint(build_model(config, schema, catalog).eval(), config, schema, catalog)


def synthetic_users(checkpoint: Checkpoint, events: Mapping[str, int], seed: int) -> Iterator[tuple[str, UserRecord]]:
    """Users with so many events each."""
    generator = np.random.default_rng(seed)
    for user, count in events.items():
        yield (
            user,
            UserRecord(
                {"age": int(generator.integers(15, 70)), "gender": str(generator.choice(["F", "M"]))},
                generator.choice(checkpoint.catalog.raw_ids, count),
                generator.integers(0, 5, count).astype(np.int32),
                np.sort(generator.integers(EPOCH, EPOCH + SPAN, count)),
            ),
        )


def save_synthetic(
    checkpoint: Checkpoint, users: Iterator[tuple[str, UserRecord]], directory: Path, weights: bool = True
) -> None:
    """Write a checkpoint directory with a feature store, as training would; on request without the weights."""
    directory.mkdir(parents=True)
    if weights:
        save_checkpoint(checkpoint, directory)
    else:
        checkpoint.schema.save(directory / SCHEMA_FILE)
        checkpoint.catalog.save(directory / CATALOG_FILE)
    write_store(directory / STORE_FILE, users)
