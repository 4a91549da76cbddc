"""How plans are built: what is written, and one sentence for each failure.

TensorRT and CUDA are not on this machine: fakes stand at the import (tests/unit/fake_tensorrt.py).
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from export import tensorrt_device, tensorrt_host, tensorrt_log
from export.tensorrt import build_tensorrt_engine
from export.tensorrt_files import check_plan, manifest_path
from export.tensorrt_host import tensorrt_problem
from export.tensorrt_options import BuildOptions
from mtgr.errors import ConfigurationError
from mtgr.manifest import Manifest
from tests.unit.fake_tensorrt import Layer, failed_build, fake_tensorrt, install, write_graph


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    return install(fake_tensorrt(), monkeypatch)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path)


def test_a_build_writes_plan_manifest_and_log(trt: Any, graph: Path, tmp_path: Path) -> None:
    plan = tmp_path / "mtgr_tensorrt_rank" / "1" / "model.plan"
    made = build_tensorrt_engine(graph, plan, options=BuildOptions(max_context=700, workspace_gib=2.0))
    assert plan.read_bytes() == b"plan"
    assert sorted(path.name for path in plan.parent.iterdir()) == ["manifest.json", "model.log", "model.plan"]
    assert "INFO: [MemUsageChange] something" in plan.with_suffix(".log").read_text()
    read = Manifest.load(plan.parent)
    assert (read.model, read.checkpoint, read.precision) == ("mtgr_tensorrt_rank", "c" * 64, "fp16")
    assert read.versions == {"opset": "20", "tensorrt": "11.4.0"}
    assert read.shapes["context"] == ["int32", -1, -1, 12]
    assert read.details["gpu_variant"] == "sm90"
    assert read.details["operations"] == ["rank"]
    assert read.details["profiles"][1]["candidates"] == [[2, 16, 12], [8, 256, 12], [32, 1024, 12]]
    assert read.details["plan_sha256"] == made.details["plan_sha256"]
    check_plan(plan, read)
    plan.write_bytes(b"another")
    with pytest.raises(ConfigurationError, match="is not the plan that its manifest describes; export it again"):
        check_plan(plan, read)

    config = trt.shared.config
    assert trt.shared.network_flags == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert config.limits == {"WORKSPACE": 2 << 30}
    assert (config.set, config.cleared) == (set(), {"TF32"})
    assert [shapes["context"][2] for shapes in config.profiles] == [(1, 1024, 12), (32, 1024, 12)]
    assert config.builder_optimization_level == 3
    assert config.tactics is None


def test_options_reach_the_builder(trt: Any, graph: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timings" / "gpu.cache"
    options = BuildOptions(tf32=True, version_compatible=True, hardware="ampere_plus", timing_cache=cache)
    build_tensorrt_engine(graph, tmp_path / "a.plan", options=options)
    config = trt.shared.config
    assert (config.set, config.cleared) == ({"TF32", "VERSION_COMPATIBLE"}, set())
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert cache.read_bytes() == b"+timings"
    build_tensorrt_engine(graph, tmp_path / "a.plan", options=options)
    assert cache.read_bytes() == b"+timings+timings"
    trt.shared.cache_refused = True  # of another GPU
    build_tensorrt_engine(graph, tmp_path / "a.plan", options=options)
    assert cache.read_bytes() == b"+timings"
    assert manifest_path(tmp_path / "a.plan").name == "a.manifest.json"
    assert manifest_path(tmp_path / "a.plan").is_file()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"optimization_level": 6}, "it must be 0 to 5"),
        ({"workspace_gib": 0}, "it must be positive"),
        ({"hardware": "all"}, "it must be one of ampere_plus, same_compute_capability"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        BuildOptions(**options)


def test_no_tensorrt(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "TensorRT cannot be imported" in failed_build(graph, tmp_path)
    assert "install tensorrt 10 or 11" in str(tensorrt_problem())


def test_no_gpu(trt: Any, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_host, "first_gpu", lambda: None)
    assert "there is no NVIDIA GPU on this host" in failed_build(graph, tmp_path)
    assert "there is no NVIDIA GPU" in str(tensorrt_problem())


def test_this_host_can(trt: Any) -> None:
    assert tensorrt_problem() is None


@pytest.mark.parametrize("version", ["7.2.1", "8.5.3", "9.3.0", "12.0.0", "unknown"])
def test_another_version(trt: Any, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(trt, "__version__", version)
    assert f"TensorRT {version} is installed; plans are built with 10, 11 or 8.6" in failed_build(graph, tmp_path)


@pytest.mark.parametrize(
    "text",
    ["No importer registered for op: Attention. Attempting to import as plugin.", "Unsupported operator Attention"],
)
def test_an_unsupported_operator_is_named(trt: Any, graph: Path, tmp_path: Path, text: str) -> None:
    trt.shared.parse_errors = ["In node 3", text]
    assert "TensorRT has no operator Attention, which" in failed_build(graph, tmp_path)


def test_a_graph_that_does_not_parse(trt: Any, graph: Path, tmp_path: Path) -> None:
    trt.shared.parse_errors = ["Range: only\n static inputs."]
    assert "cannot parse" in (text := failed_build(graph, tmp_path))
    assert "Range: only static inputs; export" in text


@pytest.mark.parametrize("raises", [None, MemoryError(), RuntimeError("CUDA out of memory")])
def test_out_of_memory(trt: Any, graph: Path, tmp_path: Path, raises: Exception | None) -> None:
    trt.shared.plan, trt.shared.raises = None, raises
    trt.shared.build_errors = ["[virtualMemoryBuffer.cpp] OutOfMemory (no further information)"]
    assert "memory ran out while TensorRT built" in failed_build(graph, tmp_path, max_batch=16)
    assert "OutOfMemory" in (tmp_path / "out" / "model.log").read_text()  # kept of a build that fails


def test_a_build_that_fails_for_another_reason(trt: Any, graph: Path, tmp_path: Path) -> None:
    trt.shared.plan, trt.shared.build_errors = None, ["Could not find any implementation for node X.", "second"]
    assert "Could not find any implementation for node X; its log has the rest." in failed_build(graph, tmp_path)


def test_a_bindings_factory_without_a_result(trt: Any, graph: Path, tmp_path: Path) -> None:
    trt.shared.raises = TypeError("pybind11::init(): factory function returned nullptr")
    assert "factory function returned nullptr" in failed_build(graph, tmp_path)


def test_a_graph_of_another_precision(trt: Any, graph: Path, tmp_path: Path) -> None:
    assert "is a graph in fp16, not in bf16; export it with `--precision bf16`" in failed_build(graph, tmp_path, "bf16")
    trt.shared.layers.append(Layer(trt.LayerType.QUANTIZE))
    assert "is a graph in int8, not in fp16" in failed_build(graph, tmp_path)
    assert "precision is fp8; it must be one of fp32, fp16, bf16, int8" in failed_build(graph, tmp_path, "fp8")


def test_no_graph(trt: Any, tmp_path: Path) -> None:
    assert "there is no graph at" in failed_build(tmp_path / "nothing.onnx", tmp_path)


def test_a_disk_that_fills_up_leaves_the_plan_before(
    trt: Any, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        build_tensorrt_engine(graph, plan)
    assert plan.read_bytes() == b"before"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".model.plan")]


def test_progress_is_shown_and_ctrl_c_ends_a_build(
    trt: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorrt_log, "_BAR_EVERY_S", 0.0)
    monitor = tensorrt_log.progress_monitor(trt)
    monitor.phase_start("Building", None, 4)
    monitor.phase_start("inner", "Building", 9)
    assert monitor.step_complete("inner", 5)
    assert monitor.step_complete("Building", 2)
    assert capsys.readouterr().err == "  TensorRT: Building, 2 of 4\n"

    def interrupt() -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorrt_log.time, "monotonic", interrupt)
    assert not monitor.step_complete("Building", 3)


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_device, "load_driver", lambda: None)
    assert tensorrt_device.first_gpu() is None
    monkeypatch.setattr(tensorrt_device, "load_driver", lambda: types.SimpleNamespace(cuInit=lambda flags: 100))
    assert tensorrt_device.first_gpu() is None
