"""Install ``mtgr_baseline``: the checkpoint itself, beside its adapter."""

from __future__ import annotations

import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch

from export.install import model_directory, template_hash
from mtgr.checkpoint import CONFIG_FILE, MODEL_FILE, Checkpoint, operations
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
    if "retrieve" not in operations(checkpoint.model):
        _remove_warmup(version.parent / "config.pbtxt", "retrieve")
    manifest = Manifest(
        model="mtgr_baseline",
        checkpoint=checkpoint.hash,
        schema=checkpoint.schema.hash,
        precision="fp32",
        versions={"torch": torch.__version__},
        shapes={"context": ["int32", -1, -1, checkpoint.schema.width]},
        parity={},  # it is the reference itself
        details={
            "retrieve_count": checkpoint.model.retrieve_count,
            "operations": list(operations(checkpoint.model)),
            "template": template_hash("mtgr_baseline"),
        },
    )
    manifest.save(version)
    return manifest


def _remove_warmup(config: Path, name: str) -> None:
    """Take a warm-up sample out of a config: Triton does not load a model that fails one."""
    sample = re.compile(rf',\s*\{{\s*name: "{name}".*?\n  \}}', flags=re.DOTALL)
    text, count = sample.subn("", config.read_text(encoding="utf-8"))
    assert count == 1, f"{config} has no warm-up sample {name}"
    config.write_text(text, encoding="utf-8")
