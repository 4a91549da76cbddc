"""``python -m perf.compare OLD NEW`` (``make compare``): has it become slower? For people, and for CI by the exit code.

Compared are ratios within each run, which hold from one day and one machine to another where milliseconds do not: each
strategy against ``baseline``, and the door against its engine called directly, which tells if the door itself has
become slower. A ratio is worse when the whole 99% interval of its change lies beyond the tolerance; not 95%, because
many are judged at once. Milliseconds and answers a second are compared (``--absolute``) only where machine, network,
and traffic are the same.

Exit code: 0 nothing is worse, 1 something is worse or is not measured any more, 2 the runs cannot be compared.
"""

from __future__ import annotations

import argparse
import enum
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtgr.errors import ConfigurationError, MTGRError
from perf.report.chart import callers, number
from perf.report.forest import ratio_text
from perf.report.summary import DIRECT, METRICS, REFERENCE, compared, levels, median, ratios, strategies
from perf.results_format import PerfResult, Point, Spread, load
from perf.statistics import Interval, LogRatio, wilson_interval

TOLERANCE = 0.1
# With three repeats that scatter by 15%, 36 ratios raise a false alarm in 2 of 100 comparisons; at 95%, in 13.
GATE_CONFIDENCE = 0.99
_TRAFFIC_SLACK = 0.15  # how far a percentile of generated traffic may be off

_VALUES: Mapping[str, Callable[[Point], float]] = {
    "throughput": lambda point: point.throughput,
    "p50": lambda point: point.latency_ms.p50,
    "p99": lambda point: point.latency_ms.p99,
}

Key = tuple[str, float, str]


class Verdict(enum.Enum):
    """What the interval of a change says."""

    WORSE = "worse"
    BETTER = "better"
    SAME = "same"
    UNCLEAR = "unclear"
    GONE = "gone"


@dataclass(frozen=True)
class Change:
    """How a figure of the new run stands to that of the old.

    Attributes:
        name: Of the ratio, such as ``onnx / baseline``, or of a strategy.
        level: Callers.
        metric: Such as ``p99``.
        old: In words.
        new: In words.
        change: The new over the old, in words.
        verdict: What that means.
        overlap: Whether the intervals of old and new overlap; None where that is not asked.
    """

    name: str
    level: float
    metric: str
    old: str
    new: str
    change: str
    verdict: Verdict
    overlap: bool | None = None


def main(arguments: list[str] | None = None) -> int:
    """Compare two results; see the module for the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="part that a ratio may become worse by")
    parser.add_argument("--absolute", action="store_true", help="also compare answers a second and milliseconds")
    options = parser.parse_args(arguments)
    try:
        if not 0 <= options.tolerance < 1:
            raise ConfigurationError("--tolerance is a part, such as 0.1; it must be at least 0 and less than 1.")
        old, new = load(options.old), load(options.new)
        others = differences(old, new)
        if options.absolute and others:
            raise ConfigurationError(f"{refusal(others)} Leave out --absolute to compare ratios.")
        changes = compare(old, new, options.tolerance)
        if options.absolute:
            changes += compare_absolute(old, new, options.tolerance)
    except MTGRError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"old: {options.old} ({_origin(old)})\nnew: {options.new} ({_origin(new)})\n")
    print(table(changes))
    print()
    if others:
        print(refusal(others))
    elif not options.absolute:
        print("Machine, network, and traffic are the same: --absolute compares milliseconds as well.")
    print(conclusion(changes, options.tolerance))
    return 1 if any(change.verdict in (Verdict.WORSE, Verdict.GONE) for change in changes) else 0


def compare(old: PerfResult, new: PerfResult, tolerance: float = TOLERANCE) -> list[Change]:
    """All ratios of the old run, and its errors, beside those of the new one.

    Raises:
        ConfigurationError: If the old run has no ratios, or the runs have none in common.
    """
    before, after = _ratios(old), _ratios(new)
    if not before:
        raise ConfigurationError(
            f"the old run has no strategy beside {REFERENCE} with the same number of callers; measure both in one run."
        )
    if not before.keys() & after.keys():
        raise ConfigurationError(
            "the runs have no ratio in common; measure the same strategies and numbers of callers in both."
        )
    changes = []
    for key, ratio in before.items():
        name, level, metric = key
        was = ratio.interval()
        if key not in after:
            changes.append(Change(name, level, metric, ratio_text(was), "not measured", "–", Verdict.GONE))
            continue
        now = after[key].interval()
        change = (after[key] - ratio).interval(GATE_CONFIDENCE)
        changes.append(
            Change(
                name,
                level,
                metric,
                ratio_text(was),
                ratio_text(now),
                ratio_text(change),
                judged(change, METRICS[metric], tolerance),
                was.overlaps(now),
            )
        )
    return changes + _errors(old, new)


def compare_absolute(old: PerfResult, new: PerfResult, tolerance: float = TOLERANCE) -> list[Change]:
    """Answers a second and milliseconds of every strategy, of runs that ``differences`` finds none of."""
    changes = []
    for strategy in strategies(old):
        for level in levels(old):
            sides = [run.of(strategy, "concurrency", level) for run in (old, new)]
            for metric, unit in (("throughput", "answers/s"), ("p50", "ms"), ("p99", "ms")):
                # What the runs' repeats have in common is their number only; pairing them costs width, not truth.
                ratio = compared(sides[1], sides[0], metric)
                if ratio is None:
                    continue
                was, now = (median(points, _VALUES[metric]) for points in sides)
                interval = ratio.interval(GATE_CONFIDENCE)
                # One repeat says nothing of how far one run is from the next.
                verdict = judged(interval, METRICS[metric], tolerance) if ratio.freedom else Verdict.UNCLEAR
                texts = f"{number(was)} {unit}", f"{number(now)} {unit}", ratio_text(interval)
                changes.append(Change(strategy, level, metric, *texts, verdict))
    return changes


def judged(change: Interval, more_is_better: bool, tolerance: float) -> Verdict:
    """What an interval of new over old says, given how much worse is borne."""
    worst = (1 - tolerance) if more_is_better else 1 / (1 - tolerance)
    if change.high < worst if more_is_better else change.low > worst:
        return Verdict.WORSE
    if change.low > 1 if more_is_better else change.high < 1:
        return Verdict.BETTER
    if change.low >= worst if more_is_better else change.high <= worst:
        return Verdict.SAME
    return Verdict.UNCLEAR


def differences(old: PerfResult, new: PerfResult) -> list[str]:
    """Why absolute numbers of two runs say nothing about each other; empty if nothing is known against it."""
    pairs: dict[str, tuple[object, object]] = {
        "processors": (old.machine.cpu, new.machine.cpu),
        "numbers of cores": (old.machine.cores, new.machine.cores),
        "GPUs": (old.machine.gpu or "none", new.machine.gpu or "none"),
        "presets": (old.run.preset, new.run.preset),
        "Zipf exponents": (old.workload.zipf, new.workload.zipf),
    }
    if old.run.preset == new.run.preset == "installed":
        pairs["checkpoints"] = (old.run.checkpoint_version[:12], new.run.checkpoint_version[:12])
    found = [f"{what} ({was} and {now})" for what, (was, now) in pairs.items() if was != now]
    for what in ("history_lengths", "candidates"):
        was, now = getattr(old.workload, what), getattr(new.workload, what)
        if not _alike(was, now):
            words = what.replace("_", " ")
            found.append(f"{words} (p50 {was.p50:g}, p99 {was.p99:g} and p50 {now.p50:g}, p99 {now.p99:g})")
    return found


def refusal(found: Sequence[str]) -> str:
    """The sentence that says why absolute numbers are not compared."""
    return f"The runs are of different {', '.join(found)}: their absolute numbers are not compared, only ratios."


def table(changes: Sequence[Change]) -> str:
    """For people: a line a figure, what is worse first."""
    heads = ("", "callers", "metric", "old (95% interval)", "new (95% interval)", "new / old (99% interval)", "")
    order = [Verdict.GONE, Verdict.WORSE, Verdict.UNCLEAR, Verdict.SAME, Verdict.BETTER]
    lines = [heads]
    for change in sorted(changes, key=lambda change: order.index(change.verdict)):
        level = f"{change.level:g}"
        word = change.verdict.value.upper() if change.verdict in order[:2] else change.verdict.value
        lines.append((change.name, level, change.metric, change.old, change.new, change.change, word))
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def conclusion(changes: Sequence[Change], tolerance: float) -> str:
    """What it comes to."""
    counts = {verdict: sum(change.verdict is verdict for change in changes) for verdict in Verdict}
    asked = [change.overlap for change in changes if change.overlap is not None]
    lines = [", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count) + "."]
    lines.append(f"The intervals of old and new overlap in {sum(asked)} of {len(asked)} ratios.")
    if counts[Verdict.UNCLEAR]:
        lines.append(
            f"{counts[Verdict.UNCLEAR]} cannot be told: they may be more than {tolerance:.0%} worse, or not worse "
            "at all; more repeats make intervals narrower."
        )
    if counts[Verdict.GONE]:
        lines.append("What is gone was measured in the old run and not in the new one: is its strategy still ready?")
    worse = [
        f"{change.name} at {callers(change.level)}, {change.metric}"
        for change in changes
        if change.verdict is Verdict.WORSE
    ]
    if worse:
        lines.append(f"Worse by more than {tolerance:.0%}, beyond chance: {'; '.join(worse)}.")
    else:
        lines.append(f"Nothing is worse by more than {tolerance:.0%} beyond chance.")
    return "\n".join(lines)


def _ratios(result: PerfResult) -> dict[Key, LogRatio]:
    """By name, callers, and metric.

    The direct engine is none of the strategies: when the door becomes slower, it gains on ``baseline``.
    """
    to_reference: Mapping[Key, LogRatio] = ratios(result, REFERENCE)
    found = {
        (f"{name} / {REFERENCE}", level, metric): ratio
        for (name, level, metric), ratio in to_reference.items()
        if name != DIRECT
    }
    for (name, level, metric), ratio in ratios(result, DIRECT).items():
        if name == "onnx":
            found[f"{name} / {DIRECT}", level, metric] = ratio
    return found


def _errors(old: PerfResult, new: PerfResult) -> list[Change]:
    """Shares of failed requests, where there are any."""
    changes = []
    for strategy in strategies(old):
        for level in levels(old):
            counts = []
            for run in (old, new):
                points = run.of(strategy, "concurrency", level)
                failed = sum(sum(point.errors.values()) for point in points)
                counts.append((failed, sum(point.requests for point in points)))
            (was, sent_was), (now, sent_now) = counts
            if not (was or now) or not (sent_was and sent_now):
                continue
            (low_was, high_was), (low_now, high_now) = (wilson_interval(*count) for count in counts)
            verdict = Verdict.UNCLEAR
            if low_now > high_was:
                verdict = Verdict.WORSE
            elif high_now < low_was:
                verdict = Verdict.BETTER
            texts = (
                f"{was / sent_was:.2%} ({low_was:.2%} to {high_was:.2%})",
                f"{now / sent_now:.2%} ({low_now:.2%} to {high_now:.2%})",
            )
            changes.append(Change(strategy, level, "errors", *texts, "–", verdict))
    return changes


def _alike(was: Spread, now: Spread) -> bool:
    return all(abs(a - b) <= _TRAFFIC_SLACK * max(a, b) for a, b in ((was.p50, now.p50), (was.p99, now.p99)))


def _origin(result: PerfResult) -> str:
    changed = " with changes" if result.run.git_dirty else ""
    repeats = "1 repeat" if result.run.repeats == 1 else f"{result.run.repeats} repeats"
    return f"{result.run.started}, revision {result.run.git_revision[:10] or 'unknown'}{changed}, {repeats}"


if __name__ == "__main__":
    sys.exit(main())
