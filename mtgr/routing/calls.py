"""Threads for calls that block: an event loop hands one over and awaits what it returns."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
_PATIENCE_SECONDS = 2.0
_Work = tuple[Callable[[], object], asyncio.AbstractEventLoop, "asyncio.Future[object]"]


class CallThreads:
    """Daemon threads, as many as calls were open at a time so far; for one event loop.

    ``loop.run_in_executor`` does the same by way of two futures that are chained, with a lock and a condition each:
    a tenth of a millisecond a call where processors are busy.

    Args:
        most: Most threads; further calls wait.
        name: Of the threads.

    Attributes:
        name: Of the threads.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self.name = name
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._open = 0

    async def run(self, call: Callable[[], Result]) -> Result:
        """Run a call in a thread; who gives up waiting for it leaves it running."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Result] = loop.create_future()
        if self._open >= len(self._threads) and self._open < self._most:
            self._start()
        self._open += 1
        self._work.put((call, loop, answer))  # type: ignore[arg-type]
        return await answer

    def stop(self) -> None:
        """Let the threads end after what they were given, and wait for that, but not for a call that hangs."""
        for _ in self._threads:
            self._work.put(None)
        # A thread that lives when the interpreter ends may wake up in what is no longer there.
        end = time.monotonic() + _PATIENCE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _start(self) -> None:
        thread = threading.Thread(target=self._live, name=f"{self.name}_{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _live(self) -> None:
        while (work := self._work.get()) is not None:
            call, loop, answer = work
            result: object = None
            error: BaseException | None = None
            try:
                result = call()
            except BaseException as raised:  # noqa: BLE001 - whoever awaits the call gets it
                error = raised
            try:
                loop.call_soon_threadsafe(self._settle, answer, result, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

    def _settle(self, answer: asyncio.Future[object], result: object, error: BaseException | None) -> None:
        self._open -= 1
        if answer.done():
            return
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)
