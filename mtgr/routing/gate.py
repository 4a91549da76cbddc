"""The router's admission rule, applied before anything is spent on a request."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from mtgr.routing.board import PressureBoard, UsualSeconds
from mtgr.routing.deadline import Deadline
from mtgr.routing.pressure import ROUTER
from mtgr.routing.reasons import Reason, RefusedError

Clock = Callable[[], float]

# How often the board is told what time requests have; it moves by 2% with each of them.
_ANNOUNCED_SECONDS = 0.02


class Gate:
    """Refuses what the router would refuse; for the models in front of it.

    Args:
        board: Where the router says how hard it is pressed; without one only ``max_queue`` holds.
        max_queue: Most requests that wait in front of the router.
        clock: Gives seconds.
    """

    def __init__(self, board: PressureBoard | None, max_queue: int, clock: Clock = time.monotonic) -> None:
        self.max_queue = max_queue
        self._board = board
        self._clock = clock
        self._usual = UsualSeconds()
        self._announced = -math.inf

    def arrive(self, deadline: Deadline, ahead: int) -> None:
        """Let a request that has just come pass, or not.

        Args:
            deadline: Until when it must be answered.
            ahead: Requests that came before it and that the router has not seen yet.

        Raises:
            RefusedError: If the router would refuse it, or too many are ahead.
        """
        self._usual.add(deadline.remaining())
        now = self._clock()
        if self._board is not None and now - self._announced > _ANNOUNCED_SECONDS:
            self._board.announce(self._usual.value)
            self._announced = now
        if ahead >= self.max_queue:
            text = f"{ROUTER}: {ahead} requests wait, as many as may; try again later."
            raise RefusedError(text, Reason.OVERLOADED)
        self._check(deadline, ahead)

    def proceed(self, deadline: Deadline) -> None:
        """Let a request go on after it waited in front of the router, or not.

        Raises:
            RefusedError: If the router would refuse it.
            RequestTimeoutError: If its time is over.
        """
        deadline.check("feature extraction")
        self._check(deadline, 0)

    def refresh(self) -> None:
        """To be called once in a while: the router may have been loaded again."""
        if self._board is not None:
            self._board.refresh()

    def close(self) -> None:
        """Let go of what is shared with the router."""
        if self._board is not None:
            self._board.close()

    def _check(self, deadline: Deadline, ahead: int) -> None:
        pressure = self._board.pressure if self._board is not None else None
        if pressure is None:
            return
        refusal = pressure.behind(ahead).refusal(ROUTER, deadline.remaining(), self._clock())
        if refusal is not None:
            raise refusal
