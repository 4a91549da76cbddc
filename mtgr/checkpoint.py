"""Checkpoints: a directory of safetensors and JSON with everything that is needed to serve a model.

model.safetensors     parameters and the items' side features
config.json           model config, and what training or conversion recorded (recipe, metrics; format, source)
schema.json           meaning and sizes of the columns
catalog.safetensors   item vocabulary and statistics
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mtgr.compat.base import ForeignConfig, ForeignModel, Operation
from mtgr.compat.networks import build_foreign_model, foreign_config
from mtgr.config import ModelConfig
from mtgr.errors import ConfigurationError
from mtgr.features.catalog import CATALOG_FILE, ItemCatalog
from mtgr.files import read_json, write_json
from mtgr.model import MTGR
from mtgr.schema import SCHEMA_FILE, Schema

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model with what belongs to it.

    Attributes:
        model: The network, in eval mode: MTGR, or one converted from a public format.
        config: Its hyper-parameters.
        schema: Meaning of its rows.
        catalog: The items.
        record: What training wrote down: recipe, metrics, versions; of a converted one, what it was made of.
        hash: Hex SHA-256 over parameters, config and schema; empty before the checkpoint is saved.
    """

    model: MTGR | ForeignModel
    config: ModelConfig | ForeignConfig
    schema: Schema
    catalog: ItemCatalog
    record: Mapping[str, Any] = field(default_factory=dict)
    hash: str = ""


def operations(model: MTGR | ForeignModel) -> tuple[Operation, ...]:
    """What a network can do: MTGR both, those of public formats perhaps one thing only."""
    return model.config.operations if isinstance(model, ForeignModel) else ("rank", "retrieve")


def build_model(config: ModelConfig, schema: Schema, catalog: ItemCatalog) -> MTGR:
    """A freshly initialised network that knows the items' side features."""
    model = MTGR(config, schema, catalog.features.shape[1])
    model.embedding.item.features.copy_(torch.from_numpy(catalog.features))
    return model


def save_checkpoint(checkpoint: Checkpoint, directory: Path) -> None:
    """Write ``checkpoint`` into an existing, empty ``directory``; use ``replaced_directory`` to do so in one step."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.model.state_dict().items()}
    save_file(tensors, directory / MODEL_FILE)
    write_json(directory / CONFIG_FILE, {"model": checkpoint.config.to_dict(), "record": dict(checkpoint.record)})
    checkpoint.schema.save(directory / SCHEMA_FILE)
    checkpoint.catalog.save(directory / CATALOG_FILE)
    for name in (MODEL_FILE, CATALOG_FILE):
        (directory / name).chmod(0o644)  # safetensors writes for the owner alone; a server may run as someone else


def load_checkpoint(directory: Path) -> Checkpoint:
    """Read and check a checkpoint.

    Raises:
        ConfigurationError: If a file is missing or damaged, or the files do not belong together.
    """
    if not (directory / MODEL_FILE).is_file():
        raise ConfigurationError(f"there is no checkpoint in {directory}; run `make train`.")
    values = read_json(directory / CONFIG_FILE)
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ConfigurationError(f"{directory / CONFIG_FILE} holds no model config; run `make train` again.")
    schema = Schema.load(directory / SCHEMA_FILE)
    catalog = ItemCatalog.load(directory / CATALOG_FILE)
    if catalog.hash != schema.items_hash:
        raise ConfigurationError(f"schema and item catalog in {directory} do not belong together; train again.")
    config: ModelConfig | ForeignConfig
    model: MTGR | ForeignModel
    if "network" in values["model"]:
        config = foreign_config(values["model"])
        model = build_foreign_model(config)
    else:
        config = ModelConfig.from_dict(values["model"])
        model = build_model(config, schema, catalog)
    try:
        model.load_state_dict(load_file(directory / MODEL_FILE))
    except (SafetensorError, RuntimeError) as error:
        raise ConfigurationError(
            f"{directory / MODEL_FILE} does not fit its config: {' '.join(str(error).split())}"
        ) from error
    return Checkpoint(model.eval(), config, schema, catalog, values.get("record", {}), checkpoint_hash(directory))


def checkpoint_hash(directory: Path) -> str:
    """Hex SHA-256 over parameters, model config and schema: what decides the scores."""
    if not (directory / MODEL_FILE).is_file():
        raise ConfigurationError(f"there is no checkpoint in {directory}; run `make train`.")
    digest = hashlib.sha256()
    with open(directory / MODEL_FILE, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    digest.update(repr(sorted(read_json(directory / CONFIG_FILE)["model"].items())).encode())
    digest.update(Schema.load(directory / SCHEMA_FILE).hash.encode())
    return digest.hexdigest()
