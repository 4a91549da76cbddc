"""One bar a strategy: memory, cost, and energy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from mtgr.routing.strategies import STRATEGIES
from perf.report.chart import Chart, Table, callers, number
from perf.report.style import SIZE, Canvas, color, mark
from perf.report.summary import DIRECT, at_saturation, saturation_level, strategies
from perf.results_format import ModelMemory, PerfResult, Point

_GIB = 2**30


@dataclass(frozen=True)
class Price:
    """What the machine costs an hour, in a currency's name or sign."""

    per_hour: float
    currency: str


Values = Mapping[str, Sequence[float]]


def memory_chart(result: PerfResult) -> Chart:
    """Memory of each strategy's own models, and most memory of the server under each strategy's load."""
    title = "Memory by strategy"
    host = _of_strategies(result, lambda point: point.server_memory_bytes / _GIB or None)
    gpu = _of_strategies(result, lambda point: point.gpu.memory_used_bytes / _GIB if point.gpu else None)
    own = {"host": _own(result, lambda model: model.host_bytes), "GPU": _own(result, lambda model: model.gpu_bytes)}
    panels = {f"{name} memory of its models (GiB)": values for name, values in own.items() if values}
    if host:
        panels["host memory of all under load (GiB)"] = host
    if gpu:
        panels["GPU memory in use under load (GiB)"] = gpu
    if not panels:
        return Chart("memory", title, "", missing="The run has no figures of memory.")
    together = len([name for name in strategies(result) if name != DIRECT]) > 1
    caption = (
        "Under load: the most that was used at a time. One server holds the engines of all strategies at once, so "
        "these bars differ only by what a strategy's load adds. "
        if together
        else "Under load: the most that was used at a time. "
    )
    if own["host"]:
        caption += (
            "Own models: what the processes of a strategy's engines hold after the run, shared pages in part; "
            f"{_door_sentence(result)} "
        )
    caption += f"The machine has {result.machine.memory_bytes / _GIB:.1f} GiB"
    whole = {point.gpu.memory_total_bytes for point in result.points if point.gpu}
    caption += f", its GPU {max(whole) / _GIB:.1f} GiB." if whole else "; no GPU memory was reported."
    return _bars("memory", title, caption, panels)


def _own(result: PerfResult, size: Callable[[ModelMemory], int | None]) -> dict[str, list[float]]:
    """GiB of each measured strategy whose models have processes of their own."""
    found = {}
    for name in strategies(result):
        models = STRATEGIES[name].models if name in STRATEGIES else ()
        sizes = [size(result.memory[model]) for model in models if model in result.memory]
        known = [value for value in sizes if value is not None]
        if models and len(known) == len(models):
            found[name] = [sum(known) / _GIB]
    return found


def _door_sentence(result: PerfResult) -> str:
    engines = {model for strategy in STRATEGIES.values() for model in strategy.models}
    rest = sum(found.host_bytes for model, found in result.memory.items() if model not in engines)
    return f"Triton, features and router hold {rest / _GIB:.2f} GiB more, which all strategies share."


def cost_chart(result: PerfResult, price: Price | None) -> Chart:
    """Price of 1,000 answers at the most that each strategy bears."""
    title = "Cost of 1,000 requests"
    if price is None:
        why = "No price was given: pass --price-per-hour with what the machine costs an hour."
        return Chart("cost", title, "", missing=why)
    costs = _of_strategies(
        result, lambda point: price.per_hour / 3600 / point.throughput * 1000 if point.throughput else None
    )
    if not costs:
        return Chart("cost", title, "", missing="No strategy has answered anything that could be paid for.")
    caption = (
        f"The machine at {number(price.per_hour)} {price.currency} an hour, divided by the most answers a second that "
        f"each strategy gives ({_saturations(result)}). A service that is kept at 70% of that pays 1.43 times as much."
    )
    return _bars("cost", title, caption, {f"{price.currency} per 1,000 answers": costs})


def energy_chart(result: PerfResult) -> Chart:
    """GPU energy of an answer at the most that each strategy bears."""
    title = "GPU energy per request"
    energy = _of_strategies(
        result,
        lambda point: (
            point.gpu.energy_joules / answers
            if point.gpu and point.gpu.energy_joules and (answers := len(point.latency_samples_ms))
            else None
        ),
    )
    if not energy:
        why = (
            "The run's machine has no GPU, so no power was reported."
            if result.machine.gpu is None
            else "The GPU reported no power."
        )
        return Chart("energy", title, "", missing=why)
    caption = (
        f"Energy of all GPUs while a point was measured, idle power included, divided by its answers, at the most that "
        f"each strategy gives ({_saturations(result)}). The host's energy is not measured."
    )
    return _bars("energy", title, caption, {"joules per answer": energy})


def _bars(name: str, title: str, caption: str, panels: Mapping[str, Values]) -> Chart:
    rows = [
        (
            strategy,
            unit,
            number(statistics.median(values)),
            f"{number(min(values))} to {number(max(values))}",
            str(len(values)),
        )
        for unit, found in panels.items()
        for strategy, values in found.items()
    ]
    description = "; ".join(f"{strategy} {middle} {unit}" for strategy, unit, middle, *_ in rows) + "."
    table = Table(("strategy", "what", "median", "least to most", "repeats"), rows)
    return Chart(name, title, caption, description, lambda canvas: _draw(canvas, panels), table=table)


def _draw(canvas: Canvas, panels: Mapping[str, Values]) -> None:
    most = max(len(values) for values in panels.values())
    places = canvas.panels(len(panels), 24.0 * most + 50)
    for panel, (axes, (unit, found)) in enumerate(zip(places, panels.items(), strict=True)):
        for row, (strategy, values) in enumerate(found.items()):
            middle = statistics.median(values)
            bar = axes.barh(row, middle, 0.62, color=color(strategy))[0]
            mark(bar, f"{strategy}-{panel}")
            if len(values) > 1 and max(values) > min(values):
                axes.plot([min(values), max(values)], [row, row], color=color("ink"), linewidth=1.2)
            axes.annotate(
                number(middle), (max(values), row), (4, 0), textcoords="offset points", va="center", fontsize=SIZE - 0.5
            )
        axes.set_yticks(range(len(found)), list(found))
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlim(0, max(max(values) for values in found.values()) * 1.16)
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)


def _of_strategies(result: PerfResult, value: Callable[[Point], float | None]) -> dict[str, list[float]]:
    """A value of each strategy's repeats at the number of callers that it gives most answers at."""
    values = {
        name: [found for point in at_saturation(result, name) if (found := value(point)) is not None]
        for name in strategies(result)
    }
    return {name: found for name, found in values.items() if found}


def _saturations(result: PerfResult) -> str:
    found = {name: saturation_level(result, name) for name in strategies(result)}
    return ", ".join(f"{name}: {callers(level)}" for name, level in found.items() if level is not None)
