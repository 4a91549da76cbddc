"""Load a model: a public checkpoint, by path or from the Hugging Face hub, or else the project's own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtgr.bundle import STORE_FILE
from mtgr.checkpoint import CONFIG_FILE, MODEL_FILE, Checkpoint, load_checkpoint, save_checkpoint
from mtgr.compat.base import ForeignModel
from mtgr.compat.convert import ConversionReport
from mtgr.compat.formats import convert_tensors
from mtgr.compat.hub import download, is_repository_id
from mtgr.compat.options import Options
from mtgr.compat.tensors import read_tensors
from mtgr.config import ModelConfig
from mtgr.errors import ConfigurationError
from mtgr.features.sqlite import write_store
from mtgr.files import read_json, replaced_directory
from mtgr.model import MTGR

DEFAULT_CHECKPOINT = Path("build/checkpoint")

Origin = Literal["public", "own"]


@dataclass(frozen=True)
class LoadedModel:
    """A model, and where it comes from.

    Attributes:
        checkpoint: The network with its schema and items.
        origin: Whether it was converted from a public format, or is the project's own.
        source: What it was read from.
        path: Where it lies: the project's own, or what the public one was read from until it is saved as such.
        report: What the conversion did; None for the project's own.
        fallback: Why the public checkpoint was not used, if one was asked for.
    """

    checkpoint: Checkpoint
    origin: Origin
    source: str
    path: Path
    report: ConversionReport | None = None
    fallback: str | None = None

    @property
    def model(self) -> MTGR | ForeignModel:
        """The network, in eval mode."""
        return self.checkpoint.model

    @property
    def used(self) -> str:
        """One sentence: which checkpoint this is, and why if it is not the one asked for."""
        if self.report is not None:
            return f"using the public checkpoint {self.source} ({self.report.format})."
        if self.fallback is not None:
            return f"using the project's own checkpoint {self.source}, because {self.fallback}"
        return f"using the project's own checkpoint {self.source}."


def create_mtgr_model(
    use_open_source: bool = True,
    model_config: ModelConfig | Mapping[str, Any] | None = None,
    *,
    source: str | Path | None = None,
    checkpoint: Path = DEFAULT_CHECKPOINT,
    revision: str | None = None,
    log: Callable[[str], None] = print,
) -> LoadedModel:
    """A model that can serve: a public checkpoint if there is one, else the project's own.

    Args:
        use_open_source: Whether to try ``source`` first.
        model_config: What a public checkpoint's tensors do not show, such as ``num_heads``: a mapping of options
            (docs/checkpoints.md), or a model config, of which the number of heads and the attention's norm are taken.
        source: The public checkpoint: a path, or a repository id of the Hugging Face hub.
        checkpoint: The project's own, for when the public one cannot be used.
        revision: Of the repository.
        log: Takes the report and the sentence that says which checkpoint is used.

    Raises:
        ConfigurationError: If neither can be loaded.
    """
    if not use_open_source:
        loaded = load_model(checkpoint)
    elif source is None:
        loaded = _own(checkpoint, "no public checkpoint was named (source).")
    else:
        loaded = load_model(source, options=_options(model_config), fallback=checkpoint, revision=revision)
    if loaded.report is not None:
        log(loaded.report.table())
    log(loaded.used)
    return loaded


def load_model(
    source: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    fallback: Path | None = None,
    revision: str | None = None,
    cache: Path | None = None,
) -> LoadedModel:
    """Load ``source``, converting it if it has a public format.

    Args:
        source: Path of a file or directory, or ``owner/name`` of the Hugging Face hub. A directory that training or
            an earlier conversion wrote is the project's own.
        options: Hyper-parameters that tensors do not show; they count more than those of ``mtgr.json``.
        fallback: The project's own checkpoint, used if ``source`` cannot be.
        revision: Of the repository.
        cache: Where the hub's files are kept; its own folder by default.

    Raises:
        ConfigurationError: If neither can be loaded; the sentence says what was wrong with ``source``.
    """
    try:
        path = _resolve(source, revision, cache)
        if is_own(path):
            if options:
                raise ConfigurationError(
                    f"{source} is the project's own checkpoint and takes no options; leave them out."
                )
            return LoadedModel(load_checkpoint(path), "own", str(source), path)
        tensors = read_tensors(path)
        plan, report = convert_tensors(str(source), tensors, Options(tensors.options, options or {}))
    except ConfigurationError as error:
        if fallback is None:
            raise
        return _own(fallback, str(error))
    schema = dataclasses.replace(plan.world.schema, operations=plan.model.config.operations)
    record = {"converted": report.to_dict()}
    checkpoint = Checkpoint(plan.model, plan.model.config, schema, plan.world.catalog, record)
    return LoadedModel(checkpoint, "public", str(source), path, report)


def save_converted(loaded: LoadedModel, directory: Path, store: Path | None = None) -> LoadedModel:
    """Write a converted model as a checkpoint of the project, whole or not at all.

    Args:
        loaded: A model out of ``load_model``.
        directory: To create or replace.
        store: A feature store to put beside it; an empty one by default.

    Returns:
        The same model as the directory holds it.
    """
    with replaced_directory(directory) as staging:
        save_checkpoint(loaded.checkpoint, staging)
        if store is None:
            write_store(staging / STORE_FILE, [])
        else:
            shutil.copy2(store, staging / STORE_FILE)
    return dataclasses.replace(loaded, checkpoint=load_checkpoint(directory), path=directory)


def is_own(path: Path) -> bool:
    """Whether a directory is a checkpoint as the project writes it."""
    if not all((path / name).is_file() for name in (MODEL_FILE, CONFIG_FILE)):
        return False
    values = read_json(path / CONFIG_FILE)  # of a model on the hub this may be anything
    return isinstance(values, dict) and isinstance(values.get("model"), dict)


def _resolve(source: str | Path, revision: str | None, cache: Path | None) -> Path:
    path = Path(source)
    if path.exists():
        return path
    # What lies in a folder that is there was meant as a path.
    if isinstance(source, str) and is_repository_id(source) and not path.parent.is_dir():
        return download(source, revision, cache)
    raise ConfigurationError(
        f"{source} does not exist; run `make train`, or give a path or a repository id of the Hugging Face hub."
    )


def _own(directory: Path, reason: str) -> LoadedModel:
    try:
        return LoadedModel(load_checkpoint(directory), "own", str(directory), directory, fallback=reason)
    except ConfigurationError as error:
        raise ConfigurationError(f"{reason.rstrip('.')}; and the fallback failed: {error}") from error


def _options(model_config: ModelConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(model_config, ModelConfig):
        return {name: getattr(model_config, name) for name in ("num_heads", "attention_norm_length")}
    return dict(model_config or {})
