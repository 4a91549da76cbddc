"""What a run of ``perf.run`` prints: a line for each point, a table of the sweep, and how it stands to its targets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mtgr.routing.strategies import AUTO, STRATEGIES
from perf.measure import DIRECT, mean_batch
from perf.results_format import PerfResult, Point

SATURATION_SHARE = 0.7
DOOR_BAR, AUTO_BAR = 0.85, 0.9


def point_line(point: Point) -> str:
    """What was measured at a point."""
    return (
        f"   {point.repeat} {point.mode:12} {point.level:7g} {point.strategy:12} {point.requests:6} requests "
        f"{point.throughput:8.1f}/s  p50 {point.latency_ms.p50:7.1f}  p99 {point.latency_ms.p99:7.1f} ms"
        + (f"  errors {point.errors}" if point.errors else "")
    )


def saturation(points: Sequence[Point], strategy: str) -> float:
    """Most answers a second of a strategy: the best level's median over repeats."""
    rates: dict[float, list[float]] = {}
    for point in points:
        if point.strategy == strategy and point.mode == "concurrency":
            rates.setdefault(point.level, []).append(point.throughput)
    return max(map(statistics.median, rates.values()), default=0.0)


def table(result: PerfResult) -> str:
    """Medians over repeats of the concurrency sweep."""
    heads = ("strategy", "callers", "p50 ms", "p99 ms", "answers/s", "batch", "feature hits", "prefix hits", "errors")
    lines = ["".join(f"{head:>14}" for head in heads)]
    for strategy, level in dict.fromkeys((p.strategy, p.level) for p in result.points if p.mode == "concurrency"):
        points = result.of(strategy, "concurrency", level)

        def shown(values: list[float | None], form: str) -> str:
            known = [value for value in values if value is not None]
            return format(statistics.median(known), form) if known else "-"

        cells = (
            strategy,
            f"{level:g}",
            shown([point.latency_ms.p50 for point in points], ".1f"),
            shown([point.latency_ms.p99 for point in points], ".1f"),
            shown([point.throughput for point in points], ".1f"),
            shown([mean_batch(point) for point in points], ".2f"),
            shown([point.cache.feature_hit_ratio for point in points], ".3f"),
            shown([point.cache.prefix_hit_ratio for point in points], ".3f"),
            f"{sum(sum(point.errors.values()) for point in points)}",
        )
        lines.append("".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def verdicts(result: PerfResult) -> list[str]:
    """How ``auto`` and the door stand, with the repeats' spread."""
    lines = []
    levels = dict.fromkeys(p.level for p in result.points if p.mode == "concurrency")
    for level in levels:
        rates = {
            strategy: [point.throughput for point in result.of(strategy, "concurrency", level)]
            for strategy in (*STRATEGIES, AUTO)
        }
        others = {name: statistics.median(rates[name]) for name in STRATEGIES if rates[name]}
        if others and rates[AUTO]:
            best = max(others, key=lambda name: others[name])
            ratios = [one / other for one, other in zip(rates[AUTO], rates[best], strict=False)]
            lines.append(_verdict(f"auto over {best} at {level:g} callers", ratios, AUTO_BAR))
    if {"onnx", DIRECT} <= {point.strategy for point in result.points}:
        best_of = {name: _saturations(result, name) for name in ("onnx", DIRECT)}
        ratios = [one / other for one, other in zip(best_of["onnx"], best_of[DIRECT], strict=False)]
        lines.append(_verdict("saturation of the door over the onnx engine called directly", ratios, DOOR_BAR))
    if result.kpi is not None:
        point = result.points[result.kpi.point]
        hits = point.cache.feature_hit_ratio
        lines.append(
            f"open loop at {result.kpi.rate:g}/s, {SATURATION_SHARE:.0%} of {result.kpi.saturation:.0f}/s: "
            f"p50 {point.latency_ms.p50:.1f} ms, p99 {point.latency_ms.p99:.1f} ms, "
            f"{point.throughput:.1f} answers/s, errors {point.error_share:.2%}, "
            f"feature hits {'-' if hits is None else f'{hits:.1%}'}, client's lag p99 {point.client_lag_ms:.1f} ms"
        )
    lines.append(f"payloads sent: {result.workload.requests_generated}, different: {result.workload.unique_payloads}")
    return lines


def _saturations(result: PerfResult, strategy: str) -> list[float]:
    """Of each repeat."""
    return [
        saturation([point for point in result.points if point.repeat == repeat], strategy)
        for repeat in range(result.run.repeats)
    ]


def _verdict(what: str, ratios: list[float], bar: float) -> str:
    middle = statistics.median(ratios)
    word = "holds" if middle >= bar else "MISSED"
    return f"{what}: {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f}), at least {bar:g}: {word}"
