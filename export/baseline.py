"""Install ``mtgr_baseline``: the checkpoint itself, beside its adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from export.install import model_directory, template_hash
from mtgr.checkpoint import CONFIG_FILE, MODEL_FILE, load_checkpoint
from mtgr.features.catalog import CATALOG_FILE
from mtgr.manifest import Manifest
from mtgr.schema import SCHEMA_FILE


def export_baseline(checkpoint_directory: Path, model_repository: Path) -> None:
    """Copy a checkpoint that loads into the repository.

    Raises:
        ConfigurationError: If the checkpoint is missing or damaged.
    """
    checkpoint = load_checkpoint(checkpoint_directory)
    with model_directory("mtgr_baseline", model_repository, checkpoint) as version:
        for name in (MODEL_FILE, CONFIG_FILE, SCHEMA_FILE, CATALOG_FILE):
            shutil.copy2(checkpoint_directory / name, version / name)
        Manifest(
            model="mtgr_baseline",
            checkpoint=checkpoint.hash,
            schema=checkpoint.schema.hash,
            precision="fp32",
            versions={"torch": torch.__version__},
            shapes={"context": ["int32", -1, -1, checkpoint.schema.width]},
            parity={"max_abs_error": 0.0, "shapes": []},
            details={
                "retrieve_count": checkpoint.model.retrieve_count,
                "template": template_hash("mtgr_baseline"),
            },
        ).save(version)
