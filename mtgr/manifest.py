"""The manifest beside every exported artifact: what it was made of, and how exactly it agrees with the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtgr.errors import ConfigurationError
from mtgr.files import read_json, write_json

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """Origin and parity of one artifact.

    Attributes:
        model: Name of the Triton model.
        checkpoint: Hash of the checkpoint.
        schema: Hash of the schema.
        precision: Of weights and activations, such as ``fp32``.
        versions: Versions of what made the artifact.
        shapes: Inputs and outputs: name to dtype and dimensions, -1 for those that vary.
        parity: Largest absolute error against the reference (``max_abs_error``), and the shapes it was measured at.
        details: Whatever else a reader of the artifact may want to know.
    """

    model: str
    checkpoint: str
    schema: str
    precision: str
    versions: Mapping[str, str]
    shapes: Mapping[str, Any]
    parity: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)

    def save(self, version_directory: Path) -> None:
        """Write the manifest beside the artifact."""
        write_json(version_directory / MANIFEST_FILE, dataclasses.asdict(self))

    @classmethod
    def load(cls, version_directory: Path) -> Manifest:
        """Read the manifest of an artifact.

        Raises:
            ConfigurationError: If it is missing or damaged.
        """
        values = read_json(version_directory / MANIFEST_FILE)
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigurationError(f"{version_directory / MANIFEST_FILE} is not a manifest; export again.") from error


def latest_version(model_directory: Path) -> Path | None:
    """Directory of the highest version of a Triton model, or None if there is none."""
    versions = [path for path in model_directory.glob("*") if path.name.isdigit() and path.is_dir()]
    return max(versions, key=lambda path: int(path.name), default=None)
