"""The server's log: how far it is and what went wrong, and passing it on where a container's output is collected."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from types import TracebackType
from typing import IO

_INFO_OR_WARNING = re.compile(r"[IWV]\d{4} ")
# What a host without a GPU logs at every start.
_HARMLESS = ("CudaDriverHelper has not been initialized", "Failed to initialize NVML", "failed to load all models")
# What follows is the page of usage that the server prints under a wrong argument.
_USAGE = "Usage: tritonserver"
_KEPT_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 16
_LAST_LINES_S = 2.0


class PassedOnLog:
    """What is written goes on to ``output``; the file keeps the latest part of it, so that it cannot fill a disk.

    Use it as a context manager around the start of the process that writes; :meth:`join` when that has ended.

    Args:
        path: The file, of at most ``kept_bytes``.
        output: Where everything goes.
        kept_bytes: Size at which the file starts anew.
    """

    def __init__(self, path: Path, output: IO[bytes], kept_bytes: int = _KEPT_BYTES) -> None:
        self._path = path
        self._output = output
        self._kept_bytes = kept_bytes
        self._reader, writer = os.pipe()
        self._writer = os.fdopen(writer, "wb")
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def __enter__(self) -> IO[bytes]:
        return self._writer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()  # the process has an end of its own; when that is closed too, the reader ends

    def join(self) -> None:
        """Wait for the last lines, for two seconds at most: somebody may have inherited the pipe."""
        self._thread.join(_LAST_LINES_S)

    def _run(self) -> None:
        with os.fdopen(self._reader, "rb", buffering=0) as reader, self._path.open("wb", buffering=0) as kept:
            while chunk := reader.read(_CHUNK_BYTES):
                if kept.tell() + len(chunk) > self._kept_bytes:
                    kept.seek(0)
                    kept.truncate()
                kept.write(chunk)
                try:
                    self._output.write(chunk)
                    self._output.flush()
                except (OSError, ValueError):  # nobody reads it any more; the server must be able to write all the same
                    continue


def read_log(path: Path) -> str:
    """The log's text so far; empty if there is none yet."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def loaded_count(text: str) -> int:
    """How many models the log says were loaded."""
    return text.count("successfully loaded '")


def poll_failure(text: str, model: str) -> str:
    """Why a model directory was not taken up at all (an unreadable config, say); empty if the log says nothing."""
    found = re.search(rf"Poll failed for model directory '{re.escape(model)}': (.*?)\"?$", text, re.MULTILINE)
    return found.group(1) if found else ""


def excerpt(text: str, limit: int = 20) -> str:
    """The last lines that tell of a failure: errors, and what models and stubs printed.

    Args:
        text: The whole log.
        limit: Lines to give at most.

    Returns:
        The lines, indented, after a line break; empty if there are none.
    """
    lines: list[str] = []
    for line in text.partition(_USAGE)[0].splitlines():
        # Triton's tables repeat what the lines say.
        if not line.strip() or line[0] in "|+" or any(part in line for part in _HARMLESS):
            continue
        if _INFO_OR_WARNING.match(line):
            continue
        # The server escapes the line breaks of a traceback.
        parts = [part.rstrip().removesuffix('"') for part in line.replace("\\n", "\n").splitlines()]
        lines += [part for part in parts if part.strip(" ;")]
    unique = list(dict.fromkeys(lines))
    return "".join(f"\n    {line}" for line in unique[-limit:])
