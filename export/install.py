"""Put a model directory into the repository whole and checked, or leave what was there."""

from __future__ import annotations

import hashlib
import os
import string
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtgr.bundle import DOOR_MODEL
from mtgr.checkpoint import Checkpoint
from mtgr.files import replaced_directory

TEMPLATES = Path(__file__).resolve().parent / "templates"
_VARIANTS = "configs"  # where Triton looks for what --model-config-name names


@contextmanager
def model_directory(name: str, model_repository: Path, checkpoint: Checkpoint) -> Iterator[Path]:
    """Stage the model ``name`` from its template; it takes its place when the block ends without an error.

    Args:
        name: Triton model and template.
        model_repository: Where it goes.
        checkpoint: Fills in the template's dimensions: C++ backends want a graph's constants in its config.

    Yields:
        The version directory to put the artifact into.
    """
    with replaced_directory(model_repository / name, _staging_root(model_repository)) as staging:
        version = staging / "1"
        version.mkdir()
        template = TEMPLATES / name
        config = string.Template((template / "config.pbtxt").read_text(encoding="utf-8")).substitute(
            width=checkpoint.schema.width,
            tasks=len(checkpoint.schema.tasks),
            retrieved=checkpoint.model.retrieve_count,
        )
        (staging / "config.pbtxt").write_text(config, encoding="utf-8")
        for source in template.glob("1/*.py"):
            (version / source.name).write_bytes(source.read_bytes())
        yield version


@contextmanager
def removed_model(name: str, model_repository: Path) -> Iterator[None]:
    """Take the model ``name`` out of the repository, in one step, when the block ends without an error."""
    yield
    root = _staging_root(model_repository)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=root) as aside:
        (model_repository / name).rename(Path(aside) / name)
    with suppress(OSError):  # others may still grow there
        root.rmdir()


def add_variant(version: Path, artifact: str, variant: str) -> None:
    """Let a host choose this artifact by its kind of GPU: ``tritonserver --model-config-name=<variant>``.

    One repository then serves hosts of several kinds, each with what was built for it; a host that names no variant
    takes ``artifact``. The variant's file is the same file under another name and takes no further space.

    Args:
        version: Staged version directory that holds the artifact.
        artifact: Its file name, such as ``model.plan``.
        variant: Kind of GPU, such as ``sm90``.
    """
    path = version / artifact
    own = path.with_name(f"{path.stem}.{variant}{path.suffix}")
    os.link(path, own)
    _write_variant(version.parent, artifact, own.name, variant)


def keep_variants(version: Path, artifact: str, installed: Path, variants: Iterable[str]) -> None:
    """Take along what other hosts have built into the installed model.

    Args:
        version: Staged version directory.
        artifact: Name of the artifact that a host without a variant takes.
        installed: The model's directory as it is now.
        variants: Kinds of GPU whose artifacts are of the same checkpoint.
    """
    for variant in variants:
        name = f"{Path(artifact).stem}.{variant}{Path(artifact).suffix}"
        target = version / name
        if not target.exists():
            os.link(installed / version.name / name, target)
            _write_variant(version.parent, artifact, name, variant)


def _write_variant(model: Path, artifact: str, own: str, variant: str) -> None:
    text = (model / "config.pbtxt").read_text(encoding="utf-8")
    named = f'default_model_filename: "{artifact}"'
    assert text.count(named) == 1, f"{model.name}'s config does not name {artifact}"
    (model / _VARIANTS).mkdir(exist_ok=True)
    changed = text.replace(named, f'default_model_filename: "{own}"')
    (model / _VARIANTS / f"{variant}.pbtxt").write_text(changed, encoding="utf-8")


def _staging_root(model_repository: Path) -> Path:
    """Inside the door's directory: the same file system, and Triton looks for versions only there."""
    return model_repository / DOOR_MODEL / "staging"


def template_hash(name: str) -> str:
    """Hex SHA-256 of a model's template: an artifact of an older one is stale."""
    digest = hashlib.sha256()
    template = TEMPLATES / name
    for path in [template / "config.pbtxt", *sorted(template.glob("1/*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
