"""Install ``mtgr_baseline``: the checkpoint itself, beside its adapter."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import torch

from export.install import model_directory, template_hash
from mtgr.checkpoint import CONFIG_FILE, MODEL_FILE, Checkpoint
from mtgr.features.catalog import CATALOG_FILE
from mtgr.manifest import Manifest
from mtgr.schema import SCHEMA_FILE


def export_baseline(
    checkpoint: Checkpoint, checkpoint_directory: Path, model_repository: Path, stack: ExitStack
) -> Manifest:
    """Stage a copy of a checkpoint beside its adapter.

    Args:
        checkpoint: The checkpoint, loaded.
        checkpoint_directory: Where it lies.
        model_repository: Where the model goes.
        stack: Installs it when it closes without an error, together with whatever else it holds.
    """
    version = stack.enter_context(model_directory("mtgr_baseline", model_repository, checkpoint))
    for name in (MODEL_FILE, CONFIG_FILE, SCHEMA_FILE, CATALOG_FILE):
        shutil.copy2(checkpoint_directory / name, version / name)
    manifest = Manifest(
        model="mtgr_baseline",
        checkpoint=checkpoint.hash,
        schema=checkpoint.schema.hash,
        precision="fp32",
        versions={"torch": torch.__version__},
        shapes={"context": ["int32", -1, -1, checkpoint.schema.width]},
        parity={},  # it is the reference itself
        details={"retrieve_count": checkpoint.model.retrieve_count, "template": template_hash("mtgr_baseline")},
    )
    manifest.save(version)
    return manifest
