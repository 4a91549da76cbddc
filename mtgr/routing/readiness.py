"""Whether a model's artifact belongs to the installed checkpoint."""

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
    name, number = split_version(model)
    remedy = next(strategy.remedy for strategy in STRATEGIES.values() if name in strategy.models)
    directory = model_repository / name
    version = latest_version(directory) if number is None else directory / str(number)
    if version is None or not version.is_dir():
        return f"{model} is not installed ({remedy})"
    try:
        manifest = Manifest.load(version)
    except ConfigurationError as error:
        return f"{model} has no usable manifest ({error} To mend it, {remedy})"
    if manifest.schema != schema_hash:
        return f"{model} was exported for another schema ({remedy}, and restart the server)"
    return None


def split_version(model: str) -> tuple[str, int | None]:
    """Name and version of ``model@2``; a version of None is the latest."""
    name, _, number = model.partition("@")
    return name, int(number) if number else None
