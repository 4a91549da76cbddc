"""Merging of calls by shape: nothing is lost, nothing is mixed up, nobody waits for another shape's turn."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtgr.errors import UnavailableError
from mtgr.routing.batching import Arrays, ShapeBatcher


class DoublingEngine:
    """Answers twice its input after a turn of the loop, and writes down what it was called with."""

    def __init__(self, fails_on: str = "") -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.running = 0
        self.most_running = 0
        self.gate = asyncio.Event()
        self.fails_on = fails_on

    async def infer(self, model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.shapes.append(inputs["x"].shape)
        await self.gate.wait()
        self.running -= 1
        if model == self.fails_on:
            raise UnavailableError("out of order")
        return dict.fromkeys(outputs, inputs["x"] * 2)


def run_all(lengths: list[int], max_batch: int, max_running: int) -> tuple[DoublingEngine, list[Arrays]]:
    async def together() -> tuple[DoublingEngine, list[Arrays]]:
        engine = DoublingEngine()
        batcher = ShapeBatcher(engine, max_batch, max_running)
        calls = [
            asyncio.ensure_future(batcher.infer("m", {"x": np.full((1, length), index)}, ["y"]))
            for index, length in enumerate(lengths)
        ]
        await asyncio.sleep(0)
        engine.gate.set()
        return engine, await asyncio.gather(*calls)

    return asyncio.run(together())


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=60),
    st.integers(1, 8),
    st.integers(1, 3),
)
def test_every_call_gets_its_own_answer(lengths: list[int], max_batch: int, max_running: int) -> None:
    engine, answers = run_all(lengths, max_batch, max_running)
    for index, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        np.testing.assert_array_equal(answer["y"], np.full((1, length), 2 * index))
    assert max(shape[0] for shape in engine.shapes) <= max_batch
    assert engine.most_running <= max_running
    assert sum(shape[0] for shape in engine.shapes) == len(lengths)


def test_interleaved_shapes_share_batches() -> None:
    # Two shapes in turn: a batcher that looks at neighbours only would never merge any of them.
    engine, _ = run_all([64, 128] * 20, max_batch=32, max_running=2)
    assert len(engine.shapes) <= 4


def test_a_model_that_takes_fewer_is_not_given_more() -> None:
    async def check() -> None:
        engine = DoublingEngine()
        batcher = ShapeBatcher(engine, max_batch=8, max_running=1, largest={"alone": 1, "pairs": 2}.get)
        calls = [
            batcher.infer(model, {"x": np.full((1, 3), index)}, ["y"])
            for model in ("alone", "pairs", "m")
            for index in range(9)
        ]
        engine.gate.set()
        await asyncio.gather(*calls)
        # The first of each model goes alone, for its engine is idle.
        assert sorted(shape[0] for shape in engine.shapes) == sorted([1] * 9 + [1, 2, 2, 2, 2] + [1, 8])

    asyncio.run(check())


def test_the_next_batch_is_at_the_engine_before_it_asks() -> None:
    async def check() -> None:
        engine = DoublingEngine()
        batcher = ShapeBatcher(engine, max_batch=8)
        calls = [asyncio.ensure_future(batcher.infer("m", {"x": np.zeros((1, 3))}, ["y"])) for _ in range(7)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert engine.shapes == [(1, 3), (1, 3)]  # one for the engine, one behind it; the rest will go together
        engine.gate.set()
        await asyncio.gather(*calls)
        assert engine.shapes[2:] == [(5, 3)]

    asyncio.run(check())


def test_no_batch_waits_at_an_engine_that_takes_long() -> None:
    class SlowEngine(DoublingEngine):
        async def infer(self, model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> Arrays:
            answer = await super().infer(model, inputs, outputs)
            await asyncio.sleep(0.06)
            return answer

    async def check() -> None:
        engine = SlowEngine()
        engine.gate.set()
        batcher = ShapeBatcher(engine, max_batch=8)
        await batcher.infer("m", {"x": np.zeros((1, 3))}, ["y"])
        calls = [asyncio.ensure_future(batcher.infer("m", {"x": np.zeros((1, 3))}, ["y"])) for _ in range(7)]
        await asyncio.gather(*calls)
        assert engine.shapes == [(1, 3), (1, 3), (6, 3)]
        assert engine.most_running == 1

    asyncio.run(check())


def test_an_idle_engine_is_called_at_once() -> None:
    async def check() -> None:
        engine = DoublingEngine()
        batcher = ShapeBatcher(engine, max_running=1)
        call = asyncio.ensure_future(batcher.infer("m", {"x": np.zeros((1, 3))}, ["y"]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert engine.shapes == [(1, 3)]
        engine.gate.set()
        await call

    asyncio.run(check())


def test_the_engine_has_its_next_batch_before_anybody_is_answered() -> None:
    # Otherwise it would stand idle while up to `max_batch` answers are ranked and sent.
    async def check() -> None:
        engine = DoublingEngine()
        batcher = ShapeBatcher(engine, max_running=1)
        called: list[int] = []

        async def ask(length: int) -> None:
            await batcher.infer("m", {"x": np.zeros((1, length))}, ["y"])
            called.append(len(engine.shapes))

        engine.gate.set()
        await asyncio.gather(*(ask(length) for length in (3, 3, 4, 5)))
        assert engine.shapes[:1] == [(1, 3)]
        assert all(calls > answered for answered, calls in enumerate(called[:-1], 1)), called

    asyncio.run(check())


def test_an_error_reaches_every_call_of_its_batch_and_no_other_model() -> None:
    async def check() -> None:
        engine = DoublingEngine(fails_on="bad")
        engine.gate.set()
        batcher = ShapeBatcher(engine, max_running=1)
        bad = [batcher.infer("bad", {"x": np.zeros((1, 2))}, ["y"]) for _ in range(3)]
        good = [batcher.infer("good", {"x": np.ones((1, 2))}, ["y"]) for _ in range(3)]
        answers = await asyncio.gather(*bad, *good, return_exceptions=True)
        assert all(isinstance(answer, UnavailableError) for answer in answers[:3])
        for answer in answers[3:]:
            assert not isinstance(answer, BaseException)
            np.testing.assert_array_equal(answer["y"], [[2.0, 2.0]])
        # The model is not stuck afterwards.
        with pytest.raises(UnavailableError):
            await batcher.infer("bad", {"x": np.zeros((1, 2))}, ["y"])

    asyncio.run(check())


def test_a_cancelled_call_is_dropped_and_frees_its_place() -> None:
    async def check() -> None:
        engine = DoublingEngine()
        batcher = ShapeBatcher(engine, max_batch=1, max_running=1)
        first = asyncio.ensure_future(batcher.infer("m", {"x": np.zeros((1, 1))}, ["y"]))
        second = asyncio.ensure_future(batcher.infer("m", {"x": np.zeros((1, 2))}, ["y"]))
        third = asyncio.ensure_future(batcher.infer("m", {"x": np.zeros((1, 3))}, ["y"]))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, third)
        assert engine.shapes == [(1, 1), (1, 3)]

    asyncio.run(check())
