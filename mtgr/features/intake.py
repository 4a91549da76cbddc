"""Where requests stand in line for feature extraction, when ``Pace`` says so: their time counts, they go in turn."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Arrival = TypeVar("Arrival")


class Intake(Generic[Arrival]):
    """A queue with one worker, a thread of its own.

    Where there is a line, whoever takes requests in must not be held up by the work: a model that Triton waits for gets
    no further ones, and those lie where nobody can tell how long they have waited, nor refuse them.

    Args:
        work: Does one; what it raises is given to ``failed``, and the next one is done.
        failed: Told of what went wrong.
    """

    def __init__(self, work: Callable[[Arrival], None], failed: Callable[[Arrival, BaseException], None]) -> None:
        self._work = work
        self._failed = failed
        self._queue: queue.SimpleQueue[Arrival | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="extraction", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that nobody works on yet."""
        return self._queue.qsize()

    def put(self, arrival: Arrival) -> None:
        """Have it done after those that are here."""
        self._queue.put(arrival)

    def stop(self) -> None:
        """End the thread after all that is here was done."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (arrival := self._queue.get()) is not None:
            try:
                self._work(arrival)
            except BaseException as error:  # noqa: BLE001 - one request's trouble must not end the others' work
                with contextlib.suppress(Exception):  # the caller may be gone
                    self._failed(arrival, error)
