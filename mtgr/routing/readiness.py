"""Whether a model's artifact belongs to the installed checkpoint, and what batches it takes."""

from __future__ import annotations

from pathlib import Path

from mtgr.errors import ConfigurationError
from mtgr.manifest import Manifest, latest_version
from mtgr.routing.strategies import STRATEGIES


def artifact_problem(model_repository: Path, model: str, schema_hash: str) -> str | None:
    """None if the model's artifact is there and reads the installed schema's rows, else a phrase that says why not.

    Args:
        model_repository: Where the models are.
        model: A Triton model, the latest version of it, or ``model@2`` for version 2.
        schema_hash: Of the installed checkpoint.
    """
    name, _ = split_version(model)
    remedy = next(strategy.remedy for strategy in STRATEGIES.values() if name in strategy.models)
    version = _artifact(model_repository, model)
    if version is None:
        return f"{model} is not installed ({remedy})"
    try:
        manifest = Manifest.load(version)
    except ConfigurationError as error:
        return f"{model} has no usable manifest ({error} To mend it, {remedy})"
    if manifest.schema != schema_hash:
        return f"{model} was exported for another schema ({remedy}, and restart the server)"
    return None


def largest_batch(model_repository: Path, model: str) -> int | None:
    """Most requests that the artifact takes in one call, where it was built for fewer than others take; else None."""
    version = _artifact(model_repository, model)
    if version is None:
        return None
    try:
        options = Manifest.load(version).details.get("options")
    except ConfigurationError:
        return None  # and the model is not ready
    return options.get("max_batch") if isinstance(options, dict) else None


def _artifact(model_repository: Path, model: str) -> Path | None:
    name, number = split_version(model)
    directory = model_repository / name
    version = latest_version(directory) if number is None else directory / str(number)
    return version if version is not None and version.is_dir() else None


def split_version(model: str) -> tuple[str, int | None]:
    """Name and version of ``model@2``; a version of None is the latest."""
    name, _, number = model.partition("@")
    return name, int(number) if number else None
