"""CUDA graphs by bucket: a batch is one copy to the GPU, one launch, and one copy back.

Batches may be handed over before the ones ahead of them are done: the host checks, copies and answers while the GPU
computes, in the order in which they came.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from mtgr.engines.compiled_network import CompiledNetwork
from mtgr.engines.pending import Arrays
from mtgr.routing.buckets import CANDIDATE_BUCKETS, CONTEXT_BUCKETS, bucket

# A padded user costs as much as a real one, and a graph little.
BATCH_BUCKETS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)

# Batches that may be under way at a time: one computes, another is copied and queued behind it.
DEPTH = 2

# A capture holds everybody up for about as long as a hundred batches take. A larger graph that is there serves instead,
# of up to so many times the rows; after so many batches a graph of its own pays, for which the traffic has to pause.
_ROOM = 2.0
_BORROWED = 100

# Launches before a capture: kernels are compiled, and libraries take their workspaces.
_WARM_UPS = 2


@dataclass(frozen=True)
class Shape:
    """What one graph serves.

    Attributes:
        batch: Users.
        context: Padded context, in tokens.
        candidates: Padded candidates; None where items are retrieved.
    """

    batch: int
    context: int
    candidates: int | None

    @classmethod
    def of(cls, operation: str, batch: int, context: int, candidates: int) -> Shape:
        """The smallest shape of buckets that holds a batch."""
        return cls(
            bucket(batch, BATCH_BUCKETS),
            bucket(context, CONTEXT_BUCKETS),
            bucket(candidates, CANDIDATE_BUCKETS) if operation == "rank" else None,
        )

    @property
    def rows(self) -> int:
        """Rows of both inputs."""
        return self.batch * (self.context + (self.candidates or 0))

    def holds(self, other: Shape) -> bool:
        """Whether a batch of another shape fits this one."""
        if (self.candidates is None) != (other.candidates is None):
            return False
        long_enough = self.context >= other.context and (self.candidates or 0) >= (other.candidates or 0)
        return self.batch >= other.batch and long_enough


class Staging:
    """A batch's rows in one piece of host memory, contexts first, and where they go on the device.

    Args:
        shape: Of the batch.
        width: Columns of a row, W.
        device: Of the computation; the host's pieces are pinned if it is a GPU.
        pieces: Of host memory: a piece is free again when its copy to the device is done.
    """

    def __init__(self, shape: Shape, width: int, device: torch.device, pieces: int = 1) -> None:
        pinned = device.type == "cuda"
        self.host = torch.zeros(pieces, shape.rows, width, dtype=torch.int32, pin_memory=pinned)
        self.device = torch.zeros(shape.rows, width, dtype=torch.int32, device=device)
        self._arrays = [[part.numpy() for part in _parts(piece, shape)] for piece in self.host]
        self.context, self.candidates = _parts(self.device, shape)

    def fill(self, context: npt.NDArray[Any], candidates: npt.NDArray[Any] | None, piece: int = 0) -> None:
        """Write a batch into a piece of the host, padded with zeros, and start its one copy to the device."""
        for target, rows in zip(self._arrays[piece], (context, candidates), strict=True):
            if rows is not None:
                users, tokens = rows.shape[:2]
                target[:users, :tokens] = rows
                target[:users, tokens:] = 0
                target[users:] = 0
        self.device.copy_(self.host[piece], non_blocking=True)


class _Captured:
    """One graph with its memory, and host memory for as many batches as may be under way."""

    def __init__(self, network: CompiledNetwork, shape: Shape, width: int, device: torch.device, pool: Any) -> None:
        self.staging = Staging(shape, width, device, DEPTH)

        def run() -> tuple[Tensor, ...]:
            if shape.candidates is None:
                return network.retrieve(self.staging.context)
            return (network.rank(self.staging.context, self.staging.candidates),)

        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Another thread may wait for the batch before, which a capture of the whole process would not bear.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = run()
        self.host = [[torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in self.outputs] for _ in range(DEPTH)]

    def launch(self, context: npt.NDArray[Any], candidates: npt.NDArray[Any] | None, piece: int) -> torch.cuda.Event:
        """Queue a batch behind those that the GPU has, through a piece of the host; the event says that it is done."""
        self.staging.fill(context, candidates, piece)
        self.graph.replay()
        for target, output in zip(self.host[piece], self.outputs, strict=True):
            target.copy_(output, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return done


class Replay:
    """A batch on its way; whoever has it must wait for it, once."""

    ready = False

    def __init__(
        self,
        host: list[Tensor],
        done: torch.cuda.Event,
        users: int,
        candidates: int | None,
        answered: Callable[[], object],
    ) -> None:
        self._host, self._done, self._answered = host, done, answered
        self._users, self._candidates = users, candidates

    def wait(self) -> Arrays:
        """Outputs by name, as ``CompiledEngine.infer`` gives them, in memory of their own."""
        try:
            self._done.synchronize()
            outputs = [target.numpy()[: self._users] for target in self._host]
            if self._candidates is None:
                return {name: array.copy() for name, array in zip(("items", "scores"), outputs, strict=True)}
            return {"task_scores": outputs[0][:, : self._candidates].copy()}
        finally:
            self._answered()


class BucketGraphs:
    """Graphs of a network by shape; to be used by one thread at a time.

    A shape is captured when it is asked for, and at its first batch if no graph that is there holds it well enough. One
    that a larger graph serves is never captured while it does: it is wanted once so many of its batches have come that
    a graph of its own pays, and ``capture_wanted`` is for a time at which nobody is held up.

    Args:
        network: What is captured.
        width: Columns of a row, W.
        device: A GPU.
        limit: Graphs kept at most.
        log: Told of captures that a batch may have waited for.
    """

    def __init__(
        self,
        network: CompiledNetwork,
        width: int,
        device: torch.device,
        limit: int,
        log: Callable[[str], object],
    ) -> None:
        self._network, self._width, self._device, self._limit = network, width, device, limit
        self._log = log
        self._graphs: OrderedDict[Shape, _Captured] = OrderedDict()
        self._serving: dict[Shape, Shape] = {}  # as found among the graphs that there are
        self._borrowed: Counter[Shape] = Counter()  # batches that went through a larger graph
        # Graphs run one after the other and their outputs are copied in the same order: all may use one memory.
        self._pool = torch.cuda.graph_pool_handle()
        # Pieces of every graph's host memory that no batch has: a batch takes one, whatever its graph.
        self._free: SimpleQueue[int] = SimpleQueue()
        for piece in range(DEPTH):
            self._free.put(piece)

    def captured(self, shape: Shape) -> _Captured:
        """The graph of a shape."""
        found = self._graphs.get(shape)
        if found is None:
            with torch.cuda.device(self._device):
                torch.cuda.current_stream().synchronize()  # the graph that is dropped may still run
                self._serving.clear()
                while len(self._graphs) >= self._limit:
                    self._graphs.popitem(last=False)
                found = _Captured(self._network, shape, self._width, self._device, self._pool)
            self._graphs[shape] = found
            self._borrowed.pop(shape, None)
        self._graphs.move_to_end(shape)
        return found

    def serving(self, shape: Shape) -> Shape:
        """The shape whose graph serves a batch of ``shape``: the smallest that holds it and is there, or its own."""
        found = self._serving.get(shape)
        if found is None:
            most = _ROOM * shape.rows
            there = [one for one in self._graphs if one.holds(shape) and one.rows <= most]
            found = self._serving[shape] = min(there, key=lambda one: one.rows, default=shape)
        if found != shape:
            self._borrowed[shape] += 1
        return found

    def capture_wanted(self) -> bool:
        """Capture the shape of the most batches that went through a larger graph; False where none is wanted."""
        for shape, batches in self._borrowed.most_common(1):
            if batches > _BORROWED:
                del self._borrowed[shape]  # if it cannot be captured, it is wanted again after as many batches more
                self._captured_and_told(shape, "in a pause")
                return True
        return False

    def launch(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Replay:
        """Queue a batch; waits where ``DEPTH`` batches are not answered."""
        context, candidates = inputs["context"], inputs.get("candidates")
        operation = "retrieve" if candidates is None else "rank"
        count = 0 if candidates is None else candidates.shape[1]
        shape = self.serving(Shape.of(operation, len(context), context.shape[1], count))
        piece = self._free.get()
        try:
            with torch.cuda.device(self._device):
                there = shape in self._graphs
                captured = self.captured(shape) if there else self._captured_and_told(shape, "while its batch waited")
                done = captured.launch(context, candidates, piece)
        except BaseException:
            self._free.put(piece)
            raise
        users, wanted = len(context), None if candidates is None else count
        return Replay(captured.host[piece], done, users, wanted, partial(self._free.put, piece))

    def _captured_and_told(self, shape: Shape, occasion: str) -> _Captured:
        begin = time.monotonic()
        found = self.captured(shape)
        self._log(f"compiled: a graph for {shape} was captured {occasion}, in {time.monotonic() - begin:.2f} s.")
        return found


def _parts(rows: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """[B, n, W] and [B, k, W] of all rows, [B (n + k), W]."""
    of_context = shape.batch * shape.context
    return (
        rows[:of_context].view(shape.batch, shape.context, -1),
        rows[of_context:].view(shape.batch, shape.candidates or 0, rows.shape[1]),
    )
