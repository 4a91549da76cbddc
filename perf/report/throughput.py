"""Throughput against latency: what each strategy gives at each number of callers, and what waiting it costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from perf.report.chart import Chart, Table, callers, few, number
from perf.report.labels import ALONG, Labels
from perf.report.style import MARKERS, SIZE, Canvas, color, mark
from perf.report.summary import DIRECT, levels, strategies
from perf.results_format import PerfResult, Point

LATENCY_LIMIT_MS = 50.0
_PERCENTILES = ("p50", "p99")

_Corners: TypeAlias = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Spot:
    """Repeats of one point: throughput and a percentile of latency, each as least, median, and most."""

    level: float
    rate: tuple[float, float, float]
    latency: tuple[float, float, float]


def throughput_chart(result: PerfResult) -> Chart:
    """p50 and p99 over throughput, a line a strategy."""
    found = {name: _spots(result, name, "p99") for name in strategies(result)}
    if not any(found.values()):
        return Chart(
            "throughput",
            "Throughput against latency",
            "",
            missing="The run has no answered points with a fixed number of callers, so there is nothing to compare.",
        )
    return Chart(
        "throughput",
        "Throughput against latency",
        "Each line is a strategy, each mark a number of callers that wait for their answers before they ask again: "
        "further right and further down is better. Marks are medians over repeats, their whiskers the least and the "
        "most."
        + (" direct_onnx is the engine called with ready rows, without the door." if DIRECT in found else "")
        + (" The star is the open loop that the key figures are read from." if _kpi(result) else ""),
        _description(result, found),
        lambda canvas: _draw(canvas, result),
        table=_table(result),
    )


def _draw(canvas: Canvas, result: PerfResult) -> None:
    panels = list(zip(canvas.panels(2, 270), _PERCENTILES, strict=True))
    for axes, percentile in panels:
        _panel(axes, result, percentile)
    canvas.figure.draw_without_rendering()  # how high the panels are is known only now
    leaders = [_name_lines(axes, _lines(result, percentile)) for axes, percentile in panels]
    canvas.figure.draw_without_rendering()  # and how wide, with the names beside them
    for (axes, percentile), leading in zip(panels, leaders, strict=True):
        _name_places(axes, result, percentile, leading)


def _panel(axes: Axes, result: PerfResult, percentile: str) -> None:
    lines = _lines(result, percentile)
    latencies = [value for spots in lines.values() for spot in spots for value in spot.latency]
    rates = [value for spots in lines.values() for spot in spots for value in spot.rate]
    for name, spots in lines.items():
        _line(axes, name, spots, percentile)
    if percentile == "p99":
        latencies.append(LATENCY_LIMIT_MS)
        axes.axhline(LATENCY_LIMIT_MS, color=color("limit"), linewidth=1, linestyle=(0, (5, 3)))
    if (kpi := _kpi(result)) is not None:
        latencies.append(getattr(kpi.latency_ms, percentile))
        rates.append(kpi.throughput)
        star = axes.plot(
            kpi.throughput,
            getattr(kpi.latency_ms, percentile),
            marker="*",
            markersize=11,
            linestyle="none",
            color=color(kpi.strategy),
            markeredgecolor=color("paper"),
            markeredgewidth=0.7,
            zorder=5,
        )[0]
        mark(star, f"open-loop-{percentile}")
    axes.set_yscale("log")
    axes.set_ylim(min(latencies) * 0.8, max(latencies) * 1.45)
    axes.set_xlim(0, max(rates) * 1.06)
    axes.set_title(f"{percentile} latency")
    axes.set_xlabel("throughput (answers/s)")
    axes.set_ylabel(f"{percentile} latency (ms, logarithmic)")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _line(axes: Axes, name: str, spots: Sequence[_Spot], percentile: str) -> None:
    direct = name == DIRECT
    rates, latencies = [spot.rate[1] for spot in spots], [spot.latency[1] for spot in spots]
    line = axes.plot(
        rates,
        latencies,
        color=color(name),
        marker=MARKERS[name],
        linestyle=(0, (4, 2)) if direct else "-",
        markerfacecolor=color("paper") if direct else color(name),
        zorder=3,
    )[0]
    mark(line, f"{name}-{percentile}")
    if any(spot.rate[0] < spot.rate[2] for spot in spots):
        axes.errorbar(
            rates,
            latencies,
            xerr=[[spot.rate[1] - spot.rate[0] for spot in spots], [spot.rate[2] - spot.rate[1] for spot in spots]],
            yerr=[
                [spot.latency[1] - spot.latency[0] for spot in spots],
                [spot.latency[2] - spot.latency[1] for spot in spots],
            ],
            fmt="none",
            ecolor=color(name),
            elinewidth=0.8,
            alpha=0.7,
            zorder=2,
        )


def _name_places(axes: Axes, result: PerfResult, percentile: str, leaders: Sequence[_Corners]) -> None:
    """What numbers of callers, the target, and the open loop are, as far as there is room."""
    lines = _lines(result, percentile)
    spots = [spot for line in lines.values() for spot in line]
    whiskers = [
        *([(spot.rate[0], spot.latency[1]), (spot.rate[2], spot.latency[1])] for spot in spots),
        *([(spot.rate[1], spot.latency[0]), (spot.rate[1], spot.latency[2])] for spot in spots),
    ]
    corners = [[(spot.rate[1], spot.latency[1]) for spot in spots] for spots in lines.values()]
    most = axes.get_xlim()[1]
    target = [[(0.0, LATENCY_LIMIT_MS), (most, LATENCY_LIMIT_MS)]] if percentile == "p99" else []
    kpi = _kpi(result)
    star = [[(kpi.throughput, getattr(kpi.latency_ms, percentile))]] if kpi else []
    labels = Labels(axes, [*corners, *whiskers, *leaders, *target, *star])
    if kpi is not None:
        labels.place("open loop", star[0], color(kpi.strategy))
    if target:
        places = [(part / 20 * most, LATENCY_LIMIT_MS) for part in range(2, 19)]
        labels.place(f"target {LATENCY_LIMIT_MS:g} ms", places, color("limit"), ALONG)
    door = [spots for name, spots in lines.items() if name != DIRECT] or list(lines.values())
    for level in few(sorted({spot.level for line in door for spot in line}), 5):
        mine = sorted((spot for line in door for spot in line if spot.level == level), key=lambda spot: spot.rate[1])
        ends = [(mine[0].rate[0], mine[0].latency[1]), *((spot.rate[1], spot.latency[1]) for spot in mine)]
        labels.place(callers(level), ends, color("muted"))


def _name_lines(axes: Axes, lines: dict[str, list[_Spot]]) -> list[_Corners]:
    """Each line's name in the right margin, as near to its end as the others let it.

    Returns:
        What leads from the ends to the names, in the panel's data.
    """
    height = axes.get_window_extent().height / axes.figure.dpi * 72
    gap = (SIZE + 3.0) / height

    def fraction(value: float) -> float:
        low, high = axes.get_ylim()
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))

    wanted = sorted((fraction(spots[-1].latency[1]), name) for name, spots in lines.items())
    placed = spread([place for place, _ in wanted], gap)
    leaders: list[_Corners] = []
    low, high = axes.get_ylim()
    for (_, name), place in zip(wanted, placed, strict=True):
        end = lines[name][-1]
        leaders.append([(end.rate[1], end.latency[1]), (1.03 * axes.get_xlim()[1], low * (high / low) ** place)])
        axes.annotate(
            name,
            (end.rate[1], end.latency[1]),
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            color=color(name),
            fontsize=SIZE - 0.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color(name), "linewidth": 0.6, "alpha": 0.6, "shrinkB": 4},
        )
    return leaders


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved apart to at least ``gap``, as little as it takes, and kept within 0 to 1 if they fit."""
    groups: list[tuple[float, int]] = []  # middle and size
    for place in places:
        groups.append((place, 1))
        while len(groups) > 1:
            (low, below), (high, above) = groups[-2:]
            if high - low >= gap * (below + above) / 2:
                break
            size = below + above
            groups[-2:] = [((low * below + high * above) / size, size)]
    moved = []
    for middle, size in groups:
        half = gap * (size - 1) / 2
        middle = min(max(middle, half), max(1 - half, half))
        moved += [middle - half + gap * index for index in range(size)]
    return moved


def _lines(result: PerfResult, percentile: str) -> dict[str, list[_Spot]]:
    return {name: spots for name in strategies(result) if (spots := _spots(result, name, percentile))}


def _spots(result: PerfResult, strategy: str, percentile: str) -> list[_Spot]:
    spots = []
    for level in levels(result):
        points = [point for point in result.of(strategy, "concurrency", level) if point.latency_samples_ms]
        if points:
            rates = [point.throughput for point in points]
            latencies = [getattr(point.latency_ms, percentile) for point in points]
            spots.append(_Spot(level, _range(rates), _range(latencies)))
    return spots


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


def _kpi(result: PerfResult) -> Point | None:
    point = result.points[result.kpi.point] if result.kpi else None
    return point if point is not None and point.latency_samples_ms else None


def _table(result: PerfResult) -> Table:
    rows = []
    for level in levels(result):
        for name in strategies(result):
            points = result.of(name, "concurrency", level)
            if not points:
                continue
            answered = [point for point in points if point.latency_samples_ms]
            cells = [
                [point.throughput for point in points],
                *([getattr(point.latency_ms, percentile) for point in answered] for percentile in _PERCENTILES),
            ]
            failed, sent = sum(sum(point.errors.values()) for point in points), sum(point.requests for point in points)
            rows.append((f"{name}, {callers(level)}", *map(_spread, cells), f"{failed} of {sent:,}"))
    return Table(("strategy", "answers/s", "p50 (ms)", "p99 (ms)", "errors"), rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, middle, high = _range(values)
    return number(middle) if len(values) == 1 else f"{number(middle)} ({number(low)} to {number(high)})"


def _description(result: PerfResult, found: dict[str, list[_Spot]]) -> str:
    parts = [
        f"{name} {number(best.rate[1])} answers a second at {callers(best.level)} with p99 {number(best.latency[1])} ms"
        for name, spots in found.items()
        if spots
        for best in [max(spots, key=lambda spot: spot.rate[1])]
    ]
    return "Most answers of each strategy: " + "; ".join(parts) + "."
