"""Locate tritonserver: a native installation (NVIDIA's image) or the one in the nvidia-pytriton wheel."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mtgr.errors import ConfigurationError, UnavailableError

# Stands in the console launcher that this package installs, so that it is never taken for a server.
LAUNCHER_MARK = "mtgr.serving.launcher"
WHEEL = "nvidia-pytriton"

_NATIVE_ROOT = Path("/opt/tritonserver")


@dataclass(frozen=True)
class Installation:
    """A tritonserver binary and what lies beside it.

    Attributes:
        binary: The server's executable.
        backends: Its directory of backends.
        caches: Its directory of response caches, or None to keep the server's own default.
        libraries: Directories its shared libraries are loaded from.
        stubs: Directory of Python stubs, one folder per interpreter version; None where the Python backend
            already carries its stub.
        version: Names the installation in the path of an assembled backend directory.
    """

    binary: Path
    backends: Path
    caches: Path | None
    libraries: tuple[Path, ...]
    stubs: Path | None
    version: str

    @property
    def bundled(self) -> bool:
        """Whether this is the server of the wheel, whose backends must be assembled."""
        return self.stubs is not None


def find_installation(explicit: Path | None = None, environ: Mapping[str, str] | None = None) -> Installation:
    """Find tritonserver: the one asked for, else a native one, else the wheel's.

    Args:
        explicit: Path of the executable (``--tritonserver``); wins over ``MTGR_TRITONSERVER``.
        environ: Environment to search; the process's own by default.

    Raises:
        ConfigurationError: If the path asked for is not an executable.
        UnavailableError: If there is no server at all.
    """
    environ = os.environ if environ is None else environ
    if explicit is None and environ.get("MTGR_TRITONSERVER"):
        explicit = Path(environ["MTGR_TRITONSERVER"])
    if explicit is not None:
        if not _is_executable(explicit):
            raise ConfigurationError(f"{explicit} is not an executable file; give the path of a tritonserver binary.")
        wheel = _find_wheel()
        if is_launcher(explicit) or (wheel is not None and explicit.resolve() == wheel.binary.resolve()):
            return _required(wheel)
        return _native(explicit)
    return find_native(environ) or _required(_find_wheel())


def find_native(environ: Mapping[str, str] | None = None) -> Installation | None:
    """The first tritonserver on PATH, or the one of NVIDIA's image; None if there is none."""
    environ = os.environ if environ is None else environ
    for candidate in _native_candidates(environ):
        if _is_executable(candidate) and not is_launcher(candidate):
            return _native(candidate)
    return None


def is_launcher(path: Path) -> bool:
    """Whether ``path`` is the console launcher that this package installs."""
    if not os.access(path, os.R_OK):
        return False
    with path.open("rb") as file:
        return LAUNCHER_MARK.encode() in file.read(1024)


def _native_candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    for folder in environ.get("PATH", "").split(os.pathsep):
        if folder:
            yield Path(folder) / "tritonserver"
    yield _NATIVE_ROOT / "bin" / "tritonserver"


def _native(binary: Path) -> Installation:
    root = binary.resolve().parent.parent
    if not (root / "backends").is_dir():
        root = _NATIVE_ROOT
    version_file = root / "TRITON_VERSION"
    version = version_file.read_text(encoding="utf-8").strip() if version_file.is_file() else "native"
    return Installation(
        binary=binary.absolute(), backends=root / "backends", caches=None, libraries=(), stubs=None, version=version
    )


def _find_wheel() -> Installation | None:
    try:
        wheel = metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError:
        return None
    # Located, not imported: importing pytriton loads its web framework and takes a second.
    root = Path(str(wheel.locate_file("pytriton/tritonserver")))
    return Installation(
        binary=root / "bin" / "tritonserver",
        backends=root / "backends",
        caches=root / "caches",
        libraries=(Path(str(wheel.locate_file("nvidia_pytriton.libs"))),),
        stubs=root / "python_backend_stubs",
        version=wheel.version,
    )


def _required(wheel: Installation | None) -> Installation:
    if wheel is None:
        raise UnavailableError(
            "no tritonserver was found on PATH, in /opt/tritonserver or among the packages of "
            f"{sys.executable}: run `pip install 'mtgr[serve]'`, or work in NVIDIA's image."
        )
    return wheel


def _is_executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
