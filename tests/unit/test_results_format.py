"""Results of performance runs: written and read back whole, and refused by name of what is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtgr.errors import ConfigurationError
from perf.results_format import (
    INLINE_SAMPLES,
    CacheRatios,
    Gpu,
    Kpi,
    Latency,
    Machine,
    ModelCounts,
    PerfResult,
    Point,
    Run,
    Spread,
    WorkloadSummary,
    load,
    save,
)


def point(strategy: str = "onnx", samples: int = 40, repeat: int = 0, **values: Any) -> Point:
    latencies = np.random.default_rng(repeat).lognormal(2, 0.4, samples).round(3).tolist()
    given = {
        "strategy": strategy,
        "mode": "concurrency",
        "level": 8.0,
        "repeat": repeat,
        "tool": "perf_analyzer",
        "command": ["perf_analyzer", "-m", "mtgr"],
        "seconds": 2.0,
        "requests": samples,
        "errors": {},
        "offered_rate": None,
        "throughput": samples / 2,
        "latency_ms": Latency.of(latencies),
        "latency_samples_ms": latencies,
        "answered_by": {strategy: samples},
        "models": {"mtgr": ModelCounts(samples, samples, samples // 2, 0.1, 0.2, 0.3, 0.4, {"2": samples // 2})},
        "stages_ms": {"engine": 3.25},
        "cache": CacheRatios(0.9),
        "gpu": None,
        "server_memory_bytes": 1 << 30,
        "cpu_seconds": 1.5,
    }
    return Point(**(given | values))


def result(*points: Point, **values: Any) -> PerfResult:
    run = Run("r", "2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z", ["make", "perf"], 0, "abc", False, 1, "tiny", "def")
    spread = Spread.of([1, 2, 3])
    return PerfResult(
        **{
            "run": run,
            "machine": Machine("cpu", 2, 1 << 34, None, None, 0.5),
            "versions": {"python": "3.11"},
            "threads": {"OMP_NUM_THREADS": 1},
            "workload": WorkloadSummary(3, 1.0, 10, 10, spread, spread, 0.1, 0.5, 0.0, 0.5),
            "points": list(points or (point(), point("auto", repeat=1))),
            "kpi": Kpi(10.0, 20.0, 0),
        }
        | values
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    gpu = Gpu(0.9, 1, 2, 300.0, None)
    written = result(point(gpu=gpu, errors={"UNAVAILABLE": 2}), point("direct_onnx", client_lag_ms=1.0))
    path = save(written, tmp_path / "deep" / "run.json")
    assert load(path) == written
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]
    assert len(path.read_text(encoding="utf-8").splitlines()[-5:]) == 5
    assert json.loads(path.read_text(encoding="utf-8"))["points"][1]["strategy"] == "direct_onnx"


def test_many_samples_go_into_a_file_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = result(point(samples=30), point(samples=INLINE_SAMPLES + 1, repeat=1))
    path = save(written, tmp_path / "run.json")
    assert load(path) == written
    sidecar = tmp_path / "run.samples.json.gz"
    assert path.stat().st_size < 10_000
    first = sidecar.read_bytes()
    monkeypatch.setattr("time.time", lambda: 1e9)
    save(written, path)
    assert sidecar.read_bytes() == first, "equal results must be equal files"
    sidecar.write_bytes(first[:50])
    with pytest.raises(ConfigurationError, match=r"run\.samples\.json\.gz cannot be read"):
        load(path)
    sidecar.unlink()
    with pytest.raises(ConfigurationError, match=r"run\.samples\.json\.gz.*missing; keep the two together"):
        load(path)


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (("schema",), "mtgr-perf/0", "has schema 'mtgr-perf/0'"),
        (("run", "seed"), "one", r'run\.seed must be a whole number, not "one"'),
        (("run", "git_dirty"), 1, r"run\.git_dirty must be true or false"),
        (("run", "seed"), True, r"run\.seed must be a whole number"),
        (("points", 1, "throughput"), None, r"points\[1\]\.throughput must be a number"),
        (("points", 0, "mode"), "burst", "mode is 'burst'; it must be one of concurrency"),
        (("points", 0, "models", "mtgr", "batch_sizes", "2"), 0.5, r"models\.mtgr\.batch_sizes\.2 must be a whole"),
        (("points", 0, "latency_samples_ms"), {}, "KeyError"),
        (("points",), {}, "points must be a list|AttributeError"),
        (("kpi", "point"), 2, r"kpi\.point is 2, but there are 2 points"),
        (("machine", "colour"), "red", r"machine\.colour is not a field"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, place: tuple[str | int, ...], value: Any, sentence: str) -> None:
    path = save(result(), tmp_path / "run.json")
    whole = json.loads(path.read_text(encoding="utf-8"))
    inner = whole
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=sentence):
        load(path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = save(result(), tmp_path / "run.json")
    whole = json.loads(path.read_text(encoding="utf-8"))
    del whole["points"][1]["cpu_seconds"]
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"points\[1\]\.cpu_seconds is missing"):
        load(path)
    with pytest.raises(ConfigurationError, match=r"nothing\.json does not exist"):
        load(tmp_path / "nothing.json")


def test_repeats_of_a_point() -> None:
    points = [point(), point("auto"), point(repeat=1), point(level=1.0)]
    assert result(*points).of("onnx", "concurrency", 8.0) == [points[0], points[2]]


def test_latency_of_known_samples() -> None:
    found = Latency.of(range(101))
    assert dataclasses.astuple(found) == (50.0, 90.0, 95.0, 99.0, 50.0, 100.0)
    assert Latency.of([]).max == 0.0
    assert point(errors={"UNAVAILABLE": 10}).error_share == 0.25
