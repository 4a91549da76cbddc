"""Draining: at SIGTERM tritonserver refuses every further call of an engine, so the router must be done before.

Whoever is about to stop the server makes a file; the router sees it, refuses new requests, lets those in flight end,
and makes a second file beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

DRAIN_VARIABLE = "MTGR_DRAIN_FILE"

_POLL_SECONDS = 0.05
_SEEN_SECONDS = 1.0


class DrainWatch:
    """The router's side: looks for the file from a thread of its own.

    Args:
        path: The file.
        drain: Called once when it is there.
        idle: Whether no request is in flight.
    """

    def __init__(self, path: Path, drain: Callable[[], None], idle: Callable[[], bool]) -> None:
        self._path = path
        self._drain = drain
        self._idle = idle
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="drain", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._path.exists():
            if self._ended.wait(_POLL_SECONDS):
                return
        self._drain()
        _seen(self._path).touch()
        while not self._idle():
            if self._ended.wait(_POLL_SECONDS):
                return
        _drained(self._path).touch()


def drain(path: Path, timeout: float) -> bool:
    """The launcher's side: ask the router to drain and wait until it has; False if it does not answer in time.

    A router that does not even see the file within a second is not there or hangs, and is not waited for.
    """
    path.touch()
    start = time.monotonic()
    while not _drained(path).exists():
        waited = time.monotonic() - start
        if waited > timeout or (waited > _SEEN_SECONDS and not _seen(path).exists()):
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _seen(path: Path) -> Path:
    return path.with_name(path.name + ".seen")


def _drained(path: Path) -> Path:
    return path.with_name(path.name + ".done")
