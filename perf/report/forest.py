"""Ratios to the reference with what their repeats leave open."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from perf.report.chart import Chart, Table, callers
from perf.report.style import MARKERS, SIZE, Canvas, color, mark
from perf.report.summary import METRICS, REFERENCE, levels, ratios, strategies
from perf.results_format import PerfResult
from perf.statistics import Interval

_TITLES = {
    "throughput": "throughput (more is better)",
    "p50": "p50 latency (less is better)",
    "p99": "p99 latency (less is better)",
}
_STEPS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50)
_MOST = 4.0  # an interval that reaches further than this times the estimate is drawn as an arrow

Key = tuple[str, float, str]


def ratio_chart(result: PerfResult) -> Chart:
    """Throughput, p50, and p99 of every strategy over those of the reference."""
    title = f"Ratios to {REFERENCE}"
    found = {key: ratio.interval() for key, ratio in ratios(result).items()}
    if not found:
        why = f"The run has nothing to compare with {REFERENCE} at the same number of callers; measure both in one run."
        return Chart("ratios", title, "", missing=why)
    repeats = result.run.repeats
    spread = (
        f"Bars are 95% intervals over {repeats} repeats, in each of which the strategies took turns."
        if repeats > 1
        else "There was one repeat: bars hold chance within it only, and that of a throughput is not known."
    )
    caption = f"At the same number of callers, in the same run. {spread} An arrow says that a bar goes on."
    return Chart(
        "ratios",
        title,
        caption,
        "; ".join(
            f"{name} at {callers(level)}: {interval.estimate:.2f} times the throughput"
            for (name, level, metric), interval in found.items()
            if metric == "throughput"
        )
        + ".",
        lambda canvas: _draw(canvas, result, found),
        table=_table(found),
    )


def _draw(canvas: Canvas, result: PerfResult, found: Mapping[Key, Interval]) -> None:
    names = [name for name in strategies(result) if any(key[0] == name for key in found)]
    known = [level for level in levels(result) if any(key[1] == level for key in found)]
    rows: dict[tuple[str, float], float] = {}
    heads, place = {}, 0.0
    for level in known:
        heads[level] = place
        for name in names:
            place += 1
            rows[name, level] = place
        place += 1.3
    panels = canvas.panels(len(METRICS), max(120.0, 13.5 * place + 55))
    for index, (axes, metric) in enumerate(zip(panels, METRICS, strict=True)):
        values = {key: interval for key, interval in found.items() if key[2] == metric}
        shown = {key: _shown(interval) for key, interval in values.items()}
        low = min([1.0, *(one.low for one in shown.values())]) / 1.12
        high = max([1.0, *(one.high for one in shown.values())]) * 1.12
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(place - 0.6, -0.7)
        axes.axvline(1, color=color("muted"), linewidth=1.1)
        for (name, level, _), interval in values.items():
            y, bounds = rows[name, level], shown[name, level, metric]
            dots = axes.plot(interval.estimate, y, marker=MARKERS[name], linestyle="none", color=color(name), zorder=3)[
                0
            ]
            mark(dots, f"{name}-{level:g}-{metric}")
            if not interval.bounded:
                continue
            axes.plot([bounds.low, bounds.high], [y, y], color=color(name), linewidth=1.6, solid_capstyle="butt")
            for end, cut, arrow in (
                (bounds.low, bounds.low > interval.low, "<"),
                (bounds.high, bounds.high < interval.high, ">"),
            ):
                if cut:
                    axes.plot(end, y, marker=arrow, color=color(name), markersize=5)
        axes.set_title(_TITLES[metric])
        axes.set_xlabel(f"times {REFERENCE} (logarithmic)")
        steps = [step for step in _STEPS if low <= step <= high]
        # As many as there is room for, 1 among them.
        while len(steps) > (5 if canvas.narrow else 6):
            steps = [step for at, step in enumerate(steps) if step == 1 or (at - steps.index(1)) % 2 == 0]
        axes.xaxis.set_major_locator(FixedLocator(steps))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        if index == 0 or canvas.narrow:
            axes.set_yticks(list(rows.values()), [name for name, _ in rows])
            for text, (name, _) in zip(axes.get_yticklabels(), rows, strict=True):
                text.set_color(color(name))
        else:
            axes.set_yticks([])
        for level, y in heads.items():
            axes.annotate(
                callers(level),
                (0, y),
                (3, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                color=color("muted"),
                fontsize=SIZE - 1,
                bbox={"facecolor": color("paper"), "edgecolor": "none", "pad": 1},
            )


def _shown(interval: Interval) -> Interval:
    """Cut to what can be drawn beside the others."""
    estimate = interval.estimate
    if not interval.bounded:
        return Interval(estimate, estimate, estimate, interval.repeats)
    low, high = max(interval.low, estimate / _MOST), min(interval.high, estimate * _MOST)
    return Interval(estimate, low, high, interval.repeats)


def ratio_text(interval: Interval) -> str:
    """A ratio with its bounds."""
    if not interval.bounded or not math.isfinite(interval.low):
        return f"{interval.estimate:.2f} (one repeat)"
    return f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _table(found: Mapping[Key, Interval]) -> Table:
    rows = []
    for name, level in dict.fromkeys((name, level) for name, level, _ in found):
        cells = [
            ratio_text(found[name, level, metric]) if (name, level, metric) in found else "–" for metric in METRICS
        ]
        rows.append((f"{name}, {callers(level)}", *cells))
    rows.sort(key=lambda row: float(row[0].split(", ")[1].split()[0]))
    return Table(("strategy", *METRICS), rows)
