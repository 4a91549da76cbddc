"""A plan's files: the plan itself, written at once, and the manifest beside it that names its hash."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from mtgr.errors import ConfigurationError
from mtgr.manifest import MANIFEST_FILE, Manifest

PLAN_FILE = "model.plan"


def manifest_path(plan: Path) -> Path:
    """Where the manifest of a plan lies: that of ``model.plan`` is the model's own."""
    return plan.with_name(MANIFEST_FILE if plan.name == PLAN_FILE else f"{plan.stem}.{MANIFEST_FILE}")


def check_plan(plan: Path, manifest: Manifest) -> None:
    """See to it that a plan is the one that its manifest describes.

    Raises:
        ConfigurationError: If it is missing or another one.
    """
    if not plan.is_file() or sha256_of(plan) != manifest.details.get("plan_sha256"):
        raise ConfigurationError(f"{plan} is not the plan that its manifest describes; export it again.")


def origin_of(source: Path) -> Manifest | None:
    """The graph's own manifest, which tells the checkpoint; None for a graph from elsewhere."""
    try:
        return Manifest.load(source.parent)
    except (ConfigurationError, FileNotFoundError):
        return None


def write_bytes(path: Path, data: Any) -> None:
    """Write bytes in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
