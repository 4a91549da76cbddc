"""What the ``compiled`` engine does while no batches come: it captures graphs of shapes that larger graphs served."""

from __future__ import annotations

import logging
import time
import weakref
from threading import Event, Lock, Thread

from mtgr.engines.compiled_graphs import BucketGraphs

# Without a batch. One that comes during a capture waits for it, some 0.2 s, once: the next capture needs a new pause.
PAUSE_SECONDS = 0.5


class Pauses:
    """A thread that captures the graphs that are wanted, one after the other; it ends with its owner or at ``close``.

    Args:
        graphs: Nobody uses them without the lock.
        lock: Of their owner.
    """

    def __init__(self, graphs: BucketGraphs, lock: Lock) -> None:
        self._graphs, self._lock = graphs, lock
        self._last = time.monotonic()
        self._closed = Event()
        # The thread must not keep graphs, and what they hold of a GPU, from being dropped with their owner.
        self._thread = Thread(target=_run, args=(weakref.ref(self), self._closed), name="pauses", daemon=True)
        self._thread.start()

    def put_off(self) -> None:
        """A batch has come; to be said before the lock is waited for, lest another capture overtake it."""
        self._last = time.monotonic()

    def close(self) -> None:
        """End the thread, after the capture that it is at."""
        self._closed.set()
        self._thread.join()

    def step(self) -> float:
        """Capture one graph if this is a pause and one is wanted; seconds until it is worth to look again."""
        with self._lock:
            remaining = self._last + PAUSE_SECONDS - time.monotonic()
            if remaining > 0:
                return remaining
            try:
                return 0.0 if self._graphs.capture_wanted() else PAUSE_SECONDS
            except Exception:
                # A larger graph goes on serving the shape, which is wanted again only after many batches more.
                logging.getLogger(__name__).exception("compiled: a graph could not be captured in a pause")
                return PAUSE_SECONDS


def _run(reference: weakref.ref[Pauses], closed: Event) -> None:
    seconds = PAUSE_SECONDS
    while not closed.wait(seconds):
        pauses = reference()
        if pauses is None:
            return
        seconds = pauses.step()
        del pauses
