"""Where a request's time goes, and in what company it is computed."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from perf.report.chart import Chart, Table, callers, few, number
from perf.report.style import SIZE, Canvas, color, mark
from perf.report.summary import STAGES, batch_shares, levels, stage_shares, strategies
from perf.results_format import PerfResult

_NO_BATCHES = "The run has no batches that Triton counted: it knows those of the dense engines only, not vLLM's steps."


def stage_chart(result: PerfResult) -> Chart:
    """Mean latency, divided among the stages, at a few numbers of callers."""
    title = "Mean latency by stage"
    shares = {
        (name, level): stages
        for level in levels(result)
        for name in strategies(result)
        if (stages := stage_shares(result.of(name, "concurrency", level)))
    }
    if not any(stages[name] for stages in shares.values() for name in STAGES if name != "rest"):
        return Chart("stages", title, "", missing="The run has no times of the door's stages.")
    heads = [STAGES[name] for name in STAGES]
    rows = [
        (f"{name}, {callers(level)}", *(number(stages[stage]) for stage in STAGES), number(sum(stages.values())))
        for (name, level), stages in shares.items()
    ]
    return Chart(
        "stages",
        title,
        "Means over answers, from Triton's and the router's counts; what is left of the client's mean latency lies "
        "between processes and in the client. The wait for an engine has merging into batches in it. Where vLLM "
        "answered, waiting and computing cannot be told apart. Each panel has its own scale.",
        "; ".join(
            f"{name} at {callers(level)}: {number(sum(stages.values()))} ms, of which most is "
            f"{STAGES[max(stages, key=lambda stage: stages[stage])]}"
            for (name, level), stages in shares.items()
        )
        + ".",
        lambda canvas: _draw_stages(canvas, result, shares),
        table=Table(("mean ms", *heads, "sum"), rows),
    )


def _draw_stages(canvas: Canvas, result: PerfResult, shares: Mapping[tuple[str, float], Mapping[str, float]]) -> None:
    shown = few(sorted({level for _, level in shares}))
    used = [stage for stage in STAGES if any(stages[stage] > 0 for stages in shares.values())]
    names = strategies(result)
    panels = canvas.panels(len(shown), 20.0 * len(names) + (60 if canvas.narrow else 100))
    for index, (axes, level) in enumerate(zip(panels, shown, strict=True)):
        totals = []
        for row, name in enumerate(names):
            stages = shares.get((name, level))
            if stages is None:
                axes.annotate(
                    "not measured", (0, row), (3, 0), textcoords="offset points", va="center", color=color("muted")
                )
                continue
            left = 0.0
            for stage in used:
                if stages[stage] > 0:
                    bar = axes.barh(row, stages[stage], 0.68, left=left, color=color(f"stage-{stage}"))[0]
                    mark(bar, f"{name}-{level:g}-{stage}")
                left += stages[stage]
            totals.append(left)
            axes.annotate(
                f"{number(left)}", (left, row), (3, 0), textcoords="offset points", va="center", fontsize=SIZE - 1
            )
        axes.set_xlim(0, max(totals, default=1.0) * 1.2)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(callers(level))
        axes.set_xlabel("mean latency (ms)")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_yticks(range(len(names)), names if index == 0 or canvas.narrow else [""] * len(names))
    canvas.figure.legend(
        handles=[Patch(color=color(f"stage-{stage}"), label=STAGES[stage]) for stage in used],
        loc="outside upper left",
        ncols=1 if canvas.narrow else 3,
        handlelength=1,
        handleheight=1,
    )


def batch_chart(result: PerfResult) -> Chart:
    """How many requests share a call of an engine, a panel a strategy."""
    title = "Batch sizes"
    shares = {
        (name, level): found
        for name in strategies(result)
        for level in levels(result)
        if name != "vllm" and (found := batch_shares(result.of(name, "concurrency", level)))
    }
    if not shares:
        return Chart("batches", title, "", missing=_NO_BATCHES)
    sizes = sorted({size for found in shares.values() for size in found})
    rows = [
        (
            f"{name}, {callers(level)}",
            *(f"{found.get(size, 0):.0%}" for size in sizes),
            f"{_per_call(found):.2f}",
        )
        for (name, level), found in shares.items()
    ]
    return Chart(
        "batches",
        title,
        "Part of the requests that were computed in a batch of each size. vLLM is left out, and so are its answers "
        "under auto: it merges requests step by step inside, where Triton does not count.",
        "; ".join(
            f"{name} at {callers(level)}: {_per_call(found):.1f} a call" for (name, level), found in shares.items()
        )
        + ".",
        lambda canvas: _draw_batches(canvas, shares, sizes),
        table=Table(("part of requests in a batch of", *map(str, sizes), "mean a call"), rows),
    )


def _draw_batches(canvas: Canvas, shares: Mapping[tuple[str, float], Mapping[int, float]], sizes: list[int]) -> None:
    names = list(dict.fromkeys(name for name, _ in shares))
    shown = few(sorted({level for _, level in shares}))
    panels = canvas.panels(len(names), 165, most=4)
    tints = dict(zip(shown, (0.35, 0.65, 1.0)[-len(shown) :], strict=True))
    # Beyond some sizes, those next to one another stand together.
    width = 0.84 / len(shown)
    for index, (axes, name) in enumerate(zip(panels, names, strict=True)):
        for shift, level in enumerate(shown):
            found = shares.get((name, level), {})
            bars = axes.bar(
                [place + (shift - (len(shown) - 1) / 2) * width for place in range(len(sizes))],
                [found.get(size, 0.0) for size in sizes],
                width,
                color=color(name),
                alpha=tints[level],
            )
            for size, bar in zip(sizes, bars, strict=True):
                if found.get(size):
                    mark(bar, f"{name}-{level:g}-{size}")
        axes.set_ylim(0, 1.02)
        axes.set_title(name, color=color(name))
        axes.set_xlabel("batch size")
        step = -(-len(sizes) // 8)
        axes.set_xticks(range(0, len(sizes), step), [str(size) for size in sizes[::step]])
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.grid(axis="x", visible=False)
        if index == 0 or canvas.narrow:
            axes.set_ylabel("part of requests")
    canvas.figure.legend(
        handles=[Patch(color=color("ink"), alpha=tint, label=callers(level)) for level, tint in tints.items()],
        loc="outside upper left",
        ncols=len(shown),
        handlelength=1,
        handleheight=1,
    )


def _per_call(shares: Mapping[int, float]) -> float:
    """Mean batch of a call, from shares of requests."""
    return 1 / sum(share / size for size, share in shares.items())
