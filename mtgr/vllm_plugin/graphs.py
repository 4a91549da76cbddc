"""CUDA graphs of a step: what the host would launch in milliseconds, kernel by kernel, in one launch.

vLLM captures no full graphs of pooling models, so the model keeps its own. A step of any requests fits a graph of at
least its tokens and requests: the kernels read what differs - rows, pages, who owns which token - from buffers that
stay where they are, and what is left over belongs to no request.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtgr.vllm_plugin.step import StepMetadata

# A step of 256 candidates must not be padded to much more, nor one of 2,048 + 256 tokens.
# fmt: off
_SIZES: tuple[int, ...] = (
    16, 32, 64, 96, 128, 192, 256, 272, 320, 384, 448, 512, 576, 640, 768, 896, 1024, 1152, 1280, 1536, 1792,
    2048, 2304, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192,
)
# fmt: on

# Requests of a graph: more only make programs that find nothing to do.
_TOKENS_PER_REQUEST = 64
_FEWEST_REQUESTS = 4

Compute = Callable[[Tensor, StepMetadata], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Captured:
    """A graph, and where its replay leaves the outputs.

    Attributes:
        graph: The graph.
        hidden: Float [T, d].
        scores: FP32 [T, tasks].
    """

    graph: torch.cuda.CUDAGraph
    hidden: Tensor
    scores: Tensor


def graph_sizes(max_tokens: int) -> tuple[int, ...]:
    """Numbers of tokens that graphs are captured for, where a step has at most ``max_tokens``."""
    return tuple(size for size in _SIZES if size <= max_tokens)


def graph_requests(size: int) -> int:
    """Requests that a graph of ``size`` tokens takes."""
    return max(_FEWEST_REQUESTS, size // _TOKENS_PER_REQUEST)


class StepGraphs:
    """Runs steps by graphs where one fits.

    Args:
        compute: Trunk outputs, float [T, d], and scores, FP32 [T, tasks], of embeds, float [T, w], and the step's
            metadata. Its launches depend on shapes only.
        max_tokens: Of a step.
        is_shared: Whether ``compute`` exchanges numbers with other ranks, all of which run the same steps.
    """

    def __init__(self, compute: Compute, max_tokens: int, is_shared: bool = False) -> None:
        self._compute = compute
        self._is_shared = is_shared
        self._sizes = graph_sizes(max_tokens)
        self._captured: dict[int, Captured] = {}
        self._embeds: Tensor | None = None

    def run(self, embeds: Tensor, metadata: StepMetadata) -> tuple[Tensor, Tensor] | None:
        """``compute``'s answer, valid until the next step; None if no graph fits. The first step captures them all."""
        num_tokens, num_requests = len(embeds), len(metadata.block_table)
        size = self.fitting(num_tokens, num_requests)
        if size is None:
            return None
        if self._embeds is None:
            self._capture(embeds, metadata)
        self._fill(embeds, metadata, size)
        captured = self._captured[size]
        captured.graph.replay()
        return captured.hidden[:num_tokens], captured.scores[:num_tokens]

    def fitting(self, num_tokens: int, num_requests: int) -> int | None:
        """Tokens of the smallest graph that takes the step; None if there is none."""
        first = bisect.bisect_left(self._sizes, num_tokens)
        return next((size for size in self._sizes[first:] if graph_requests(size) >= num_requests), None)

    def _fill(self, embeds: Tensor, metadata: StepMetadata, size: int) -> None:
        """Put a step into the buffers. Tokens left over are stored nowhere, requests left over are empty."""
        assert self._embeds is not None
        num_tokens, num_requests = len(embeds), len(metadata.block_table)
        self._embeds[:num_tokens].copy_(embeds)
        self._slots[:num_tokens].copy_(metadata.slots[:num_tokens])
        self._slots[num_tokens:size].fill_(-1)
        self._query_start[: num_requests + 1].copy_(metadata.query_start)
        self._query_start[num_requests + 1 :].fill_(num_tokens)
        self._block_table[:num_requests].copy_(metadata.block_table)

    def _capture(self, embeds: Tensor, metadata: StepMetadata) -> None:
        """Capture a graph of every size, the largest first: the others find the memory that they need in its pool."""
        most, device = self._sizes[-1], embeds.device
        self._embeds = embeds.new_zeros(most, embeds.shape[1])
        self._slots = torch.full((most,), -1, dtype=metadata.slots.dtype, device=device)
        self._query_start = metadata.query_start.new_zeros(graph_requests(most) + 1)
        self._block_table = metadata.block_table.new_zeros(graph_requests(most), metadata.block_table.shape[1])
        pool = new_pool()
        with capturing(device) if self._is_shared else nullcontext():
            for size in reversed(self._sizes):
                requests = graph_requests(size)
                step = StepMetadata(
                    size, self._query_start[: requests + 1], self._block_table[:requests], self._slots[:size]
                )
                self._captured[size] = capture(self._compute, self._embeds[:size], step, pool)


def capturing(device: torch.device) -> AbstractContextManager[Any]:
    """Within it all-reduces may be captured: vLLM's own needs the buffers of all graphs, and exchanges them at the end.

    Until then it sums nothing outside of a capture; graphs are right from the first replay on.
    """
    from vllm.distributed.parallel_state import graph_capture

    context: AbstractContextManager[Any] = graph_capture(device)
    return context


def new_pool() -> Any:
    """Memory that graphs share, none of which run side by side."""
    return torch.cuda.graph_pool_handle()


def capture(compute: Compute, embeds: Tensor, step: StepMetadata, pool: Any) -> Captured:
    """Capture ``compute`` on buffers that are filled anew before each replay."""
    compute(embeds, step)  # compiles and allocates what a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other threads of vLLM's may use the GPU meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        hidden, scores = compute(embeds, step)
    return Captured(graph, hidden, scores)
