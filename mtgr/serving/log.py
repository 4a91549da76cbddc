"""Reading the server's log: how far it is and what went wrong."""

from __future__ import annotations

import re
from pathlib import Path

_INFO_OR_WARNING = re.compile(r"[IWV]\d{4} ")
# What a host without a GPU logs at every start.
_HARMLESS = ("CudaDriverHelper has not been initialized", "Failed to initialize NVML", "failed to load all models")
# What follows is the page of usage that the server prints under a wrong argument.
_USAGE = "Usage: tritonserver"


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
