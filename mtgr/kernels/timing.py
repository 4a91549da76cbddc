"""Time of GPU work, without what launching it costs the host."""

from __future__ import annotations

from collections.abc import Callable

import torch


def graph_milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Milliseconds of one ``run`` on the current GPU, captured ``repeats`` times into a graph.

    Returns:
        The mean of one replay, after one to warm up; infinite if the GPU lacks the resources for a kernel.
    """
    from triton.runtime.errors import OutOfResources

    try:
        run()
    except OutOfResources:
        return float("inf")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / repeats
