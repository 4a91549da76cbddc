"""The gate finds what became slower, is silent about chance, and does not compare what cannot be compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtgr.errors import ConfigurationError
from perf.compare import Change, Verdict, compare, differences, judged, main
from perf.results_format import Latency, PerfResult, Point, save
from perf.statistics import Interval
from tests.unit.test_results_format import point, result

SPEED = {"baseline": 1.0, "onnx": 0.6, "auto": 0.65, "direct_onnx": 0.3}
Slow = Callable[[str, float], float]


def run(seed: int, slow: Slow = lambda strategy, level: 1.0, repeats: int = 5, **values: Any) -> PerfResult:
    """Of strategies with latencies around their speed; ``slow`` multiplies them, machine noise does so for all."""
    generator = np.random.default_rng(seed)
    points: list[Point] = []
    for repeat in range(repeats):
        for level in (1.0, 8.0):
            noise = math.exp(generator.normal(0, 0.2))
            for strategy, speed in SPEED.items():
                scale = 10 * level * speed * slow(strategy, level) * noise * math.exp(generator.normal(0, 0.02))
                samples = (scale * generator.lognormal(0, 0.2, 300)).round(4).tolist()
                points.append(
                    point(
                        strategy,
                        repeat=repeat,
                        level=level,
                        requests=300,
                        latency_samples_ms=samples,
                        latency_ms=Latency.of(samples),
                        throughput=1e3 * level / float(np.mean(samples)),
                    )
                )
    whole = result(*points, **values)
    return dataclasses.replace(whole, run=dataclasses.replace(whole.run, repeats=repeats))


def verdicts(changes: list[Change]) -> dict[tuple[str, float, str], Verdict]:
    return {(change.name, change.level, change.metric): change.verdict for change in changes}


def test_a_run_stands_to_another_of_the_same_code_as_before() -> None:
    changes = compare(run(0), run(1))
    assert {change.verdict for change in changes} <= {Verdict.SAME, Verdict.UNCLEAR, Verdict.BETTER}
    assert sum(change.verdict is Verdict.SAME for change in changes) > len(changes) / 2
    assert sum(change.overlap is True for change in changes) >= len(changes) - 1
    assert len(changes) == 18  # onnx and auto to baseline, onnx to direct; two levels; three metrics


def test_a_strategy_that_became_slower_is_found_and_no_other() -> None:
    found = verdicts(
        compare(run(0), run(1, lambda strategy, level: 1.5 if (strategy, level) == ("auto", 8.0) else 1.0))
    )
    worse = {key for key, verdict in found.items() if verdict is Verdict.WORSE}
    assert worse == {("auto / baseline", 8.0, metric) for metric in ("throughput", "p50", "p99")}


def test_a_slower_door_is_found_although_all_strategies_wait_in_it() -> None:
    found = verdicts(compare(run(0), run(1, lambda strategy, level: 1.0 if strategy == "direct_onnx" else 1.5)))
    assert found["onnx / direct_onnx", 1.0, "p50"] is Verdict.WORSE
    assert found["onnx / baseline", 1.0, "p50"] is not Verdict.WORSE


def test_a_faster_strategy_is_better() -> None:
    found = verdicts(compare(run(0), run(1, lambda strategy, level: 0.5 if strategy == "onnx" else 1.0)))
    assert found["onnx / baseline", 1.0, "throughput"] is Verdict.BETTER
    assert found["onnx / baseline", 8.0, "p99"] is Verdict.BETTER


def test_a_strategy_that_is_gone_fails_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = run(1)
    new = dataclasses.replace(new, points=[one for one in new.points if one.strategy != "auto"], kpi=None)
    assert verdicts(compare(run(0), new))["auto / baseline", 1.0, "p99"] is Verdict.GONE
    assert gate(tmp_path, run(0), new) == 1
    assert "is its strategy still ready?" in capsys.readouterr().out


def test_more_errors_are_worse_and_chance_is_not() -> None:
    old, new = run(0), run(1)

    def failing(whole: PerfResult, share: float) -> PerfResult:
        points = [
            dataclasses.replace(one, errors={"UNAVAILABLE": int(share * one.requests)})
            if one.strategy == "onnx"
            else one
            for one in whole.points
        ]
        return dataclasses.replace(whole, points=points)

    assert verdicts(compare(old, failing(new, 0.05)))["onnx", 8.0, "errors"] is Verdict.WORSE
    assert verdicts(compare(failing(old, 0.05), new))["onnx", 8.0, "errors"] is Verdict.BETTER
    assert verdicts(compare(failing(old, 0.05), failing(new, 0.055)))["onnx", 8.0, "errors"] is Verdict.UNCLEAR
    assert ("onnx", 8.0, "errors") not in verdicts(compare(old, new))


def test_one_repeat_is_never_enough_to_judge(tmp_path: Path) -> None:
    slower = run(1, lambda strategy, level: 3.0 if strategy == "onnx" else 1.0, repeats=1)
    assert set(verdicts(compare(run(0, repeats=1), slower)).values()) == {Verdict.UNCLEAR}
    assert gate(tmp_path, run(0, repeats=1), slower, "--absolute") == 0


@pytest.mark.parametrize(
    ("low", "high", "more", "verdict"),
    [
        (0.5, 0.85, True, Verdict.WORSE),
        (0.5, 0.95, True, Verdict.UNCLEAR),
        (0.95, 1.05, True, Verdict.SAME),
        (1.01, 1.5, True, Verdict.BETTER),
        (1.15, 1.5, False, Verdict.WORSE),
        (1.05, 1.5, False, Verdict.UNCLEAR),
        (0.8, 1.05, False, Verdict.SAME),
        (0.5, 0.99, False, Verdict.BETTER),
        (0.0, math.inf, True, Verdict.UNCLEAR),
    ],
)
def test_an_interval_is_judged_as_a_whole(low: float, high: float, more: bool, verdict: Verdict) -> None:
    assert judged(Interval(1.0, low, high, 3), more, 0.1) is verdict


def gate(folder: Path, old: PerfResult, new: PerfResult, *options: str) -> int:
    paths = [str(save(one, folder / f"{name}.json")) for name, one in (("old", old), ("new", new))]
    return main([*paths, *options])


def test_the_exit_code_is_for_ci_and_the_words_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(tmp_path, run(0), run(1)) == 0
    assert "Nothing is worse by more than 10% beyond chance." in capsys.readouterr().out
    assert gate(tmp_path, run(0), run(1, lambda strategy, level: 2.0 if strategy == "onnx" else 1.0)) == 1
    told = capsys.readouterr().out
    assert "Worse by more than 10%, beyond chance: onnx / baseline at 1 caller, throughput" in told
    assert "WORSE" in told.splitlines()[4]  # what is worse stands first


def elsewhere(whole: PerfResult) -> PerfResult:
    return dataclasses.replace(whole, machine=dataclasses.replace(whole.machine, gpu="NVIDIA H200"))


def test_absolute_numbers_of_different_machines_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "different GPUs (none and NVIDIA H200): their absolute numbers are not compared, only ratios."
    assert gate(tmp_path, run(0), elsewhere(run(1)), "--absolute") == 2
    refused = capsys.readouterr()
    assert sentence in refused.err
    assert not refused.out
    assert gate(tmp_path, run(0), elsewhere(run(1))) == 0
    told = capsys.readouterr().out
    assert sentence in told
    assert " ms" not in told


def test_absolute_numbers_of_the_same_machine_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(tmp_path, run(0), run(1, lambda strategy, level: 4.0), "--absolute") == 1
    told = capsys.readouterr().out
    assert "baseline at 8 callers, p50" in told
    assert "onnx / baseline at" not in told  # its ratio is as it was


def test_other_presets_and_traffic_are_told_apart() -> None:
    old, new = run(0, repeats=1), run(1, repeats=1)
    assert differences(old, new) == []
    preset = dataclasses.replace(new, run=dataclasses.replace(new.run, preset="large"))
    assert differences(old, preset) == ["presets (tiny and large)"]
    longer = dataclasses.replace(new.workload.history_lengths, p50=40.0)
    (words,) = differences(
        old, dataclasses.replace(new, workload=dataclasses.replace(new.workload, history_lengths=longer))
    )
    assert words.startswith("history lengths (p50 2, ")
    installed = [
        dataclasses.replace(one, run=dataclasses.replace(one.run, preset="installed", checkpoint_version=version))
        for one, version in ((old, "aa"), (new, "bb"))
    ]
    assert differences(*installed) == ["checkpoints (aa and bb)"]


def test_runs_without_anything_in_common_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = run(0, repeats=1)
    alone = dataclasses.replace(old, points=[one for one in old.points if one.strategy == "onnx"], kpi=None)
    with pytest.raises(ConfigurationError, match="no strategy beside baseline"):
        compare(alone, old)
    with pytest.raises(ConfigurationError, match="no ratio in common"):
        compare(old, alone)
    assert main([str(tmp_path / "missing.json"), str(tmp_path / "missing.json")]) == 2
    assert "missing.json" in capsys.readouterr().err
    assert gate(tmp_path, old, old, "--tolerance", "10") == 2
