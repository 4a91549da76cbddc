"""Performance runs to make reports of.

``two_cores`` is a real run, measured by ``python -m perf.run`` on two shared cores (its file says with what command and
revision). ``with_gpu`` is the same with more repeats and with what a GPU would report, which no machine at hand does.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from perf.results_format import Gpu, Latency, ModelMemory, PerfResult, Point, load

_GIB = 2**30
# As where retrieval of one strategy runs within Triton itself, so that its part is not known.
_MEMORY = {
    "mtgr_baseline": ModelMemory(3 * _GIB, 2 * _GIB),
    "mtgr_onnx_rank": ModelMemory(_GIB, 0),
    "mtgr_onnx_retrieve": ModelMemory(_GIB // 2, 0),
    "mtgr_tensorrt_rank": ModelMemory(_GIB, _GIB),
    "mtgr_vllm": ModelMemory(4 * _GIB, 64 * _GIB),
    "mtgr_router": ModelMemory(_GIB // 4, 0),
    "tritonserver": ModelMemory(_GIB // 2, 0),
}

DATA = Path(__file__).parent / "data" / "perf-two-cores.json"


def two_cores() -> PerfResult:
    """One repeat of five strategies, without a GPU."""
    return load(DATA)


def with_gpu(repeats: int = 3) -> PerfResult:
    """Made up of ``two_cores``: each repeat is slowed by a noise of its own."""
    result = two_cores()
    generator = np.random.default_rng(0)
    points = []
    for repeat in range(repeats):
        for point in result.points if repeat == repeats - 1 else result.points[:-1]:
            points.append(_again(point, repeat, math.exp(generator.normal(0, 0.06))))
    assert result.kpi is not None
    return dataclasses.replace(
        result,
        points=points,
        run=dataclasses.replace(result.run, repeats=repeats, preset="large"),
        machine=dataclasses.replace(result.machine, gpu="NVIDIA H200", driver="580.95"),
        kpi=dataclasses.replace(result.kpi, point=len(points) - 1),
        memory=_MEMORY,
    )


def _again(point: Point, repeat: int, slow: float) -> Point:
    samples = [round(slow * sample, 3) for sample in point.latency_samples_ms]
    seconds = point.seconds * slow
    return dataclasses.replace(
        point,
        repeat=0 if point.mode == "open_loop" else repeat,
        latency_samples_ms=samples,
        latency_ms=Latency.of(samples),
        throughput=round(point.throughput / slow, 3),
        gpu=Gpu(0.87, 96 << 30, 139 << 30, 410.0, 410.0 * seconds),
    )
