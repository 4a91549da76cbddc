"""Put a model directory into the repository whole and checked, or leave what was there."""

from __future__ import annotations

import hashlib
import string
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtgr.bundle import DOOR_MODEL
from mtgr.checkpoint import Checkpoint
from mtgr.files import replaced_directory

TEMPLATES = Path(__file__).resolve().parent / "templates"


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
