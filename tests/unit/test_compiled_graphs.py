"""Shapes that graphs of the compiled engine are kept for, and which graph serves a batch."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from unittest import mock

import numpy as np
import pytest
import torch

from mtgr.checkpoint import Checkpoint, save_checkpoint
from mtgr.engines import compiled_graphs, compiled_pauses
from mtgr.engines.compiled import CompiledEngine, frequent_shapes
from mtgr.engines.compiled_graphs import DEPTH, BucketGraphs, Shape, Staging
from mtgr.engines.compiled_network import CompiledNetwork
from mtgr.engines.compiled_pauses import PAUSE_SECONDS, Pauses
from mtgr.schema import SLOT_COLUMN
from tests.unit.test_compiled import CATALOG, SCHEMA, arrays, model_of


def test_shapes_fall_into_buckets() -> None:
    assert Shape.of("rank", 3, 130, 17) == Shape(3, 192, 64)
    assert Shape.of("rank", 7, 130, 17) == Shape(8, 192, 64)
    assert Shape.of("retrieve", 1, 64, 0) == Shape(1, 64, None)
    assert Shape(4, 192, 64).rows == 4 * 256
    assert Shape(2, 64, None).rows == 128


def test_what_a_busy_server_meets_is_captured_at_the_start() -> None:
    """Every batch of the router's buckets up to its default size, and few enough to be kept at a time."""
    shapes = list(frequent_shapes(2000))
    captured = {Shape.of(*shape) for shape in shapes}
    assert len(captured) == len(shapes) <= 768
    for users_count, context, candidates in itertools.product(range(1, 9), (3, 700, 2000), (1, 200, 1024)):
        assert Shape.of("rank", users_count, context, candidates) in captured
    assert all(context <= 256 for _, _, context, _ in frequent_shapes(200))
    # Two thousand events, those of the last minutes, and a profile.
    assert max(context for _, _, context, _ in frequent_shapes(2101)) == 2176 == Shape.of("rank", 1, 2101, 16).context


class Finished:
    """Stands for an event of a GPU."""

    def synchronize(self) -> None: ...


class Captured:
    """Stands for a graph: its answer is the batch's first slots, in the piece of memory that it was given."""

    def __init__(self, shape: Shape) -> None:
        assert shape.candidates is not None
        self.host = [[torch.zeros(shape.batch, shape.candidates)] for _ in range(DEPTH)]

    def launch(self, context: np.ndarray, candidates: np.ndarray, piece: int) -> Finished:
        users, count = candidates.shape[:2]
        self.host[piece][0][:users, :count] = torch.from_numpy(candidates[..., SLOT_COLUMN].astype(np.float32))
        return Finished()


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets graphs be kept and launched where nothing is captured."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Finished())


@pytest.fixture
def made(without_gpu: None, monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Shapes in the order in which they are captured."""
    shapes: list[Shape] = []

    def capture(network: object, shape: Shape, *rest: object) -> Captured:
        shapes.append(shape)
        return Captured(shape)

    monkeypatch.setattr(compiled_graphs, "_Captured", capture)
    return shapes


def graphs_of(limit: int, log: Callable[[str], object] = print) -> BucketGraphs:
    return BucketGraphs(CompiledNetwork(model_of()), SCHEMA.width, torch.device("cpu"), limit, log)


def rows(users_count: int, context: int = 64, candidates: int = 64) -> dict[str, np.ndarray]:
    sizes = {"context": context, "candidates": candidates}
    return {name: np.full((users_count, size, SCHEMA.width), 5) for name, size in sizes.items()}


def serve(graphs: BucketGraphs, times: int, *sizes: int) -> None:
    for _ in range(times):
        assert (graphs.launch(rows(*sizes)).wait()["task_scores"] == 5).all()


def test_a_larger_graph_serves_what_none_was_captured_for(made: list[Shape]) -> None:
    """Within twice the rows; anything else is captured at once, and then serves itself and what is smaller."""
    told: list[str] = []
    graphs = graphs_of(3, told.append)

    def answer(users_count: int, context: int, candidates: int) -> None:
        found = graphs.launch(rows(users_count, context, candidates)).wait()["task_scores"]
        assert found.shape == (users_count, candidates)
        assert (found == 5).all()

    for shape in (Shape(4, 128, 64), Shape(8, 128, 64)):
        graphs.captured(shape)
    for sizes in ((3, 100, 60), (2, 128, 64), (5, 70, 64), (4, 128, 64)):
        answer(*sizes)
    assert made == [Shape(4, 128, 64), Shape(8, 128, 64)]
    assert not told
    answer(1, 128, 64)  # four times the rows would be too many
    answer(1, 64, 64)
    assert made[2:] == [Shape(1, 128, 64)]
    (line,) = told
    assert "Shape(batch=1, context=128, candidates=64) was captured while its batch waited" in line
    answer(2, 256, 64)  # one more than are kept: the one that was used longest ago goes
    assert made[3:] == [Shape(2, 256, 64)]
    answer(6, 128, 64)
    assert made[4:] == [Shape(6, 128, 64)]
    assert graphs.serving(Shape(1, 128, None)) == Shape(1, 128, None)


def test_a_shape_that_a_larger_graph_serves_is_captured_when_it_is_wanted_and_nobody_waits(made: list[Shape]) -> None:
    """Never by a batch, however many come; the one of the most batches first; at the limit another one goes for it."""
    told: list[str] = []
    graphs = graphs_of(3, told.append)
    for shape in (Shape(1, 64, 16), Shape(8, 128, 64)):
        graphs.captured(shape)
    serve(graphs, 100, 6)
    assert not graphs.capture_wanted()
    serve(graphs, 50, 6)
    serve(graphs, 250, 6, 128)
    assert made == [Shape(1, 64, 16), Shape(8, 128, 64)]
    assert graphs.capture_wanted()
    assert made[2:] == [Shape(6, 128, 64)]
    assert list(graphs._graphs) == [Shape(1, 64, 16), Shape(8, 128, 64), Shape(6, 128, 64)]
    assert graphs.capture_wanted()
    assert made[3:] == [Shape(6, 64, 64)]
    assert list(graphs._graphs) == [Shape(8, 128, 64), Shape(6, 128, 64), Shape(6, 64, 64)]
    assert [line.split(", in ")[0].split(" was ")[1] for line in told] == 2 * ["captured in a pause"]
    own = graphs._graphs[Shape(6, 64, 64)]
    with mock.patch.object(own, "launch", wraps=own.launch) as launch:
        serve(graphs, 1, 6)
    launch.assert_called_once()
    assert not graphs.capture_wanted()


class Clock:
    """Stands for ``time`` in the module of pauses."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that stands still, and no thread that looks at it."""
    clock = Clock()
    monkeypatch.setattr(compiled_pauses, "time", clock)
    monkeypatch.setattr(compiled_pauses, "Thread", mock.Mock())
    return clock


def wanting() -> BucketGraphs:
    """Graphs that want two shapes, (6, 64, 64) most."""
    graphs = graphs_of(8)
    graphs.captured(Shape(8, 128, 64))
    serve(graphs, 150, 6, 128)
    serve(graphs, 200, 6)
    return graphs


def test_a_batch_puts_captures_off(made: list[Shape], clock: Clock) -> None:
    pauses = Pauses(wanting(), Lock())
    clock.now += PAUSE_SECONDS - 0.125
    assert pauses.step() == 0.125
    pauses.put_off()
    clock.now += 0.125
    assert pauses.step() == PAUSE_SECONDS - 0.125
    assert made == [Shape(8, 128, 64)]
    clock.now += PAUSE_SECONDS
    assert pauses.step() == 0
    assert made[1:] == [Shape(6, 64, 64)]
    pauses.put_off()  # by a batch that came meanwhile: the next one waits for a pause of its own
    assert pauses.step() == PAUSE_SECONDS
    assert made[2:] == []
    clock.now += PAUSE_SECONDS
    assert pauses.step() == 0
    assert made[2:] == [Shape(6, 128, 64)]
    assert pauses.step() == PAUSE_SECONDS
    assert len(made) == 3


def test_a_capture_that_fails_in_a_pause_is_told_and_not_tried_again_at_once(
    made: list[Shape], clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = graphs_of(8)
    graphs.captured(Shape(8, 128, 64))
    serve(graphs, 150, 6)
    pauses = Pauses(graphs, Lock())
    clock.now += PAUSE_SECONDS
    with monkeypatch.context() as patched:
        patched.setattr(compiled_graphs, "_Captured", mock.Mock(side_effect=RuntimeError("out of memory")))
        for _ in range(3):
            assert pauses.step() == PAUSE_SECONDS
    (record,) = caplog.records
    assert "out of memory" in str(record.exc_info)
    serve(graphs, 100, 6)
    assert pauses.step() == PAUSE_SECONDS
    serve(graphs, 1, 6)
    assert pauses.step() == 0
    assert made == [Shape(8, 128, 64), Shape(6, 64, 64)]


def test_an_engine_captures_in_pauses_until_it_is_closed(
    tmp_path: Path, made: list[Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    save_checkpoint(Checkpoint(model, model.config, SCHEMA, CATALOG), tmp_path)
    engine = CompiledEngine(tmp_path)
    assert engine._pauses is None  # on a CPU
    engine.close()
    monkeypatch.setattr(compiled_pauses, "PAUSE_SECONDS", 0.02)
    graphs = engine._graphs = graphs_of(8)
    engine._pauses = Pauses(graphs, engine._lock)
    thread = engine._pauses._thread
    assert thread.daemon
    before = engine._pauses._last
    inputs = {name: np.zeros((6, 64, SCHEMA.width), np.int32) for name in ("context", "candidates")}
    graphs.captured(Shape(8, 128, 64))
    for _ in range(101):
        engine.infer(inputs)
    assert engine._pauses._last > before
    end = time.monotonic() + 30
    while len(made) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert made == [Shape(8, 128, 64), Shape(6, 64, 64)]
    for _ in range(2):
        engine.close()
    assert not thread.is_alive()
    engine.infer(inputs)


def test_pauses_end_with_their_owner(made: list[Shape], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_pauses, "PAUSE_SECONDS", 0.02)
    pauses = Pauses(graphs_of(8), Lock())
    thread = pauses._thread
    del pauses
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.usefixtures("without_gpu")
def test_batches_under_way_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may be, of one graph or of several; the next waits until somebody was answered, or has failed."""
    graphs = graphs_of(8)
    captured: dict[Shape, Captured] = {}
    monkeypatch.setattr(graphs, "captured", lambda shape: captured.setdefault(shape, Captured(shape)))

    def same(count: int, value: int) -> dict[str, np.ndarray]:
        return {name: np.full((1, count, SCHEMA.width), value) for name in ("context", "candidates")}

    for sizes in ((16, 16), (16, 64)):
        pending = [graphs.launch(same(size, value)) for value, size in enumerate(sizes, start=1)]
        with ThreadPoolExecutor(1) as threads:
            third = threads.submit(graphs.launch, same(16, 3))
            with pytest.raises(TimeoutError):
                third.result(timeout=0.1)
            answers = [pending[1].wait()]
            answers += [third.result(timeout=5).wait(), pending[0].wait()]
        for answer, value, size in zip(answers, (2, 3, 1), (sizes[1], 16, sizes[0]), strict=True):
            assert answer["task_scores"].shape == (1, size)
            assert (answer["task_scores"] == value).all()
    monkeypatch.setattr(Captured, "launch", mock.Mock(side_effect=RuntimeError("out of memory")))
    for _ in range(DEPTH + 1):
        with pytest.raises(RuntimeError, match="out of memory"):
            graphs.launch(same(16, 1))


def test_a_batch_is_one_copy() -> None:
    """What an earlier, larger batch left behind does not remain in the padding."""
    inputs = arrays()
    staging = Staging(Shape(8, 128, 64), SCHEMA.width, torch.device("cpu"))
    staging.fill(np.full((8, 128, SCHEMA.width), 7), np.full((8, 64, SCHEMA.width), 7))
    staging.fill(inputs["context"], inputs["candidates"])
    users_count, tokens = inputs["context"].shape[:2]
    assert np.array_equal(staging.context[:users_count, :tokens].numpy(), inputs["context"])
    count = inputs["candidates"].shape[1]
    assert np.array_equal(staging.candidates[:users_count, :count].numpy(), inputs["candidates"])
    assert staging.context[users_count:].sum() == staging.context[:, tokens:].sum() == 0
    assert staging.candidates[users_count:].sum() == staging.candidates[:, count:].sum() == 0
    assert staging.context.data_ptr() == staging.device.data_ptr()
