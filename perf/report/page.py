"""The page: everything in one file, readable without a network, a script, or color."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

from perf.report.chart import Chart, Table, callers, number
from perf.report.forest import ratio_text
from perf.report.kpi import Row, Verdict, key_figures, load_sentence, strategy_targets
from perf.report.style import css_variables, drawn_svg
from perf.report.summary import REFERENCE, median, ratios, saturation_level, strategies
from perf.results_format import PerfResult, Spread

_STYLE = Path(__file__).with_name("page.css")
_SIGNS = {Verdict.PASS: "✓", Verdict.FAIL: "✗", Verdict.NOT_MEASURED: "–"}
_MOST_COMMANDS = 200


def page(result: PerfResult, charts: Sequence[Chart], source: str) -> str:
    """The report as HTML.

    Args:
        result: The run.
        charts: Its charts, in the order of the page.
        source: Name of the file that the run was read from.
    """
    title = f"MTGR performance: {subject(result)}"
    contents = "".join(f'<li><a href="#{chart.name}">{escape(chart.title)}</a></li>' for chart in charts)
    figures = "".join(_figure(chart) for chart in charts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
:root {{ {css_variables(dark=False)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {css_variables(dark=True)} }} }}
{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header>
<h1>{escape(title)}</h1>
<p>{escape(_origin(result))}</p>
<nav aria-label="Contents"><ul>
<li><a href="#kpi">Key figures</a></li>{contents}<li><a href="#origin">Where this comes from</a></li>
</ul></nav>
</header>
<main id="main" tabindex="-1">
<section aria-labelledby="kpi">
<h2 id="kpi">Key figures</h2>
{_summary(result)}
<p>{escape(load_sentence(result))}</p>
{_targets(key_figures(result), "kpi-table", "Key figures")}
<h3 id="targets">How the strategies stand to one another</h3>
{_targets(strategy_targets(result), "targets-table", "Targets of the strategies")}
</section>
{figures}
{_provenance(result, source)}
</main>
</body>
</html>
"""


def _figure(chart: Chart) -> str:
    name, title = chart.name, escape(chart.title)
    if chart.draw is None:
        why = f"<strong>Not drawn.</strong> {escape(chart.missing)}"
        body = f'<p class="missing" data-chart="{name}">{why}</p>\n'
    else:
        label = escape(f"{chart.title}. {chart.description}")
        drawings = "".join(
            f'<div class="{width}" role="img" aria-label="{label}">{drawn_svg(chart.draw, name, narrow)}</div>\n'
            for width, narrow in (("wide", False), ("narrow", True))
        )
        caption = f"<figcaption>{escape(chart.caption)}</figcaption>"
        numbers = _table(chart.table, f"Numbers: {chart.title}")
        body = (
            f'<figure data-chart="{name}">\n{drawings}{caption}\n</figure>\n'
            f"<details><summary>Numbers of this chart</summary>\n{numbers}</details>\n"
        )
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{title}</h2>\n{body}</section>\n'


def _table(table: Table, label: str) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in table.rows
    )
    return _scrollable(f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>", label)


def _targets(rows: Sequence[Row], name: str, label: str) -> str:
    body = "".join(
        f'<tr class="{row.verdict.name.lower().replace("_", "-")}"><th scope="row">{escape(row.name)}</th>'
        f"<td>{escape(row.target)}</td><td>{escape(row.measured)}</td>"
        f'<td class="verdict"><span aria-hidden="true">{_SIGNS[row.verdict]}</span> {row.verdict.value}</td>'
        f"<td>{escape(row.note)}</td></tr>\n"
        for row in rows
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("figure", "target", "measured", "verdict", "note"))
    table = f'<table id="{name}" class="targets"><thead><tr>{heads}</tr></thead><tbody>\n{body}</tbody></table>'
    return _scrollable(table, label)


def _scrollable(table: str, label: str) -> str:
    """In a box that scrolls by itself on a narrow screen, by the keyboard as well."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{table}</div>\n'


def _summary(result: PerfResult) -> str:
    rows = key_figures(result)
    counts = {verdict: sum(row.verdict is verdict for row in rows) for verdict in Verdict}
    said = [f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict]]
    lines = [f"Of {len(rows)} key figures: {', '.join(said)}."]
    most = {}
    for name in strategies(result):
        level = saturation_level(result, name)
        if level is not None and name != "direct_onnx":
            rate = median(result.of(name, "concurrency", level), lambda point: point.throughput)
            most[name] = (rate or 0.0, level)
    if most:
        best = max(most, key=lambda name: most[name])
        rate, level = most[best]
        lines.append(f"Most answers a second: {number(rate)} by {best} at {callers(level)}.")
        ratio = ratios(result).get((best, level, "throughput"))
        if ratio is not None:
            interval = ratio.interval()
            lines.append(
                f"That is {ratio_text(interval)} times {REFERENCE} at as many callers{_said(interval.bounded)}."
            )
    return '<ul class="summary">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _said(bounded: bool) -> str:
    return ", with its 95% interval" if bounded else ""


def subject(result: PerfResult) -> str:
    """What was measured, on what."""
    preset = result.run.preset
    what = f"installed checkpoint {result.run.checkpoint_version[:8]}" if preset == "installed" else f"preset {preset}"
    return f"{what} on {result.machine.gpu or result.machine.cpu}"


def _origin(result: PerfResult) -> str:
    changed = " with changes on top" if result.run.git_dirty else ""
    revision = f"revision {result.run.git_revision[:10]}{changed}" if result.run.git_revision else "no known revision"
    repeats = result.run.repeats
    return (
        f"Run {result.run.started} to {result.run.finished}, {revision}, seed {result.run.seed}, "
        f"{len(result.points)} points, {repeats} {'repeat' if repeats == 1 else 'repeats'} of each."
    )


def _provenance(result: PerfResult, source: str) -> str:
    run, machine, workload = result.run, result.machine, result.workload
    busy = " – the machine was busy before the run" if machine.load_before > machine.cores / 2 else ""
    facts = {
        "Result": source,
        "Run": run.id,
        "Revision": (run.git_revision or "unknown") + (", with changes on top" if run.git_dirty else ""),
        "Command": shlex.join(run.command),
        "Seed": str(run.seed),
        "Checkpoint": run.checkpoint_version,
        "Processor": f"{machine.cpu}, {machine.cores} cores",
        "Memory": f"{machine.memory_bytes / 2**30:.1f} GiB",
        "GPU": f"{machine.gpu}, driver {machine.driver}" if machine.gpu else "none",
        "Load before": f"{machine.load_before:g}{busy}",
        "Versions": ", ".join(f"{name} {version}" for name, version in sorted(result.versions.items())),
        "Threads": ", ".join(f"{name} {count}" for name, count in sorted(result.threads.items())),
        "Traffic": (
            f"{workload.users:,} users, Zipf {workload.zipf:g}; {workload.requests_generated:,} requests, "
            f"{workload.unique_payloads:,} of them different; {workload.new_user_share:.1%} of users nobody knows, "
            f"{workload.repeat_share:.1%} of users who had asked before, {workload.bad_share:.2%} bad; "
            f"{workload.events_between_visits:.2f} new events between visits"
        ),
        "History": _spread(workload.history_lengths, "events"),
        "Candidates": _spread(workload.candidates, "items"),
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in facts.items())
    commands = list(dict.fromkeys(shlex.join(point.command) for point in result.points if point.command))
    left = len(commands) - _MOST_COMMANDS
    shown = "\n".join(commands[:_MOST_COMMANDS]) + (f"\n… and {left} more, in {source}" if left > 0 else "")
    exact = (
        f"<details><summary>The {len(commands)} commands of perf_analyzer</summary>\n"
        f'<pre class="scroll" role="region" tabindex="0" aria-label="Commands">{escape(shown)}</pre></details>\n'
        if commands
        else ""
    )
    return (
        '<section aria-labelledby="origin">\n<h2 id="origin">Where this comes from</h2>\n'
        f"<dl>\n{listed}</dl>\n{exact}</section>"
    )


def _spread(spread: Spread, what: str) -> str:
    return f"{what} of a request: p50 {spread.p50:g}, p99 {spread.p99:g}, most {spread.max:g}"
