"""What a run's points say, put together: medians over repeats, and ratios with their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from perf.results_format import STRATEGIES, PerfResult, Point
from perf.statistics import LogRatio, mean_ratio, quantile_ratio

REFERENCE = "baseline"
DIRECT = "direct_onnx"
# What the requests of a strategy are compared by, and whether more is better.
METRICS = {"throughput": True, "p50": False, "p99": False}
_QUANTILES = {"p50": 0.5, "p99": 0.99}
_ENGINES = {
    "baseline": "mtgr_baseline",
    "onnx": "mtgr_onnx_rank",
    "tensorrt": "mtgr_tensorrt_rank",
    "vllm": "mtgr_vllm",
    DIRECT: "mtgr_onnx_rank",
}


def strategies(result: PerfResult) -> list[str]:
    """Those that were measured with callers that wait, in the format's order."""
    found = {point.strategy for point in result.points if point.mode == "concurrency"}
    return [name for name in STRATEGIES if name in found]


def levels(result: PerfResult) -> list[float]:
    """Numbers of callers, from few to many."""
    return sorted({point.level for point in result.points if point.mode == "concurrency"})


def median(points: Iterable[Point], value: Callable[[Point], float | None]) -> float | None:
    """Of a value over repeats; None where none of them has it."""
    known = [found for point in points if (found := value(point)) is not None]
    return statistics.median(known) if known else None


def saturation_level(result: PerfResult, strategy: str) -> float | None:
    """The number of callers that gets most answers a second; None of a strategy without any."""
    rates = {
        level: median(result.of(strategy, "concurrency", level), lambda point: point.throughput) or 0.0
        for level in levels(result)
    }
    best = max(rates, key=lambda level: rates[level], default=None)
    return best if best is not None and rates[best] > 0 else None


def at_saturation(result: PerfResult, strategy: str) -> list[Point]:
    """The repeats of that level; empty of a strategy without answers."""
    level = saturation_level(result, strategy)
    return [] if level is None else result.of(strategy, "concurrency", level)


def compared(new: Sequence[Point], old: Sequence[Point], metric: str) -> LogRatio | None:
    """The ratio of a metric, repeat by repeat; None where one side has no answers."""
    pairs = _paired(new, old)
    if not pairs:
        return None
    if metric == "throughput":
        return mean_ratio([a.throughput for a, _ in pairs], [b.throughput for _, b in pairs])
    quantile = _QUANTILES[metric]
    return quantile_ratio([a.latency_samples_ms for a, _ in pairs], [b.latency_samples_ms for _, b in pairs], quantile)


def ratios(result: PerfResult, reference: str = REFERENCE) -> dict[tuple[str, float, str], LogRatio]:
    """Each strategy against a reference at the same number of callers, by strategy, callers, and metric."""
    found = {}
    for strategy in strategies(result):
        for level in levels(result) if strategy != reference else ():
            points, base = (result.of(name, "concurrency", level) for name in (strategy, reference))
            for metric in METRICS:
                if (ratio := compared(points, base, metric)) is not None:
                    found[strategy, level, metric] = ratio
    return found


def auto_ratios(result: PerfResult) -> dict[float, tuple[str, LogRatio]]:
    """Of ``auto`` against whatever strategy answers most at that number of callers, by number; with its name."""
    found = {}
    others = [name for name in strategies(result) if name not in ("auto", DIRECT)]
    for level in levels(result):
        rates = {
            name: rate
            for name in others
            if (rate := median(result.of(name, "concurrency", level), lambda point: point.throughput))
        }
        if not rates:
            continue
        best = max(rates, key=lambda name: rates[name])
        ratio = compared(result.of("auto", "concurrency", level), result.of(best, "concurrency", level), "throughput")
        if ratio is not None:
            found[level] = best, ratio
    return found


def door_ratio(result: PerfResult) -> LogRatio | None:
    """Saturation of the door over that of the engine when it is called directly; None where one is missing."""
    best: dict[str, dict[int, float]] = {"onnx": {}, DIRECT: {}}
    for point in result.points:
        if point.strategy in best and point.mode == "concurrency":
            rates = best[point.strategy]
            rates[point.repeat] = max(rates.get(point.repeat, 0.0), point.throughput)
    shared = [repeat for repeat, rate in best["onnx"].items() if rate and best[DIRECT].get(repeat)]
    if not shared:
        return None
    return mean_ratio([best["onnx"][one] for one in shared], [best[DIRECT][one] for one in shared])


def batch_shares(points: Sequence[Point]) -> dict[int, float]:
    """Part of the requests that were computed in a batch of each size; empty where that is not counted.

    vLLM puts requests together step by step, which Triton does not see: its answers are left out.
    """
    requests: dict[int, int] = {}
    for point in points:
        for model in {model for name, model in _ENGINES.items() if name != "vllm"}:
            counts = point.models.get(model)
            for size, executions in (counts.batch_sizes if counts else {}).items():
                requests[int(size)] = requests.get(int(size), 0) + int(size) * executions
    total = sum(requests.values())
    return {size: count / total for size, count in sorted(requests.items())} if total else {}


STAGES = {
    "intake": "waiting for features",
    "features": "features",
    "wait": "waiting for the engine",
    "compute": "engine computes",
    "engine": "engine, waiting and computing (vllm)",
    "rest": "between processes, and client",
}


def stage_shares(points: Sequence[Point]) -> dict[str, float]:
    """Mean milliseconds of a request's stages, by the keys of ``STAGES``; they add up to the mean latency.

    The router's time for an engine is divided into waiting and computing by Triton's count, which it has of all engines
    but vLLM's.
    """
    answered = [point for point in points if point.latency_samples_ms]
    if not answered:
        return {}
    stages = [_stages(point) for point in answered]
    return {name: float(np.mean([one.get(name, 0.0) for one in stages])) for name in STAGES}


def _stages(point: Point) -> dict[str, float]:
    engines = {name: point.models[model] for name, model in _ENGINES.items() if model in point.models}
    dense = [counts for name, counts in engines.items() if name != "vllm"]
    calls = sum(counts.executions for counts in dense)
    compute = sum(
        counts.executions * (counts.compute_input_ms + counts.compute_infer_ms + counts.compute_output_ms)
        for counts in dense
    ) / max(calls, 1)
    if point.strategy == DIRECT:
        # Nothing of the door is on its way.
        found = {"wait": dense[0].queue_ms, "compute": compute} if dense else {}
    else:
        found = {name: point.stages_ms.get(name, 0.0) for name in ("intake", "features")}
        found["wait"] = point.stages_ms.get("queue", 0.0)
        engine = point.stages_ms.get("engine", 0.0)
        if "vllm" in point.answered_by or not calls:
            found["engine"] = engine
        else:
            found["compute"] = min(compute, engine)
            found["wait"] += engine - found["compute"]
    found["rest"] = max(point.latency_ms.mean - sum(found.values()), 0.0)
    return found


def _paired(new: Sequence[Point], old: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Points of the same repeat; those without answers are left out."""
    others = {point.repeat: point for point in old if point.latency_samples_ms}
    return [
        (point, others[point.repeat])
        for point in sorted(new, key=lambda point: point.repeat)
        if point.latency_samples_ms and point.repeat in others
    ]
