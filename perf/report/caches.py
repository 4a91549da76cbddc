"""How much of what requests need is in memory already, as the run goes on."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from perf.report.chart import Chart, Table
from perf.report.style import MARKERS, SIZE, Canvas, color, mark
from perf.report.summary import DIRECT
from perf.results_format import PerfResult

HIT_TARGET = 0.9
_KINDS = {"feature": "feature cache, by user", "prefix": "vLLM's prefix cache, by context token"}


@dataclass(frozen=True)
class _Spot:
    """Hit ratio of a point; ``sent`` is how many requests the run had measured before its middle."""

    sent: float
    strategy: str
    mode: str
    level: float
    ratio: float


def cache_chart(result: PerfResult) -> Chart:
    """Hit ratios of both caches, point by point, over the requests of the run so far."""
    title = "Cache hits as the run goes on"
    found = {kind: _spots(result, kind) for kind in _KINDS}
    if not any(found.values()):
        return Chart("caches", title, "", missing="The run has no look-ups of a cache.")
    none = [_KINDS[kind] for kind, spots in found.items() if not spots]
    rows = [
        (f"{spot.sent:,.0f}", f"{spot.strategy}, {spot.mode} {spot.level:g}", _KINDS[kind], f"{spot.ratio:.1%}")
        for kind, spots in found.items()
        for spot in spots
    ]
    return Chart(
        "caches",
        title,
        "A mark is a point of the run, in the order in which they were measured; shape and color are the strategy's. "
        "Strategies measured in turn get the same visits, so that those after the first find users whom it has "
        "brought in: the open loop (a star) has visits of its own."
        + (f" Nothing was looked up in {' and '.join(none)}." if none else ""),
        "; ".join(
            f"{_KINDS[kind]}: from {min(spot.ratio for spot in spots):.0%} to {max(spot.ratio for spot in spots):.0%}"
            for kind, spots in found.items()
            if spots
        )
        + ".",
        lambda canvas: _draw(canvas, found),
        table=Table(("requests before", "point", "cache", "hits"), rows),
    )


def _draw(canvas: Canvas, found: dict[str, list[_Spot]]) -> None:
    panels = canvas.panels(len(found), 215)
    most = max(spot.sent for spots in found.values() for spot in spots)
    seen: dict[str, None] = {}
    for axes, (kind, spots) in zip(panels, found.items(), strict=True):
        axes.set_title(_KINDS[kind])
        axes.set_ylim(-0.02, 1.04)
        axes.set_xlim(0, most * 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("requests measured before")
        axes.set_ylabel("hits")
        if not spots:
            axes.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center", color=color("muted"))
            continue
        if kind == "feature":
            axes.axhline(HIT_TARGET, color=color("limit"), linewidth=1, linestyle=(0, (5, 3)))
            axes.annotate(
                f"target\n{HIT_TARGET:.0%}",
                (most * 1.04, HIT_TARGET),
                (6, 0),
                textcoords="offset points",
                va="center",
                color=color("limit"),
                fontsize=SIZE - 1,
            )
        axes.plot([spot.sent for spot in spots], [spot.ratio for spot in spots], color=color("grid"), linewidth=1.2)
        for index, spot in enumerate(spots):
            star = spot.mode == "open_loop"
            dot = axes.plot(
                spot.sent,
                spot.ratio,
                marker="*" if star else MARKERS[spot.strategy],
                markersize=11 if star else 5,
                linestyle="none",
                color=color(spot.strategy),
                clip_on=False,
                zorder=3,
            )[0]
            mark(dot, f"{kind}-{index}")
            seen.setdefault(spot.strategy)
    for strategy in seen:
        panels[0].plot([], [], marker=MARKERS[strategy], linestyle="none", color=color(strategy), label=strategy)
    canvas.figure.legend(loc="outside upper left", ncols=2 if canvas.narrow else len(seen), handletextpad=0.2)


def _spots(result: PerfResult, kind: str) -> list[_Spot]:
    spots, sent = [], 0
    for point in result.points:
        ratio = getattr(point.cache, f"{kind}_hit_ratio")
        # The engine called directly asks no cache: what is counted there is a rest of before.
        if ratio is not None and point.strategy != DIRECT:
            spots.append(_Spot(sent + point.requests / 2, point.strategy, point.mode, point.level, ratio))
        sent += point.requests
    return spots
