"""The command and the environment in which tritonserver and its Python stubs find libraries and packages."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from mtgr.errors import ConfigurationError
from mtgr.serving.assemble import assemble_backends, python_version, stub_python_version
from mtgr.serving.find import Installation

# The key of the management endpoints (see mtgr.serving.management) is the launcher's; models have no use for it.
ADMIN_KEY_VARIABLE = "MTGR_ADMIN_KEY"

_MAX_THREADS = 4


def server_command(installation: Installation) -> tuple[list[str], dict[str, str]]:
    """The command, without a model repository, and the environment that start this installation.

    Raises:
        ConfigurationError: If the wheel's Python stub cannot run with this interpreter or its packages.
    """
    backends = assemble_backends(installation)
    command = [str(installation.binary), f"--backend-directory={backends}"]
    if installation.caches is not None:
        command.append(f"--cache-directory={installation.caches}")
    return command, server_environment(installation, backends)


def server_environment(
    installation: Installation, backends: Path, environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of a server process.

    Args:
        installation: The server.
        backends: Its backend directory (see :func:`mtgr.serving.assemble.assemble_backends`).
        environ: What to start from; the process's own environment by default.

    Raises:
        ConfigurationError: If the wheel's Python stub cannot run with this interpreter or its packages.
    """
    env = dict(os.environ if environ is None else environ)
    env.pop(ADMIN_KEY_VARIABLE, None)
    if installation.bundled:
        _check_numpy()
        paths = [_libpython_directory(), *map(str, installation.libraries)]
        paths += [path for path in env.get("LD_LIBRARY_PATH", "").split(os.pathsep) if path and path not in paths]
        env["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    if stub_python_version(backends) == python_version():
        # The stub embeds Python, which looks up `python3` on PATH to find its prefix and its packages.
        folder = str(Path(sys.executable).parent)
        paths = [path for path in env.get("PATH", os.defpath).split(os.pathsep) if path and path != folder]
        env["PATH"] = os.pathsep.join([folder, *paths])
        env.pop("PYTHONHOME", None)
        if sys.prefix != sys.base_prefix:
            env["VIRTUAL_ENV"] = sys.prefix
    # Every model runs in a stub of its own: if each took all cores, they would queue for one another.
    env.setdefault("OMP_NUM_THREADS", str(min(_MAX_THREADS, len(os.sched_getaffinity(0)))))
    locale = env.get("LC_ALL") or env.get("LC_CTYPE") or env.get("LANG") or ""
    if not locale.lower().replace("-", "").endswith("utf8"):
        env["LC_ALL"] = "C.UTF-8"
    return env


def _libpython_directory() -> str:
    """The directory of this interpreter's libpython, which the stub must load before any other of the same version.

    Raises:
        ConfigurationError: If the interpreter has no shared library.
    """
    library = f"libpython{python_version()}.so.1.0"
    libdir = sysconfig.get_config_var("LIBDIR") or ""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    candidates = [libdir, os.path.join(libdir, multiarch), os.path.join(sys.base_prefix, "lib")]
    for folder in candidates:
        if folder and os.path.isfile(os.path.join(folder, library)):
            return folder
    raise ConfigurationError(
        f"{library} was not found in {libdir}: tritonserver's Python backend needs it, so install it "
        f"(Debian, Ubuntu: libpython{python_version()}) or use an interpreter built with --enable-shared."
    )


def _check_numpy() -> None:
    version = metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:
        raise ConfigurationError(
            f"numpy {version} is installed, under which the Python backend of nvidia-pytriton crashes: "
            "run `pip install 'numpy<2'`."
        )
