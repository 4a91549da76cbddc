"""Where answers wait to be sent, so that an event loop need not."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Send = Callable[[], None]

_MOST = 16


class Outbox:
    """A thread that sends answers, in their order, for any threads that put them here.

    Triton's response senders return when the server has passed an answer on, some tenths of a millisecond later: in
    them an event loop would spend a third of its time, for every request the same.

    Args:
        failed: Told of an answer that could not be sent.
        most: Answers that may wait; further ones are sent by whoever brings them, so that it is held up in time.
    """

    def __init__(self, failed: Callable[[BaseException], None], most: int = _MOST) -> None:
        self._failed = failed
        self._most = most
        self._queue: queue.SimpleQueue[Send | None] = queue.SimpleQueue()
        self._put, self._sent = 0, 0
        self._putting = threading.Lock()  # only this class's own thread counts what was sent
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether all that was put here is sent."""
        return self._sent == self._put

    def put(self, send: Send, at_once: bool = False) -> None:
        """Have an answer sent.

        Args:
            send: Makes and sends it.
            at_once: Whether the caller, who has nothing else to do, sends it itself: that saves a change of threads.
        """
        if at_once or self._queue.qsize() >= self._most:
            self._try(send)
        else:
            with self._putting:
                self._put += 1
            self._queue.put(send)

    def stop(self) -> None:
        """End the thread after all that is here was sent."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            send = self._queue.get()
            if send is None:
                return
            self._try(send)
            self._sent += 1

    def _try(self, send: Send) -> None:
        try:
            send()
        except BaseException as error:  # noqa: BLE001 - one caller's trouble must not keep answers from the others
            self._failed(error)
