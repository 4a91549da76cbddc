"""What surrounds a performance run: perf_analyzer's output, the server's counts, and what is concluded from points."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from mtgr.errors import ConfigurationError, UnavailableError
from perf.analyzer import Analyzer, StalledError, exact_at_rates, find_analyzer, read_profile
from perf.measure import DIRECT, mean_batch, mismatches
from perf.results_format import CacheRatios, ModelCounts, Point
from perf.run import _turns, thread_counts
from perf.verdicts import saturation, table, verdicts
from perf.watch import Page, answered_by, cache_ratios, gpu_usage, model_counts, stage_means, triton_gpu
from tests.unit.test_results_format import point, result


def page(models: dict[str, object] | None = None, **series: float) -> Page:
    """``name__label__value=3.0`` for each series."""
    found = {}
    for key, value in series.items():
        name, *labels = key.split("__")
        found[(name, frozenset(zip(labels[::2], labels[1::2], strict=True)))] = value
    return Page(found, models or {}, 0.0, 0.0)  # type: ignore[arg-type]


# --- perf_analyzer


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_raw_samples_of_an_exported_profile(tmp_path: Path) -> None:
    requests = [
        {"timestamp": 5_000_000, "response_timestamps": [9_000_000], "request_inputs": {"user_id": "b"}},
        {"timestamp": 1_000_000, "response_timestamps": [4_500_000], "request_inputs": {"user_id": "a"}},
        {"timestamp": 6_000_000, "response_timestamps": [8_000_000], "request_inputs": {"user_id": "b"}},
    ]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"experiments": [{"requests": requests}]}), encoding="utf-8")
    found = read_profile(path, ["perf_analyzer"])
    assert found.latencies_ms == [3.5, 4.0, 2.0]
    assert found.seconds == pytest.approx(8e-3)
    assert found.distinct == 2
    path.write_text(json.dumps({"experiments": [{"requests": []}]}), encoding="utf-8")
    with pytest.raises(UnavailableError, match="exported no requests"):
        read_profile(path, [])


def test_versions_that_send_all_twice_at_a_rate_are_known() -> None:
    assert [exact_at_rates(version) for version in ("2.51.0", "2.9", "2.52.0", "2.57.0", "3.0", "unknown")] == [
        *(True, True),
        *(False, False, False, False),
    ]


def test_what_perf_analyzer_lacks_is_named(tmp_path: Path) -> None:
    lacking = script(tmp_path / "lacking", "echo 'x: libb64.so.0d: cannot open shared object file' >&2; exit 127")
    with pytest.raises(ConfigurationError, match=r"without libb64\.so\.0d: apt-get install libb64-0d"):
        Analyzer(lacking)
    with pytest.raises(ConfigurationError, match="nothing is not an executable file"):
        find_analyzer(tmp_path / "nothing")
    with pytest.raises(ConfigurationError, match="says nothing"):
        find_analyzer(environ={"MTGR_PERF_ANALYZER": str(script(tmp_path / "mute", "exit 0"))})


def test_the_one_on_path_comes_first(tmp_path: Path) -> None:
    script(tmp_path / "perf_analyzer", "echo 'Perf Analyzer Version 9.9 (commit x)'")
    assert find_analyzer(environ={"PATH": str(tmp_path)}).version == "9.9"


def test_a_failed_request_ends_perf_analyzer(tmp_path: Path) -> None:
    body = 'case "$1" in --version) echo Version 1 ;; *) echo "Failed to retrieve results"; exit 99 ;; esac'
    analyzer = Analyzer(script(tmp_path / "failing", body))
    with pytest.raises(UnavailableError, match="perf_analyzer failed: Failed to retrieve results"):
        analyzer.run("localhost:1", "mtgr", tmp_path / "x.json", 3, concurrency=1)
    with pytest.raises(ConfigurationError, match="either a concurrency or a rate"):
        analyzer.run("localhost:1", "mtgr", tmp_path / "x.json", 3)
    body = 'case "$1" in --version) echo Version 1 ;; *) printf "Error: too few\\nUsage: x"; exit 99 ;; esac'
    with pytest.raises(ConfigurationError, match="does not take its arguments: Error: too few"):
        Analyzer(script(tmp_path / "puzzled", body)).run("localhost:1", "mtgr", tmp_path / "x.json", 3, rate=9.0)


def test_a_perf_analyzer_that_does_not_end_is_ended(tmp_path: Path) -> None:
    analyzer = Analyzer(
        script(tmp_path / "stuck", 'case "$1" in --version) echo Version 1 ;; *) exec sleep 60 ;; esac')
    )
    with pytest.raises(StalledError, match="did not end within 1 s"):
        analyzer.run("localhost:1", "mtgr", tmp_path / "x.json", 3, concurrency=1, timeout=1.0)


# --- counts


def statistics(success: int, inferences: int, executions: int, batches: dict[str, int], queue_ms: int) -> object:
    nanoseconds = success * queue_ms * 1_000_000
    return {
        "inference_count": inferences,
        "execution_count": executions,
        "stages": {"success": [success, 2 * nanoseconds], "queue": [success, nanoseconds], "fail": [0, 0]},
        "batches": batches,
    }


def test_counts_are_differences() -> None:
    before = page({"mtgr": statistics(10, 10, 10, {"1": 10}, 7)})
    models = {
        "mtgr": statistics(30, 30, 30, {"1": 30}, 7),
        "mtgr_onnx_rank": statistics(6, 20, 6, {"2": 2, "4": 4}, 3),
        "mtgr_vllm": statistics(0, 0, 0, {}, 0),
    }
    found = model_counts(before, page(models))
    assert set(found) == {"mtgr", "mtgr_onnx_rank"}
    assert (found["mtgr"].requests, found["mtgr"].batch_sizes) == (20, {"1": 20})
    engine = found["mtgr_onnx_rank"]
    assert (engine.inferences, engine.executions, engine.batch_sizes) == (20, 6, {"2": 2, "4": 4})
    assert (engine.queue_ms, engine.total_ms, engine.compute_infer_ms) == (3.0, 6.0, 0.0)


def test_metrics_are_differences() -> None:
    before = page(
        mtgr_requests_total__strategy__onnx__arm__a=5,
        mtgr_stage_seconds_sum__stage__engine=1.0,
        mtgr_stage_seconds_count__stage__engine=10,
        mtgr_features_cache_hits_total=100,
        mtgr_features_cache_misses_total=100,
    )
    after = page(
        mtgr_requests_total__strategy__onnx__arm__a=8,
        mtgr_requests_total__strategy__onnx__arm__b=4,
        mtgr_requests_total__strategy__vllm__arm__b=1,
        mtgr_stage_seconds_sum__stage__engine=1.5,
        mtgr_stage_seconds_count__stage__engine=20,
        mtgr_stage_seconds_sum__stage__queue=0.0,
        mtgr_stage_seconds_count__stage__queue=0,
        mtgr_features_cache_hits_total=109,
        mtgr_features_cache_misses_total=101,
    )
    assert answered_by(before, after) == {"onnx": 7, "vllm": 1}
    assert stage_means(before, after) == {"engine": 50.0}
    assert cache_ratios(before, after) == CacheRatios(0.9, None)
    assert cache_ratios(after, after) == CacheRatios(None, None)


def test_gpu_samples() -> None:
    rows = [(0.0, 80.0, 100.0, 1000.0, 300.0), (0.0, 100.0, 200.0, 1000.0, 500.0), (1.0, 30.0, 50.0, 1000.0, 100.0)]
    found = gpu_usage(rows, seconds=2.0)
    assert found is not None
    assert found.utilization == 0.7
    assert (found.memory_used_bytes, found.memory_total_bytes) == (250 << 20, 2000 << 20)
    assert (found.power_watts, found.energy_joules) == (500.0, 1000.0)
    unpowered = gpu_usage([(*rows[0][:4], math.nan)], 1.0)
    assert unpowered is not None
    assert unpowered.power_watts is None
    assert gpu_usage([], 1.0) is None


def test_gpu_figures_of_triton() -> None:
    def at(energy: float, utilization: float) -> Page:
        return page(
            nv_gpu_utilization__gpu_uuid__a=utilization,
            nv_gpu_memory_used_bytes__gpu_uuid__a=10,
            nv_gpu_memory_total_bytes__gpu_uuid__a=40,
            nv_gpu_power_usage__gpu_uuid__a=200,
            nv_energy_consumption__gpu_uuid__a=energy,
        )

    found = triton_gpu(at(50, 0.5), at(90, 0.9))
    assert found is not None
    assert (found.utilization, found.energy_joules, found.power_watts) == (0.7, 40.0, 200.0)
    assert triton_gpu(page(), page()) is None


# --- conclusions


def counted(strategy: str, answers: int, engine: str, executions: int) -> Point:
    models = {
        "mtgr": ModelCounts(answers, answers, answers, 0, 0, 0, 0),
        engine: ModelCounts(executions, answers, executions, 0, 0, 0, 0),
    }
    return point(strategy, answers, models=models, answered_by={strategy: answers})


def test_counts_of_server_and_client_agree() -> None:
    good = counted("onnx", 40, "mtgr_onnx_rank", 10)
    assert mismatches(good) == []
    assert mean_batch(good) == 4.0
    short = replace(good.models["mtgr_onnx_rank"], inferences=39)
    assert mismatches(replace(good, models={**good.models, "mtgr_onnx_rank": short})) == [
        "onnx at concurrency 8, repeat 0: mtgr_onnx_rank counts 39, not 40"
    ]
    other = mismatches(replace(good, answered_by={"onnx": 39, "baseline": 1}))
    assert any("answers by onnx counts 39" in line for line in other)
    assert any("mtgr_baseline counts 0, not 1" in line for line in other)
    assert mismatches(replace(good, strategy="auto")) == []
    direct = replace(good, strategy=DIRECT, models={"mtgr_onnx_rank": ModelCounts(40, 40, 40, 0, 0, 0, 0)})
    assert mismatches(direct) == []
    assert mismatches(replace(direct, models={})) != []


def test_vllm_has_as_many_at_a_time_as_little_says() -> None:
    seen = point("vllm", throughput=100.0, answered_by={"vllm": 40}, stages_ms={"engine": 50.0})
    assert mean_batch(seen) == pytest.approx(5.0)


def test_saturation_is_the_best_level_of_medians() -> None:
    points = [
        point(level=level, throughput=rate, repeat=i) for level in (1.0, 8.0) for i, rate in enumerate((9, 10, 30))
    ]
    points += [
        point(level=32.0, throughput=12.0),
        point("vllm", throughput=99.0),
        point(mode="open_loop", throughput=99.0),
    ]
    assert saturation(points, "onnx") == 12.0
    assert saturation(points, "baseline") == 0.0


def test_table_and_verdicts() -> None:
    rates = {"baseline": 50.0, "onnx": 100.0, "auto": 80.0, DIRECT: 110.0}
    points = [point(name, level=8.0, throughput=rate, repeat=0) for name, rate in rates.items()]
    found = result(*points, kpi=None)
    assert len(table(found).splitlines()) == 5
    lines = verdicts(found)
    assert any(line.startswith("auto over onnx at 8 callers: 0.800") and line.endswith("MISSED") for line in lines)
    assert any("saturation of the door" in line and "0.909" in line and line.endswith("holds") for line in lines)


def test_everybody_goes_first_and_last() -> None:
    names = ["a", "b", "c"]
    orders = [_turns(names, repeat) for repeat in range(6)]
    assert {order[0] for order in orders} == {order[-1] for order in orders} == set(names)
    assert all(sorted(order) == names for order in orders)


def test_threads_of_a_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = thread_counts(Path(__file__).parents[2] / "export" / "templates")
    assert found["OMP_NUM_THREADS"] == 3
    assert found["mtgr_onnx_rank.intra_op_thread_count"] == 1
    assert found["mtgr_vllm.threads"] == 1
    assert found["mtgr_baseline.instances"] == 1
