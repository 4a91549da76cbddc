"""Shapes that graphs of the compiled engine are kept for, and which graph serves a batch."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
import torch

from mtgr.engines import compiled_graphs
from mtgr.engines.compiled import frequent_shapes
from mtgr.engines.compiled_graphs import DEPTH, BucketGraphs, Shape, Staging
from mtgr.engines.compiled_network import CompiledNetwork
from mtgr.schema import SLOT_COLUMN
from tests.unit.test_compiled import SCHEMA, arrays, model_of


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


def graphs_of(limit: int) -> BucketGraphs:
    return BucketGraphs(CompiledNetwork(model_of()), SCHEMA.width, torch.device("cpu"), limit)


@pytest.mark.usefixtures("without_gpu")
def test_a_larger_graph_serves_what_none_was_captured_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within twice the rows; anything else is captured, and then serves itself and what is smaller."""
    made: list[Shape] = []

    def capture(network: object, shape: Shape, *rest: object) -> Captured:
        made.append(shape)
        return Captured(shape)

    monkeypatch.setattr(compiled_graphs, "_Captured", capture)
    graphs = graphs_of(3)

    def answer(users_count: int, context: int, candidates: int) -> np.ndarray:
        sizes = {"context": context, "candidates": candidates}
        inputs = {name: np.full((users_count, size, SCHEMA.width), 5) for name, size in sizes.items()}
        found: np.ndarray = graphs.launch(inputs).wait()["task_scores"]
        assert found.shape == (users_count, candidates)
        assert (found == 5).all()
        return found

    for shape in (Shape(4, 128, 64), Shape(8, 128, 64)):
        graphs.captured(shape)
    for sizes in ((3, 100, 60), (2, 128, 64), (5, 70, 64), (4, 128, 64)):
        answer(*sizes)
    assert made == [Shape(4, 128, 64), Shape(8, 128, 64)]
    answer(1, 128, 64)  # four times the rows would be too many
    answer(1, 64, 64)
    assert made[2:] == [Shape(1, 128, 64)]
    answer(2, 256, 64)  # one more than are kept: the one that was used longest ago goes
    assert made[3:] == [Shape(2, 256, 64)]
    answer(6, 128, 64)
    assert made[4:] == [Shape(6, 128, 64)]
    assert graphs.serving(Shape(1, 128, None)) == Shape(1, 128, None)


@pytest.mark.usefixtures("without_gpu")
def test_a_shape_that_comes_often_gets_a_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_graphs, "_Captured", lambda network, shape, *rest: Captured(shape))
    graphs = graphs_of(3)
    graphs.captured(Shape(8, 128, 64))
    inputs = {name: np.zeros((6, 64, SCHEMA.width), np.int64) for name in ("context", "candidates")}
    for _ in range(100):
        graphs.launch(inputs).wait()
    assert set(graphs._graphs) == {Shape(8, 128, 64)}
    for _ in range(2):
        graphs.launch(inputs).wait()
    assert set(graphs._graphs) == {Shape(8, 128, 64), Shape(6, 64, 64)}


@pytest.mark.usefixtures("without_gpu")
def test_batches_under_way_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may be, of one graph or of several; the next waits until somebody was answered, or has failed."""
    graphs = graphs_of(8)
    captured: dict[Shape, Captured] = {}
    monkeypatch.setattr(graphs, "captured", lambda shape: captured.setdefault(shape, Captured(shape)))

    def rows(count: int, value: int) -> dict[str, np.ndarray]:
        return {name: np.full((1, count, SCHEMA.width), value) for name in ("context", "candidates")}

    for sizes in ((16, 16), (16, 64)):
        pending = [graphs.launch(rows(size, value)) for value, size in enumerate(sizes, start=1)]
        with ThreadPoolExecutor(1) as threads:
            third = threads.submit(graphs.launch, rows(16, 3))
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
            graphs.launch(rows(16, 1))


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
