"""The key figures a service is held to, read from the open loop at 70% of what it bears."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from perf.report.summary import auto_ratios, door_ratio
from perf.results_format import PerfResult, Point
from perf.statistics import LogRatio, wilson_interval

LOAD_SHARE = 0.7
_SHARE_SLACK = 0.02
AUTO_BAR, DOOR_BAR = 0.9, 0.85
NOT_MEASURED = "not measured"


class Verdict(enum.Enum):
    """How a figure stands to its target; a figure that is missing never passes."""

    PASS = "pass"
    FAIL = "fail"
    NOT_MEASURED = NOT_MEASURED


@dataclass(frozen=True)
class Row:
    """A line of a table of targets.

    Attributes:
        name: What is measured.
        target: In words.
        measured: In words, with its spread where that is known; ``not measured`` where it is not.
        verdict: By the estimate alone.
        note: What the reader must know of it, such as why it was not measured.
    """

    name: str
    target: str
    measured: str
    verdict: Verdict
    note: str = ""


def key_figures(result: PerfResult) -> list[Row]:
    """The six key figures; all of them ``not measured`` without an open loop at the right load."""
    point, reason = _open_loop(result)
    return [
        _latency(point, reason),
        _throughput(point, reason),
        _utilization(point, reason),
        _memory(result, point, reason),
        _hits(point, reason),
        _errors(point, reason),
    ]


def load_sentence(result: PerfResult) -> str:
    """Under what load the key figures were measured."""
    point, reason = _open_loop(result)
    if point is None or result.kpi is None:
        return f"Not measured: {reason}"
    kpi = result.kpi
    text = (
        f"Open loop, strategy {point.strategy}: {kpi.rate:g} requests/s offered, "
        f"{kpi.rate / kpi.saturation:.0%} of the {kpi.saturation:.4g} requests/s that it bears at most, "
        f"for {point.seconds:.0f} s."
    )
    if point.client_lag_ms is not None:
        text += f" The client itself sent up to {point.client_lag_ms:.1f} ms late (p99), which counts as latency."
    return text


def strategy_targets(result: PerfResult) -> list[Row]:
    """How ``auto`` stands to the best strategy, and the door to the engine called directly."""
    rows = []
    for level, (best, ratio) in auto_ratios(result).items():
        name = f"auto / {best}, the best at {level:g} {'caller' if level == 1 else 'callers'}"
        rows.append(_ratio_row(name, ratio, AUTO_BAR))
    if not rows:
        why = "auto was not measured beside another strategy"
        rows.append(Row("auto / the best", f"≥ {AUTO_BAR:g}", NOT_MEASURED, Verdict.NOT_MEASURED, why))
    name = "saturation of the door / onnx engine called directly"
    if (door := door_ratio(result)) is None:
        why = "onnx and direct_onnx were not both measured"
        rows.append(Row(name, f"≥ {DOOR_BAR:g}", NOT_MEASURED, Verdict.NOT_MEASURED, why))
    else:
        rows.append(_ratio_row(name, door, DOOR_BAR))
    return rows


def _open_loop(result: PerfResult) -> tuple[Point | None, str]:
    """The point of the key figures, or why there is none."""
    if result.kpi is None:
        return None, "the run has no open loop; leave --kpi-seconds of the run above 0."
    point, kpi = result.points[result.kpi.point], result.kpi
    if point.mode != "open_loop":
        return None, f"the point was measured as {point.mode}, which hides waiting; only an open loop counts."
    if kpi.saturation <= 0 or abs(kpi.rate / kpi.saturation - LOAD_SHARE) > _SHARE_SLACK:
        return None, f"{kpi.rate:g} requests/s are not {LOAD_SHARE:.0%} of saturation ({kpi.saturation:g} requests/s)."
    if not point.requests:
        return None, "no request was sent."
    return point, ""


def _latency(point: Point | None, reason: str) -> Row:
    name, target = "latency p99", "< 50 ms"
    if point is None or not point.latency_samples_ms:
        return _missing(name, target, reason or "nothing was answered")
    latency = point.latency_ms
    return _row(name, target, f"{latency.p99:.1f} ms", latency.p99 < 50, f"p50 {latency.p50:.1f} ms")


def _throughput(point: Point | None, reason: str) -> Row:
    name, target = "throughput", "> 20 requests/s"
    if point is None:
        return _missing(name, target, reason)
    return _row(name, target, f"{point.throughput:.1f} requests/s", point.throughput > 20)


def _utilization(point: Point | None, reason: str) -> Row:
    name, target = "GPU utilization", "80 to 95%"
    if point is None or point.gpu is None:
        return _missing(name, target, reason or "there is no GPU, or it reports nothing")
    used = point.gpu.utilization
    return _row(name, target, f"{used:.1%}", 0.8 <= used <= 0.95)


def _memory(result: PerfResult, point: Point | None, reason: str) -> Row:
    """Of the GPU where there is one, else of the machine."""
    target = "< 80%"
    if point is not None and point.gpu is not None:
        used, whole, name = point.gpu.memory_used_bytes, point.gpu.memory_total_bytes, "memory (GPU)"
    elif result.machine.gpu is not None:
        return _missing("memory (GPU)", target, reason or "the GPU reports nothing")
    else:
        name = "memory (host)"
        used, whole = (point.server_memory_bytes if point else 0), result.machine.memory_bytes
    if point is None or not used or not whole:
        return _missing(name, target, reason or "no figure was recorded")
    measured = f"{used / whole:.1%}"
    return _row(name, target, measured, used / whole < 0.8, f"{used / 2**30:.2f} of {whole / 2**30:.1f} GiB")


def _hits(point: Point | None, reason: str) -> Row:
    name, target = "feature cache hits", "> 90%"
    hits = point.cache.feature_hit_ratio if point else None
    if hits is None:
        return _missing(name, target, reason or "the cache was not asked")
    return _row(name, target, f"{hits:.1%}", hits > 0.9)


def _errors(point: Point | None, reason: str) -> Row:
    name, target = "errors", "< 1%"
    if point is None:
        return _missing(name, target, reason)
    failed = sum(point.errors.values())
    low, high = wilson_interval(failed, point.requests)
    kinds = ", ".join(f"{code} {count}" for code, count in point.errors.items() if count)
    note = f"{failed} of {point.requests}; 95% interval {low:.2%} to {high:.2%}" + (f"; {kinds}" if kinds else "")
    return _row(name, target, f"{point.error_share:.2%}", point.error_share < 0.01, note)


def _row(name: str, target: str, measured: str, passed: bool, note: str = "") -> Row:
    return Row(name, target, measured, Verdict.PASS if passed else Verdict.FAIL, note)


def _missing(name: str, target: str, reason: str) -> Row:
    return Row(name, target, NOT_MEASURED, Verdict.NOT_MEASURED, reason.rstrip("."))


def _ratio_row(name: str, ratio: LogRatio, bar: float) -> Row:
    interval = ratio.interval()
    if interval.bounded:
        note = f"95% interval {interval.low:.2f} to {interval.high:.2f} over {interval.repeats} repeats"
        if interval.low < bar <= interval.high:
            note += "; too wide to be sure"
    else:
        note = "one repeat: its spread is not known"
    return _row(name, f"≥ {bar:g}", f"{interval.estimate:.3f}", interval.estimate >= bar, note)
