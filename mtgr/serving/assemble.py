"""Assemble a backend directory: what the installation has, plus the stand-ins it lacks."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from pathlib import Path

from mtgr.errors import ConfigurationError
from mtgr.serving.find import Installation

# The repository's Python-based stand-ins for C++ backends, one folder per backend.
STAND_INS = Path(__file__).resolve().parents[2] / "backends"

_STUB = "triton_python_backend_stub"


def python_version() -> str:
    """The running interpreter's minor version, for example ``3.11``."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def assemble_backends(installation: Installation, stand_ins: Path = STAND_INS, cache: Path | None = None) -> Path:
    """Give a directory for ``--backend-directory``, building it if it is not there yet.

    The directory's name carries a hash of its sources, and a directory is never changed once it has its name: a
    changed stand-in gives a new one, concurrent starts build the same one, and a running server keeps its own.

    Args:
        installation: The server that will use it.
        stand_ins: Folder with one ``<backend>/model.py`` per stand-in; it may be missing.
        cache: Where assembled directories are kept; ``$XDG_CACHE_HOME/mtgr/triton`` by default.

    Returns:
        The installation's own directory when it needs nothing, otherwise an assembled one.

    Raises:
        ConfigurationError: If the wheel has no Python stub for this interpreter.
    """
    missing = _missing_stand_ins(installation, stand_ins)
    if installation.stubs is None and not missing:
        return installation.backends
    stub = _bundled_stub(installation.stubs) if installation.stubs is not None else None
    target = (cache or _default_cache()) / (
        f"{installation.version}-py{python_version()}-{_digest(installation, missing)[:12]}"
    )
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        staging.chmod(0o755)
        _fill(staging, installation, stub, missing)
        try:
            staging.rename(target)
        except OSError:
            # Another start was faster: its directory has the same name, so the same content.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def stub_python_version(backends: Path) -> str | None:
    """The Python version that a backend directory's stub is linked against, or None if that cannot be told."""
    stub = backends / "python" / _STUB
    if not stub.is_file():
        return None
    found = re.search(rb"libpython(3\.\d+)", stub.read_bytes())
    return found.group(1).decode() if found else None


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mtgr" / "triton"


def _missing_stand_ins(installation: Installation, stand_ins: Path) -> list[Path]:
    """Folders of stand-ins whose backend the installation does not have."""
    if not stand_ins.is_dir():
        return []
    return sorted(
        model.parent
        for model in stand_ins.glob("*/model.py")
        if not (installation.backends / model.parent.name).is_dir()
    )


def _bundled_stub(stubs: Path) -> Path:
    stub = stubs / python_version() / _STUB
    if not stub.is_file():
        versions = sorted((path.name for path in stubs.glob("3.*")), key=lambda name: int(name.split(".")[1]))
        raise ConfigurationError(
            f"the installed nvidia-pytriton serves Python {', '.join(versions)} but this is Python "
            f"{python_version()}: make the virtual environment with one of those."
        )
    return stub


def _digest(installation: Installation, missing: list[Path]) -> str:
    """A hash of the installation's place and of the content of every stand-in."""
    digest = hashlib.sha256(str(installation.backends).encode())
    for folder in missing:
        for path in _sources(folder):
            digest.update(f"\0{path.relative_to(folder.parent)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _fill(staging: Path, installation: Installation, stub: Path | None, missing: list[Path]) -> None:
    for backend in sorted(installation.backends.iterdir()):
        if stub is not None and backend.name == "python":
            # The backend looks for its stub beside itself.
            folder = staging / "python"
            shutil.copytree(backend, folder, ignore=shutil.ignore_patterns("__pycache__"))
            copy = folder / _STUB
            shutil.copyfile(stub, copy)
            copy.chmod(0o755)
        else:
            (staging / backend.name).symlink_to(backend)
    if installation.bundled:
        _make_executable(installation.binary)
    for folder in missing:
        for path in _sources(folder):
            copy = staging / path.relative_to(folder.parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _make_executable(binary: Path) -> None:
    """Set the run bits, which some installers drop."""
    if os.access(binary, os.X_OK):
        return
    try:
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    except OSError as error:
        raise ConfigurationError(
            f"{binary} is not executable and its mode cannot be changed ({error.strerror}): run `chmod +x` on it."
        ) from error
