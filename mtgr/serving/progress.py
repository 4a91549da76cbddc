"""Progress of a server's start on stderr, shown only when it takes long enough to wonder."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

_QUIET_S = 2.0
_LINE_EVERY_S = 5.0


class StartProgress:
    """Counts loaded models: a bar on a terminal, a line every few seconds elsewhere.

    Args:
        total: Models in the repository.
        stream: Where to write; stderr by default.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._next_line = self._started + _QUIET_S
        self._bar: Any = None

    def __enter__(self) -> StartProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, loaded: int) -> None:
        """Show that ``loaded`` models are ready, if it is time to."""
        now = time.monotonic()
        if now < self._next_line:
            return
        if self._stream.isatty():
            if self._bar is None:
                from tqdm import tqdm  # only here: a start that is quick enough does not need it

                self._bar = tqdm(total=self._total, desc="tritonserver: loading models", file=self._stream, leave=False)
            self._bar.n = loaded
            self._bar.refresh()
        else:
            seconds = now - self._started
            print(
                f"tritonserver: {loaded} of {self._total} models loaded after {seconds:.0f} s",
                file=self._stream,
                flush=True,
            )
            self._next_line = now + _LINE_EVERY_S
