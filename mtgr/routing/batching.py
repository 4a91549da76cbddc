"""Merges concurrent calls of equal shape into batches.

Triton's dynamic batcher ends a batch at the first queued request of another shape, so users whose contexts fall into
different buckets, arriving interleaved, hardly ever meet. Here calls wait by shape instead, and only while the engine
is busy: an idle engine is called at once, without any delay. Where calls are brief one batch waits at the engine
itself: a router that is asked for the next one when the last is done leaves the engine idle for a millisecond each
time, on two busy cores a seventh of what it could do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]
_Key = tuple[tuple[str, ...], tuple[tuple[str, tuple[int, ...]], ...]]

# Of calls that take longer, waiting at the engine included, a millisecond in between is nothing, while requests that
# have left the router's line are merged with no others and can be refused no more.
_BRIEF_SECONDS = 0.05


class Inference(Protocol):
    """Whatever runs a batch."""

    async def infer(self, model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """Run one batch; all tensors have a leading batch dimension."""


@dataclass
class _Call:
    arrival: int
    inputs: Mapping[str, npt.NDArray[Any]]
    answer: asyncio.Future[Arrays]


@dataclass
class _Model:
    running: int = 0
    seconds: float = 0.0  # that the last call took
    waiting: dict[_Key, deque[_Call]] = field(default_factory=dict)


class ShapeBatcher:
    """Calls an engine with batches of calls that have the same shapes.

    For one event loop at a time. A call that is cancelled while it waits is dropped; an engine's error
    reaches every call of its batch.

    Args:
        engines: What runs a batch.
        max_batch: Most calls in a batch.
        largest: Gives what a model takes at most, where that may be less; None if it is not known.
        max_running: Batches given to a model at a time: one more than it has instances, and it need not wait for the
            router between two of them. While calls take long, one less, but one always.
        max_tokens: Most tokens in a batch, which bounds an engine's memory; a longer call goes alone.
    """

    def __init__(
        self,
        engines: Inference,
        max_batch: int = 32,
        max_running: int = 2,
        max_tokens: int = 16_384,
        largest: Callable[[str], int | None] = lambda model: None,
    ) -> None:
        self._engines = engines
        self._max_batch = max_batch
        self._largest = largest
        self._max_running = max_running
        self._max_tokens = max_tokens
        self._models: dict[str, _Model] = {}
        self._arrivals = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def infer(self, model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """Run one request, tensors with a leading dimension of 1, in whatever batch it meets."""
        key = (tuple(outputs), tuple((name, array.shape[1:]) for name, array in sorted(inputs.items())))
        call = _Call(self._arrivals, inputs, asyncio.get_running_loop().create_future())
        self._arrivals += 1
        state = self._models.setdefault(model, _Model())
        state.waiting.setdefault(key, deque()).append(call)
        self._dispatch(model, state)
        return await call.answer

    def _dispatch(self, model: str, state: _Model) -> None:
        is_brief = state.seconds < _BRIEF_SECONDS
        running = self._max_running if is_brief else max(1, self._max_running - 1)
        while state.running < running and state.waiting:
            # Whoever waits longest goes first, and takes along all of the same shape.
            key = min(state.waiting, key=lambda shape: state.waiting[shape][0].arrival)
            queue = state.waiting[key]
            tokens = sum(shape[0] for _, shape in key[1])
            largest = self._largest(model) or self._max_batch
            most = max(1, min(self._max_batch, largest, self._max_tokens // max(tokens, 1)))
            batch = [queue.popleft() for _ in range(min(len(queue), most))]
            if not queue:
                del state.waiting[key]
            batch = [call for call in batch if not call.answer.done()]
            if batch:
                state.running += 1
                task = asyncio.get_running_loop().create_task(self._run(model, state, batch, key[0]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _run(self, model: str, state: _Model, batch: list[_Call], outputs: Sequence[str]) -> None:
        answers: Arrays | None = None
        error: BaseException | None = None
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            answers = await self._engines.infer(model, _merge([call.inputs for call in batch]), outputs)
        except BaseException as raised:  # noqa: BLE001 - every caller gets it, and what is no Exception is raised below
            error = raised
        # Before anybody is woken: the engine is to work on the next batch while these answers are made and sent.
        state.running -= 1
        state.seconds = clock() - started
        self._dispatch(model, state)
        for index, call in enumerate(batch):
            if call.answer.done():
                continue
            if answers is not None:
                call.answer.set_result({name: array[index : index + 1] for name, array in answers.items()})
            elif error is not None:
                call.answer.set_exception(error)
        if error is not None and not isinstance(error, Exception):
            raise error


def _merge(inputs: Sequence[Mapping[str, npt.NDArray[Any]]]) -> Mapping[str, npt.NDArray[Any]]:
    if len(inputs) == 1:
        return inputs[0]
    return {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}
