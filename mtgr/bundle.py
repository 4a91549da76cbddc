"""The bundle: what the door needs beside the engines - schema, item catalog, and feature store."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mtgr.errors import ConfigurationError
from mtgr.features.catalog import CATALOG_FILE, ItemCatalog
from mtgr.features.settings import FeatureSettings, open_store
from mtgr.features.sqlite import SQLiteStore
from mtgr.features.store import FeatureStore, HistoryLimit
from mtgr.files import replaced_directory
from mtgr.schema import SCHEMA_FILE, Schema

DOOR_MODEL = "mtgr_features"
BUNDLE_DIRECTORY = "bundle"
STORE_FILE = "store.sqlite"


@dataclass(frozen=True)
class Bundle:
    """Schema and items of the installed checkpoint, and its directory."""

    schema: Schema
    catalog: ItemCatalog
    directory: Path

    def store(self) -> SQLiteStore:
        """Open the embedded feature store, read-only."""
        return SQLiteStore(self.directory / STORE_FILE)

    def open_store(self, settings: FeatureSettings) -> FeatureStore:
        """Open the feature store that the settings name.

        Raises:
            ConfigurationError: If its address is wrong, or there is no such file.
        """
        if not settings.store_url:
            return self.store()
        return open_store(settings.store_url, HistoryLimit.of(self.schema), settings.store_timeout)


def bundle_directory(model_repository: Path) -> Path:
    """Where the bundle lies: inside a model's directory, where Triton ignores what is not a version."""
    return model_repository / DOOR_MODEL / BUNDLE_DIRECTORY


def load_bundle(model_repository: Path) -> Bundle:
    """Read the bundle of a model repository.

    Raises:
        ConfigurationError: If none is installed or it is damaged.
    """
    directory = bundle_directory(model_repository)
    if not (directory / SCHEMA_FILE).is_file():
        raise ConfigurationError(
            "no checkpoint is installed in this model repository; run `make train` and `make export`, "
            "then restart the server."
        )
    schema = Schema.load(directory / SCHEMA_FILE)
    catalog = ItemCatalog.load(directory / CATALOG_FILE)
    if catalog.hash != schema.items_hash:
        raise ConfigurationError(f"schema and item catalog in {directory} do not belong together; run `make export`.")
    return Bundle(schema, catalog, directory)


def stage_bundle(checkpoint: Path, store: Path, model_repository: Path, stack: ExitStack) -> None:
    """Copy schema, catalog, and feature store; ``stack`` puts them in place when it closes without an error.

    Raises:
        ConfigurationError: If there is no such store.
    """
    if not store.is_file():
        raise ConfigurationError(f"there is no feature store at {store}; name one with --store, or run `make train`.")
    target = bundle_directory(model_repository)
    staging = stack.enter_context(replaced_directory(target, target.with_name("staging")))
    shutil.copy2(checkpoint / SCHEMA_FILE, staging / SCHEMA_FILE)
    shutil.copy2(checkpoint / CATALOG_FILE, staging / CATALOG_FILE)
    shutil.copy2(store, staging / STORE_FILE)
