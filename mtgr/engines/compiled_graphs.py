"""CUDA graphs by bucket: a batch is one copy to the GPU, one launch, and one copy back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtgr.engines.compiled_network import CompiledNetwork
from mtgr.routing.buckets import CANDIDATE_BUCKETS, CONTEXT_BUCKETS, bucket

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32)

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


class Staging:
    """A batch's rows in one piece of host memory, contexts first, and where they go on the device.

    Args:
        shape: Of the batch.
        width: Columns of a row, W.
        device: Of the computation; the host's piece is pinned if it is a GPU.
    """

    def __init__(self, shape: Shape, width: int, device: torch.device) -> None:
        self.host = torch.zeros(shape.rows, width, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.device = torch.zeros(shape.rows, width, dtype=torch.int32, device=device)
        self._arrays = [part.numpy() for part in _parts(self.host, shape)]
        self.context, self.candidates = _parts(self.device, shape)

    def fill(self, context: npt.NDArray[Any], candidates: npt.NDArray[Any] | None) -> None:
        """Write a batch into the host's piece, padded with zeros, and start its one copy to the device."""
        for target, rows in zip(self._arrays, (context, candidates), strict=True):
            if rows is not None:
                users, tokens = rows.shape[:2]
                target[:users, :tokens] = rows
                target[:users, tokens:] = 0
                target[users:] = 0
        self.device.copy_(self.host, non_blocking=True)


class _Captured:
    """One graph with its memory."""

    def __init__(self, network: CompiledNetwork, shape: Shape, width: int, device: torch.device, pool: Any) -> None:
        self.staging = Staging(shape, width, device)

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
        with torch.cuda.graph(self.graph, pool=pool):
            self.outputs = run()
        self.host = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in self.outputs]

    def replay(self, context: npt.NDArray[Any], candidates: npt.NDArray[Any] | None) -> list[npt.NDArray[Any]]:
        """Outputs of a batch, in memory that the next replay does not touch."""
        self.staging.fill(context, candidates)
        self.graph.replay()
        for target, output in zip(self.host, self.outputs, strict=True):
            target.copy_(output, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return [target.numpy()[: len(context)].copy() for target in self.host]


class BucketGraphs:
    """Graphs of a network by shape, captured at a shape's first batch; to be used by one thread at a time.

    Args:
        network: What is captured.
        width: Columns of a row, W.
        device: A GPU.
        limit: Graphs kept at most.
    """

    def __init__(self, network: CompiledNetwork, width: int, device: torch.device, limit: int) -> None:
        self._network, self._width, self._device, self._limit = network, width, device, limit
        self._graphs: OrderedDict[Shape, _Captured] = OrderedDict()
        # Graphs never run at the same time and their outputs are copied at once: all may use one memory.
        self._pool = torch.cuda.graph_pool_handle()

    def captured(self, shape: Shape) -> _Captured:
        """The graph of a shape."""
        found = self._graphs.get(shape)
        if found is None:
            while len(self._graphs) >= self._limit:
                self._graphs.popitem(last=False)
            with torch.cuda.device(self._device):
                found = _Captured(self._network, shape, self._width, self._device, self._pool)
            self._graphs[shape] = found
        self._graphs.move_to_end(shape)
        return found

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Outputs of a batch by name, as ``CompiledEngine.infer`` gives them."""
        context, candidates = inputs["context"], inputs.get("candidates")
        operation = "retrieve" if candidates is None else "rank"
        count = 0 if candidates is None else candidates.shape[1]
        shape = Shape.of(operation, len(context), context.shape[1], count)
        with torch.cuda.device(self._device):
            outputs = self.captured(shape).replay(context, candidates)
        if candidates is None:
            return dict(zip(("items", "scores"), outputs, strict=True))
        return {"task_scores": np.ascontiguousarray(outputs[0][:, :count])}


def _parts(rows: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """[B, n, W] and [B, k, W] of all rows, [B (n + k), W]."""
    of_context = shape.batch * shape.context
    return (
        rows[:of_context].view(shape.batch, shape.context, -1),
        rows[of_context:].view(shape.batch, shape.candidates or 0, rows.shape[1]),
    )
