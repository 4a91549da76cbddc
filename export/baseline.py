"""Install ``mtgr_baseline``: the checkpoint itself, beside its adapter, for the eager or the compiled engine."""

from __future__ import annotations

import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from export.compiled import DEVICE, check_compiled
from export.install import model_directory, template_hash
from mtgr.checkpoint import CONFIG_FILE, MODEL_FILE, Checkpoint, operations
from mtgr.engines.compiled_network import CompiledPrecision
from mtgr.errors import ConfigurationError
from mtgr.features.catalog import CATALOG_FILE
from mtgr.manifest import Manifest
from mtgr.schema import SCHEMA_FILE


def export_baseline(
    checkpoint: Checkpoint,
    checkpoint_directory: Path,
    model_repository: Path,
    stack: ExitStack,
    compiled: CompiledPrecision | None = None,
    force: bool = False,
) -> Manifest:
    """Stage a copy of a checkpoint beside its adapter.

    Args:
        checkpoint: The checkpoint, loaded.
        checkpoint_directory: Where it lies.
        model_repository: Where the model goes.
        stack: Installs it when it closes without an error, together with whatever else it holds.
        compiled: Precision of the compiled engine; None for the eager one.
        force: Install a low precision also if it is not close enough.

    Raises:
        ConfigurationError: If the compiled engine is not close enough to PyTorch; what was installed before stays.
    """
    version = stack.enter_context(model_directory("mtgr_baseline", model_repository, checkpoint))
    for name in (MODEL_FILE, CONFIG_FILE, SCHEMA_FILE, CATALOG_FILE):
        shutil.copy2(checkpoint_directory / name, version / name)
    if "retrieve" not in operations(checkpoint.model):
        _remove_warmup(version.parent / "config.pbtxt", "retrieve")
    parity: dict[str, Any] = {}  # the eager engine is the reference itself
    details: dict[str, Any] = {"engine": "eager"}
    if compiled is not None:
        agreement, described = check_compiled(checkpoint, checkpoint_directory, compiled)
        parity = agreement.to_dict() | described
        details = {"engine": "compiled", "device": DEVICE}
        problem = agreement.problem(compiled)
        if problem is not None:
            if compiled == "fp32" or not force:
                raise ConfigurationError(f"the compiled engine in {compiled} was not installed: {problem}.")
            details["forced"] = problem
        _set_parameters(version.parent / "config.pbtxt", engine="compiled", precision=compiled)
    manifest = Manifest(
        model="mtgr_baseline",
        checkpoint=checkpoint.hash,
        schema=checkpoint.schema.hash,
        precision=compiled or "fp32",
        versions={"torch": torch.__version__},
        shapes={"context": ["int32", -1, -1, checkpoint.schema.width]},
        parity=parity,
        details={
            "retrieve_count": checkpoint.model.retrieve_count,
            "operations": list(operations(checkpoint.model)),
            "template": template_hash("mtgr_baseline"),
            **details,
        },
    )
    manifest.save(version)
    return manifest


def _set_parameters(config: Path, **values: str) -> None:
    """Change parameters that the template's config has."""
    text = config.read_text(encoding="utf-8")
    for name, value in values.items():
        parameter = re.compile(rf'(key: "{name}" value: \{{ string_value: ")[^"]*"')
        text, count = parameter.subn(rf'\g<1>{value}"', text)
        assert count == 1, f"{config} has no parameter {name}"
    config.write_text(text, encoding="utf-8")


def _remove_warmup(config: Path, name: str) -> None:
    """Take a warm-up sample out of a config: Triton does not load a model that fails one."""
    sample = re.compile(rf',\s*\{{\s*name: "{name}".*?\n  \}}', flags=re.DOTALL)
    text, count = sample.subn("", config.read_text(encoding="utf-8"))
    assert count == 1, f"{config} has no warm-up sample {name}"
    config.write_text(text, encoding="utf-8")
