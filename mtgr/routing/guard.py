"""Engines behind circuit breakers and a time limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from mtgr.routing.batching import Arrays, Inference
from mtgr.routing.breaker import CircuitBreaker
from mtgr.routing.reasons import Reason, RefusedError

Clock = Callable[[], float]


class GuardedInference:
    """Runs batches, and tells each model's breaker how they ended.

    The time limit is in here, not around it: from outside, a limit that passed looks like a caller who gave up, which
    no breaker may hold against the engine.

    Args:
        engines: What runs a batch.
        breaker: Gives a model's breaker.
        timeout: Seconds for one batch.
        clock: Gives seconds.
    """

    def __init__(
        self,
        engines: Inference,
        breaker: Callable[[str], CircuitBreaker],
        timeout: float,
        clock: Clock = time.monotonic,
    ) -> None:
        self._engines = engines
        self._breaker = breaker
        self._timeout = timeout
        self._clock = clock

    async def infer(self, model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """Run one batch.

        Raises:
            UnavailableError: If the breaker is open, the batch failed, or it took too long.
        """
        breaker = self._breaker(model)
        permit = breaker.allow()
        if permit is None:
            raise RefusedError(breaker.refusal or f"{model} is left alone", Reason.BREAKER_OPEN)
        started = self._clock()
        try:
            async with asyncio.timeout(self._timeout):
                answer = await self._engines.infer(model, inputs, outputs)
        except asyncio.CancelledError:
            permit.cancel()
            raise
        except BaseException as error:
            permit.record(False, self._clock() - started)
            if isinstance(error, TimeoutError):
                raise RefusedError(f"{model} did not answer within {self._timeout:g} s", Reason.TIMED_OUT) from error
            raise
        permit.record(True, self._clock() - started)
        return answer
