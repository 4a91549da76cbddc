"""What a build says: the builder's log, its progress, and one sentence out of an error."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

_BAR_EVERY_S = 2.0


def file_logger(trt: Any, log: TextIO, errors: list[str]) -> Any:
    """A logger that writes everything to ``log`` and keeps errors.

    The class is made here, as its base exists only where TensorRT does.
    """

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            name = getattr(severity, "name", str(severity))
            log.write(f"{time.strftime('%H:%M:%S')} {name}: {msg}\n")
            if name in ("ERROR", "INTERNAL_ERROR"):
                log.flush()
                errors.append(msg)

    return Log()


def progress_monitor(trt: Any, stream: TextIO | None = None) -> Any:
    """A monitor that prints the outermost phase's steps, every few seconds; Ctrl-C ends the build at a step."""

    class Progress(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._outer: dict[str, int] = {}
            self._next = time.monotonic() + _BAR_EVERY_S
            self._stopped = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._outer[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name in self._outer and time.monotonic() >= self._next:
                    self._next = time.monotonic() + _BAR_EVERY_S
                    print(f"  TensorRT: {phase_name}, {step} of {self._outer[phase_name]}", file=stream or sys.stderr)
            except KeyboardInterrupt:
                self._stopped = True
            return not self._stopped

        def phase_finish(self, phase_name: str) -> None:
            self._outer.pop(phase_name, None)

    return Progress()


def one_line(text: str) -> str:
    """A message without line breaks and full stop, cut to 300 characters."""
    return " ".join(text.split()).rstrip(".;")[:300]
