"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mtgr.errors import ConfigurationError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ConfigurationError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path} does not exist.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid JSON: {error}.") from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def replaced_directory(target: Path, staging_root: Path | None = None) -> Iterator[Path]:
    """Give a new directory to fill; on success it takes the place of ``target``, on an error it is removed.

    The exchange is one system call where the file system offers it, so that a reader finds the old directory or the
    new one and never a mixture.

    Args:
        target: The directory to create or replace.
        staging_root: Where the new directory grows; on the file system of ``target``, its parent by default.

    Yields:
        The empty directory to fill.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging_root = staging_root or target.parent
    staging_root.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=staging_root))
    staging.chmod(0o755)
    try:
        yield staging
        if not target.exists():
            os.rename(staging, target)
        elif not _exchange(staging, target):
            aside = staging.with_name(staging.name + ".old")
            os.rename(target, aside)
            try:
                os.rename(staging, target)
            except OSError:
                os.rename(aside, target)
                raise
            shutil.rmtree(aside)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if staging_root != target.parent:
            with suppress(OSError):  # others may still grow there
                staging_root.rmdir()


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically (Linux renameat2); False where that is not supported."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result: int = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return result == 0
