"""The door that does nothing, beside the real one and the engine alone."""

from __future__ import annotations

import json
from pathlib import Path

from perf.bare_door import WAYS, main


def test_three_ways_to_one_engine_are_measured(model_repository: Path, tmp_path: Path) -> None:
    arguments = ["--model-repository", str(model_repository), "--out", str(tmp_path)]
    assert main([*arguments, "--concurrency", "1,4", "--requests", "200", "--repeats", "1"]) == 0
    points = json.loads((tmp_path / "bare-door.json").read_text())["points"]
    assert [(point["concurrency"], point["way"]) for point in points] == [(n, way) for n in (1, 4) for way in WAYS]
    assert all(len(point["milliseconds"]) == 200 for point in points)
    busy = {way: {name for point in points if point["way"] == way for name in point["processor_ms"]} for way in WAYS}
    assert busy["bare"] >= {"bare_features", "bare_router", "mtgr_onnx_rank", "tritonserver"}
    assert busy["door"] >= {"mtgr_features", "mtgr_router", "mtgr_onnx_rank"}
    # Nothing computes a request but the engine.
    assert "bare_router" not in busy["direct"]
