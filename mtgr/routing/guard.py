"""Engines behind circuit breakers and a time limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from mtgr.routing.batching import Arrays, Inference
from mtgr.routing.breaker import CircuitBreaker
from mtgr.routing.latency import LatencyTracker, MovingAverage
from mtgr.routing.reasons import EngineLostError, Reason, RefusedError

Clock = Callable[[], float]

# A call hangs if it takes so many times what nearly all calls of late took for as much, but never before so many
# seconds.
_PATIENCE = 20.0
_PATIENCE_SECONDS = 1.5
_KNOWN = 20  # calls, old ones counted in part, from which on that is known
_HALF_LIFE = 60.0


class GuardedInference:
    """Runs batches, and tells each model's breaker how they ended.

    The time limit is in here, not around it: from outside, a limit that passed looks like a caller who gave up, which
    no breaker may hold against the engine.

    An engine that hangs would hold up whoever waits for it until the limit, so the limit follows what its batches took
    of late, and grows with what is more in this one; a call that exceeds it, or whose engine is lost, opens the breaker
    at once.

    Args:
        engines: What runs a batch.
        breaker: Gives a model's breaker.
        timeout: Most seconds for one batch.
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
        self._latencies = LatencyTracker(_HALF_LIFE, clock=clock)
        self._sizes: dict[str, MovingAverage] = {}

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
        size = sum(array.size for array in inputs.values())
        limit = self._limit(model, size)
        try:
            async with asyncio.timeout(limit):
                answer = await self._engines.infer(model, inputs, outputs)
        except asyncio.CancelledError:
            permit.cancel()
            raise
        except TimeoutError as error:
            permit.trip(f"a call that did not end within {limit:.2g} s")
            raise RefusedError(f"{model} did not answer within {limit:.2g} s", Reason.TIMED_OUT) from error
        except EngineLostError:
            # Triton 2.51 never takes a stub back, and may itself die of calling one that has come to again.
            permit.trip("its process was found to be gone", for_ever=True)
            raise
        except BaseException:
            permit.record(False, self._clock() - started)
            raise
        seconds = self._clock() - started
        permit.record(True, seconds)
        self._latencies.record(model, seconds)
        self._sizes.setdefault(model, MovingAverage(_HALF_LIFE, self._clock)).add(size)
        return answer

    def _limit(self, model: str, size: int) -> float:
        """Seconds for a call of this model with so many numbers."""
        usual = self._latencies.percentile(model, 99)
        if usual is None or self._latencies.weight(model) < _KNOWN:
            return self._timeout
        usual_size = self._sizes[model].mean or 1.0
        return min(self._timeout, max(_PATIENCE_SECONDS, _PATIENCE * usual * max(1.0, size / usual_size)))
