"""Whether a model's artifact belongs to the installed checkpoint."""

from __future__ import annotations

from pathlib import Path

from mtgr.errors import ConfigurationError
from mtgr.manifest import Manifest, latest_version
from mtgr.routing.strategies import STRATEGIES


def artifact_problem(model_repository: Path, model: str, schema_hash: str) -> str | None:
    """None if the model's artifact is there and reads the installed schema's rows, else a phrase that says why not."""
    remedy = next(strategy.remedy for strategy in STRATEGIES.values() if model in strategy.models)
    version = latest_version(model_repository / model)
    if version is None:
        return f"{model} is not installed ({remedy})"
    try:
        manifest = Manifest.load(version)
    except ConfigurationError as error:
        return f"{model} has no usable manifest ({error} To mend it, {remedy})"
    if manifest.schema != schema_hash:
        return f"{model} was exported for another schema ({remedy}, and restart the server)"
    return None
