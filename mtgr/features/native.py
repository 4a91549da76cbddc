"""Loops in machine code: plain Python that Numba compiles as a module is imported.

NumPy makes a pass and an array of every operation, some two hundred for one request, each of a few microseconds and
more where processes share a core. A loop is done with a request in some tens.

What was compiled is kept in the user's cache folder (``XDG_CACHE_HOME``), by the text of this package, of the schema
and of whatever else has loops: Numba itself looks at the time of one file, and would go on with what another file's
constants were. Where nothing can be kept, or what is there cannot be read, every start compiles anew, for about five
seconds.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba import config, njit, types, vectorize

Function = TypeVar("Function", bound=Callable[..., Any])

INT = types.int64
NONE = types.void


def array(kind: str, dimensions: int = 1, written: bool = False) -> Any:
    """Numba's type of a contiguous array of one of ``uint8``, ``int32`` and ``int64``.

    Args:
        kind: Name of the element's type.
        dimensions: Of the array.
        written: Whether the function writes it; others may be read-only.
    """
    return types.Array(getattr(types, kind), dimensions, "C", readonly=not written)


def compiled(result: Any, *arguments: Any) -> Callable[[Function], Function]:
    """Compile a function for one signature; it checks no index.

    Args:
        result: Type of what is returned.
        arguments: Types of the arguments.
    """
    # Divisors are never zero, which Python's rules would have checked.
    return _kept(lambda cache: njit(result(*arguments), cache=cache, error_model="numpy"))


def elementwise(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a NumPy ufunc of a function of numbers; types as for ``compiled``."""
    return _kept(lambda cache: vectorize([result(*arguments)], cache=cache))


def group(*kinds: Any) -> Any:
    """Numba's type of a tuple."""
    return types.Tuple(kinds)


def _kept(compiler: Callable[[bool], Any]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        if _FOLDER is not None:
            before, config.CACHE_DIR = config.CACHE_DIR, _FOLDER
            try:
                return cast(Function, compiler(True)(function))
            except Exception:  # noqa: BLE001 - a full disk, a file that was cut off: Numba lets all of them through
                pass
            finally:
                config.CACHE_DIR = before
        return cast(Function, compiler(False)(function))

    return decorate


def sources() -> list[Path]:
    """The files that have loops, and those whose constants these read."""
    package = Path(__file__).parents[1]
    others = ("schema.py", "data/tasks.py", "engines/row_reader.py", "routing/metrics.py", "vllm_plugin/rows.py")
    return [*sorted(package.glob("features/*.py")), *(package / name for name in others)]


def _folder() -> str | None:
    """Where compiled functions of this very text are kept; None if nothing can be."""
    text = b"".join(path.read_bytes() for path in sources())
    name = f"{hashlib.sha256(text).hexdigest()[:16]}-numba{numba.__version__}-py{sys.version_info.minor}"
    # In a container the first may be part of an image, and read-only.
    for base in (os.environ.get("XDG_CACHE_HOME"), "~/.cache"):
        try:
            if base:
                folder = Path(base).expanduser() / "mtgr" / "native" / name
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                status = folder.stat()
                # What lies there is run: nobody else may have put it there.
                if status.st_uid == os.geteuid() and not status.st_mode & 0o022:
                    with tempfile.TemporaryFile(dir=folder):
                        return str(folder)
        except (OSError, RuntimeError):  # it cannot be written, or there is no home
            continue
    return None


_FOLDER = _folder()
