"""Plans: profiles from buckets, what is written, one sentence for each failure, configs, and the stand-in that serves.

TensorRT and CUDA are not on this machine: fakes stand at the import (tests/unit/fake_tensorrt.py).
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import string
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from export import tensorrt as builds
from export import tensorrt_device
from export.install import TEMPLATES, add_variant, keep_variants, template_hash
from export.tensorrt import BuildOptions, build_tensorrt_engine, check_plan, manifest_path, tensorrt_problem
from export.tensorrt_device import Gpu
from export.tensorrt_profiles import MAX_BATCH, MIN_LONGEST, bucket_profiles
from mtgr.errors import ConfigurationError
from mtgr.manifest import Manifest
from mtgr.routing.buckets import CANDIDATE_BUCKETS, CONTEXT_BUCKETS, bucket
from tests.conftest import ROOT
from tests.unit.fake_tensorrt import Layer, compile_cudart, fake_tensorrt

RANK = {"context": (-1, -1, 12), "candidates": (-1, -1, 12)}
MODELS = ("mtgr_tensorrt_rank", "mtgr_tensorrt_retrieve")
H200 = Gpu("NVIDIA H200", (9, 0))


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(builds, "first_gpu", lambda: H200)
    return module


@pytest.fixture
def legacy(trt: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake_tensorrt("8.6.0")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Stands for an exported graph with its manifest; the fake parser does not read it."""
    path = tmp_path / "mtgr_onnx_rank" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"graph")
    Manifest("mtgr_onnx_rank", "c" * 64, "s" * 64, "fp16", {"opset": "20"}, {}, {}, {"operations": ["rank"]}).save(
        path.parent
    )
    return path


def in_profile(profile: Any, shapes: dict[str, tuple[int, ...]]) -> bool:
    return all(
        all(low <= size <= high for low, size, high in zip(entry[0], shapes[name], entry[2], strict=True))
        for name, entry in profile.shapes.items()
    )


@pytest.mark.parametrize("max_context", [20, 512, 1003, 2048, 5000])
def test_every_padded_shape_has_exactly_one_profile(max_context: int) -> None:
    profiles = bucket_profiles(RANK, max_context)
    longest = bucket(max_context, CONTEXT_BUCKETS)
    contexts = [size for size in CONTEXT_BUCKETS if size <= longest] + [longest]
    for batch in range(1, MAX_BATCH + 1):
        for context in contexts:
            for candidates in CANDIDATE_BUCKETS:
                shapes = {"context": (batch, context, 12), "candidates": (batch, candidates, 12)}
                assert [in_profile(profile, shapes) for profile in profiles] == [batch == 1, batch > 1]
    for profile in profiles:
        for name, (low, best, high) in profile.shapes.items():
            assert in_profile(profile, {**{key: value[0] for key, value in profile.shapes.items()}, name: best})
            assert low <= best <= high
    assert not in_profile(profiles[1], {"context": (33, 64, 12), "candidates": (33, 16, 12)})


def test_fixed_axes_stay_fixed() -> None:
    one = bucket_profiles({"context": (-1, 512, 12), "candidates": (-1, 64, 12)}, 2048)
    assert [profile.shapes["context"] for profile in one] == [
        ((1, 512, 12), (1, 512, 12), (1, 512, 12)),
        ((2, 512, 12), (8, 512, 12), (32, 512, 12)),
    ]
    assert bucket_profiles({"context": (1, 512, 12)}, 2048) == ()
    lengths = bucket_profiles({"context": (4, -1, 12)}, 64)  # a fixed batch: one profile
    assert [profile.shapes["context"] for profile in lengths] == [((4, 64, 12), (4, 512, 12), (4, MIN_LONGEST, 12))]
    assert len(bucket_profiles(RANK, 512, max_batch=1)) == 1
    assert bucket_profiles(RANK, 512, max_batch=4)[1].shapes["context"][1][0] == 4


@pytest.mark.parametrize("inputs", [{"tokens": (-1, -1, 12)}, {"context": (-1, 12)}, {"context": (-1, -1, -1)}])
def test_other_graphs_are_refused(inputs: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="is not rows of tokens; export it with"):
        bucket_profiles(inputs, 512)


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


def fail(graph: Path, tmp_path: Path, precision: Any = "fp16", **options: Any) -> str:
    """The one sentence of a build that fails; what was there before must be there still."""
    plan = tmp_path / "out" / "model.plan"
    plan.parent.mkdir(exist_ok=True)
    plan.write_bytes(b"before")
    with pytest.raises(ConfigurationError) as caught:
        build_tensorrt_engine(graph, plan, precision, BuildOptions(**options))
    assert plan.read_bytes() == b"before"
    assert {path.name for path in plan.parent.iterdir()} <= {"model.plan", "model.log"}
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_no_tensorrt(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "TensorRT cannot be imported" in fail(graph, tmp_path)
    assert "install tensorrt 10 or 11" in str(tensorrt_problem())


def test_no_gpu(trt: Any, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "first_gpu", lambda: None)
    assert "there is no NVIDIA GPU on this host" in fail(graph, tmp_path)
    assert "there is no NVIDIA GPU" in str(tensorrt_problem())


def test_this_host_can(trt: Any) -> None:
    assert tensorrt_problem() is None


@pytest.mark.parametrize("version", ["7.2.1", "8.5.3", "9.3.0", "12.0.0", "unknown"])
def test_another_version(trt: Any, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(trt, "__version__", version)
    assert f"TensorRT {version} is installed; plans are built with 10, 11 or 8.6" in fail(graph, tmp_path)


@pytest.mark.parametrize(
    "text",
    ["No importer registered for op: Attention. Attempting to import as plugin.", "Unsupported operator Attention"],
)
def test_an_unsupported_operator_is_named(trt: Any, graph: Path, tmp_path: Path, text: str) -> None:
    trt.shared.parse_errors = ["In node 3", text]
    assert "TensorRT has no operator Attention, which" in fail(graph, tmp_path)


def test_a_graph_that_does_not_parse(trt: Any, graph: Path, tmp_path: Path) -> None:
    trt.shared.parse_errors = ["Range: only\n static inputs."]
    assert "cannot parse" in (text := fail(graph, tmp_path))
    assert "Range: only static inputs; export" in text


@pytest.mark.parametrize("raises", [None, MemoryError(), RuntimeError("CUDA out of memory")])
def test_out_of_memory(trt: Any, graph: Path, tmp_path: Path, raises: Exception | None) -> None:
    trt.shared.plan, trt.shared.raises = None, raises
    trt.shared.build_errors = ["[virtualMemoryBuffer.cpp] OutOfMemory (no further information)"]
    assert "memory ran out while TensorRT built" in fail(graph, tmp_path, max_batch=16)
    assert "OutOfMemory" in (tmp_path / "out" / "model.log").read_text()  # kept of a build that fails


def test_a_build_that_fails_for_another_reason(trt: Any, graph: Path, tmp_path: Path) -> None:
    trt.shared.plan, trt.shared.build_errors = None, ["Could not find any implementation for node X.", "second"]
    assert "Could not find any implementation for node X; its log has the rest." in fail(graph, tmp_path)


def test_a_bindings_factory_without_a_result(trt: Any, graph: Path, tmp_path: Path) -> None:
    trt.shared.raises = TypeError("pybind11::init(): factory function returned nullptr")
    assert "factory function returned nullptr" in fail(graph, tmp_path)


def test_a_graph_of_another_precision(trt: Any, graph: Path, tmp_path: Path) -> None:
    assert "is a graph in fp16, not in bf16; export it with `--precision bf16`" in fail(graph, tmp_path, "bf16")
    trt.shared.layers.append(Layer(trt.LayerType.QUANTIZE))
    assert "is a graph in int8, not in fp16" in fail(graph, tmp_path)
    assert "precision is fp8; it must be one of fp32, fp16, bf16, int8" in fail(graph, tmp_path, "fp8")


def test_no_graph(trt: Any, tmp_path: Path) -> None:
    assert "there is no graph at" in fail(tmp_path / "nothing.onnx", tmp_path)


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


def test_8_6_is_weakly_typed_and_keeps_fp32_parts(legacy: Any, graph: Path, tmp_path: Path) -> None:
    build_tensorrt_engine(graph, tmp_path / "model.plan", options=BuildOptions(blas=False))
    shared = legacy.shared
    assert shared.network_flags == 1 << int(legacy.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    assert shared.config.set == {"FP16", "OBEY_PRECISION_CONSTRAINTS"}
    assert shared.config.tactics == 1 << 1 | 1 << 2  # neither cuBLAS nor cuDNN
    time, product = shared.layers
    assert (time.precision, time.types) == (legacy.float32, {0: legacy.float32})
    assert (product.precision, product.types) == (None, {})


def test_8_6_int8_and_what_it_lacks(legacy: Any, graph: Path, tmp_path: Path) -> None:
    assert "has no bf16" in fail(graph, tmp_path, "bf16")
    assert "knows no same_compute_capability" in fail(graph, tmp_path, hardware="same_compute_capability")
    legacy.shared.layers.append(Layer(legacy.LayerType.QUANTIZE))
    build_tensorrt_engine(graph, tmp_path / "model.plan", "int8")
    assert legacy.shared.config.set == {"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"}
    assert legacy.shared.layers[0].precision is None


def test_progress_is_shown_and_ctrl_c_ends_a_build(
    trt: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builds, "_BAR_EVERY_S", 0.0)
    monitor = builds._progress(trt)
    monitor.phase_start("Building", None, 4)
    monitor.phase_start("inner", "Building", 9)
    assert monitor.step_complete("inner", 5)
    assert monitor.step_complete("Building", 2)
    assert capsys.readouterr().err == "  TensorRT: Building, 2 of 4\n"

    def interrupt() -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(builds.time, "monotonic", interrupt)
    assert not monitor.step_complete("Building", 3)


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_device, "load_driver", lambda: None)
    assert tensorrt_device.first_gpu() is None
    monkeypatch.setattr(tensorrt_device, "load_driver", lambda: types.SimpleNamespace(cuInit=lambda flags: 100))
    assert tensorrt_device.first_gpu() is None


def config(name: str) -> Any:
    text = (TEMPLATES / name / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(string.Template(text).substitute(width=12, tasks=3, retrieved=100), pb.ModelConfig())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_context", [20, 1000, 2048])
def test_configs_fit_the_plans(name: str, max_context: int) -> None:
    model = config(name)
    assert (model.backend, model.default_model_filename) == ("tensorrt", "model.plan")
    assert model.max_batch_size == MAX_BATCH
    inputs = {entry.name: (-1, *entry.dims) for entry in model.input}
    profiles = bucket_profiles(inputs, max_context)
    (group,) = model.instance_group
    assert group.kind == pb.ModelInstanceGroup.KIND_GPU
    assert [int(index) for index in group.profile] == list(range(len(profiles)))
    cuda = model.optimization.cuda
    assert cuda.graphs
    specs = [{key: (spec.batch_size, *value.dim) for key, value in spec.input.items()} for spec in cuda.graph_spec]
    samples = [
        {key: (sample.batch_size, *value.dims) for key, value in sample.inputs.items()} for sample in model.model_warmup
    ]
    assert len(specs) == len({json.dumps(spec, sort_keys=True) for spec in specs}) >= 8
    for shapes in (*specs, *samples):
        assert set(shapes) == set(inputs)
        assert sum(in_profile(profile, shapes) for profile in profiles) == 1
        assert shapes["context"][1] in CONTEXT_BUCKETS
    assert {spec["context"][0] for spec in specs} == {1, 8}
    assert {sample["context"][0] == 1 for sample in samples} == {True, False}  # both profiles are warm


@pytest.mark.parametrize("name", MODELS)
def test_variants_by_gpu(name: str, tmp_path: Path) -> None:
    def staged(folder: Path) -> Path:
        version = folder / name / "1"
        version.mkdir(parents=True)
        (version / "model.plan").write_bytes(folder.name.encode())
        text = (TEMPLATES / name / "config.pbtxt").read_text(encoding="utf-8")
        text = string.Template(text).substitute(width=12, tasks=3, retrieved=100)
        (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")
        return version

    first = staged(tmp_path / "first")
    add_variant(first, "model.plan", "sm80")
    second = staged(tmp_path / "second")
    add_variant(second, "model.plan", "sm90")
    keep_variants(second, "model.plan", first.parent, ["sm80", "sm90"])
    for variant, content in (("sm80", b"first"), ("sm90", b"second")):
        text = (second.parent / "configs" / f"{variant}.pbtxt").read_text(encoding="utf-8")
        chosen = text_format.Parse(text, pb.ModelConfig())
        assert (second / chosen.default_model_filename).read_bytes() == content
        chosen.default_model_filename = "model.plan"
        assert chosen == config(name)
    assert template_hash(name)


# ---------------------------------------------------------------- the stand-in backend


class Response:
    def __init__(self, output_tensors: Any = (), error: Any = None) -> None:
        self.tensors = {tensor.name: tensor.array for tensor in output_tensors}
        self.error = error


class TritonTensor:
    def __init__(self, name: str, array: Any) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> Any:
        return self.array


class TritonError(Exception):
    INVALID_ARG, INTERNAL, CANCELLED = "INVALID_ARG", "INTERNAL", "CANCELLED"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Request:
    def __init__(self, cancelled: bool = False, wanted: tuple[str, ...] = ("task_scores",), **inputs: Any) -> None:
        self.inputs = inputs
        self.cancelled = cancelled
        self.wanted = wanted

    def is_cancelled(self) -> bool:
        return self.cancelled

    def requested_output_names(self) -> tuple[str, ...]:
        return self.wanted


PROFILES = [
    {"context": [[1, 2, 4], [1, 4, 4], [1, 8, 4]], "candidates": [[1, 1, 4], [1, 4, 4], [1, 4, 4]]},
    {"context": [[2, 2, 4], [4, 4, 4], [6, 8, 4]], "candidates": [[2, 1, 4], [4, 4, 4], [6, 4, 4]]},
]


@pytest.fixture(scope="module")
def cudart(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_cudart(tmp_path_factory.mktemp("cudart"))


@pytest.fixture
def stand_in(trt: Any, cudart: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """The backend's modules as the Python stub would import them, on the fakes."""
    utils: Any = types.ModuleType("triton_python_backend_utils")
    utils.TritonError, utils.InferenceResponse, utils.Tensor = TritonError, Response, TritonTensor
    utils.TritonModelException = type("TritonModelException", (Exception,), {})
    utils.triton_string_to_numpy = {"TYPE_INT32": np.int32, "TYPE_FP32": np.float32}.__getitem__
    utils.get_input_tensor_by_name = lambda request, name: (
        TritonTensor(name, request.inputs[name]) if name in request.inputs else None
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    found = {}
    for name in ("tensorrt_plan", "model"):
        spec = importlib.util.spec_from_file_location(name, ROOT / "backends" / "tensorrt" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        found[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, found[name])
        spec.loader.exec_module(found[name])
    library = ctypes.CDLL(cudart)
    monkeypatch.setattr(found["tensorrt_plan"], "_load_cudart", lambda path: library)
    live = ctypes.c_int.in_dll(library, "live")
    before = live.value
    yield types.SimpleNamespace(**found, trt=trt, utils=utils, library=library, live=live, before=before)
    ctypes.c_int.in_dll(library, "fail_after").value = -1
    assert live.value == before, "memory of the device was not given back"


def plan_file(folder: Path, **more: Any) -> Path:
    path = folder / "1" / "model.plan"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"profiles": PROFILES} | more), encoding="utf-8")
    return path


def arguments(folder: Path, kind: str = "GPU", **changes: Any) -> dict[str, str]:
    described = {
        "max_batch_size": 6,
        "input": [{"name": name, "data_type": "TYPE_INT32", "dims": ["-1", "4"]} for name in ("context", "candidates")],
        "output": [{"name": "task_scores", "data_type": "TYPE_FP32", "dims": ["-1", "1"]}],
        "instance_group": [{"profile": ["0", "1"]}],
    }
    return {
        "model_config": json.dumps(described | changes),
        "model_instance_kind": kind,
        "model_instance_device_id": "0",
        "model_name": "mtgr_tensorrt_rank",
        "model_repository": str(folder),
        "model_version": "1",
    }


def rows(batch: int, length: int, candidates: int, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {
        "context": generator.integers(1, 99, (batch, length, 4), dtype=np.int32),
        "candidates": generator.integers(1, 99, (batch, candidates, 4), dtype=np.int32),
    }


def expected(inputs: dict[str, Any]) -> Any:
    sums = inputs["context"].sum(axis=(1, 2))[:, None] + inputs["candidates"].sum(axis=2)
    return sums[..., None].astype(np.float32)


def test_requests_of_one_shape_share_an_execution(stand_in: Any, tmp_path: Path) -> None:
    plan_file(tmp_path)
    model = stand_in.model.TritonPythonModel()
    model.initialize(arguments(tmp_path))
    allocated = stand_in.live.value
    mixed = [rows(1, 4, 3, 1), rows(1, 8, 2, 2), rows(2, 4, 3, 3), rows(1, 4, 3, 4), rows(4, 4, 3, 5)]
    for _ in range(3):
        stand_in.trt.runs = []
        responses = model.execute([Request(**inputs) for inputs in mixed])
        for response, inputs in zip(responses, mixed, strict=True):
            np.testing.assert_array_equal(response.tensors["task_scores"], expected(inputs))
        runs = [(profile, shapes["context"][:2]) for profile, shapes in stand_in.trt.runs]
        assert runs == [(1, (4, 4)), (1, (4, 4)), (0, (1, 8))]  # at most 6 users in a batch
    assert stand_in.live.value == allocated, "buffers are allocated once"
    kept = responses[0].tensors["task_scores"]
    model.execute([Request(**rows(1, 4, 3, 9))])
    np.testing.assert_array_equal(kept, expected(mixed[0]))  # an answer is not overwritten by the next
    model.finalize()


def test_bad_requests_get_errors_of_their_own(stand_in: Any, tmp_path: Path) -> None:
    plan_file(tmp_path)
    model = stand_in.model.TritonPythonModel()
    model.initialize(arguments(tmp_path))
    good = rows(1, 4, 3, 1)
    odd = {"context": good["context"], "candidates": np.repeat(good["candidates"], 2, axis=0)}
    requests = [
        Request(context=good["context"]),
        Request(cancelled=True, **good),
        Request(**good),
        Request(**rows(1, 9, 3, 2)),
        Request(**odd),
        Request(**{name: array.astype(np.float64) for name, array in good.items()}, wanted=("task_scores",)),
    ]
    missing, cancelled, answer, long, uneven = model.execute(requests[:5])
    (doubles,) = model.execute(requests[5:])
    assert "context is float64; the plan takes int32" in str(doubles.error)
    np.testing.assert_array_equal(answer.tensors["task_scores"], expected(good))
    assert (missing.error.code, cancelled.error.code) == ("INVALID_ARG", "CANCELLED")
    assert "input 'candidates' is missing" in str(missing.error)
    assert long.error.code == uneven.error.code == "INVALID_ARG"
    assert "no profile of the plan serves context [1, 9, 4]" in str(long.error)
    model.finalize()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "CPU"}, "needs a GPU"),
        ({"default_model_filename": "other.plan"}, "other.plan does not exist; export the model again"),
        ({"instance_group": [{"profile": ["2"]}]}, "has no profile"),
        ({"instance_group": [{"profile": ["a"]}]}, "they must be indices"),
        ({"instance_group": [{"profile": ["0"]}, {"profile": ["1"]}]}, "give one instance_group"),
        (
            {"input": [{"name": "tokens", "data_type": "TYPE_INT32", "dims": [-1, 4]}]},
            "'tokens' of config.pbtxt is not in",
        ),
        (
            {"input": [{"name": "context", "data_type": "TYPE_INT32", "dims": [-1, 4]}]},
            "'candidates' of the plan is not in",
        ),
        ({"output": [{"name": "task_scores", "data_type": "TYPE_FP32", "dims": [-1, 3]}]}, "has shape \\[-1, -1, 3\\]"),
        ({"output": [{"name": "task_scores", "data_type": "TYPE_INT32", "dims": [-1, 1]}]}, "but float32 in the plan"),
    ],
)
def test_what_does_not_fit_is_refused_at_load(
    stand_in: Any, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    plan_file(tmp_path)
    model = stand_in.model.TritonPythonModel()
    with pytest.raises(stand_in.utils.TritonModelException, match=sentence):
        model.initialize(arguments(tmp_path, **changes))
    if hasattr(model, "_plan"):
        model.finalize()


def test_a_plan_of_another_version_or_too_large_is_refused(stand_in: Any, tmp_path: Path) -> None:
    path = plan_file(tmp_path, too_large=True)
    with pytest.raises(stand_in.tensorrt_plan.PlanError, match="does not fit on the GPU"):
        stand_in.tensorrt_plan.Plan(str(path))
    path.write_bytes(b"of another version")
    with pytest.raises(stand_in.tensorrt_plan.PlanError, match="is of another GPU or version: export on this host"):
        stand_in.tensorrt_plan.Plan(str(path))


@pytest.mark.parametrize("calls", range(6))
def test_a_gpu_that_is_full_leaves_nothing_behind(stand_in: Any, tmp_path: Path, calls: int) -> None:
    path = plan_file(tmp_path)
    ctypes.c_int.in_dll(stand_in.library, "fail_after").value = calls
    with pytest.raises(stand_in.tensorrt_plan.PlanError, match=r"cudaMalloc\w* failed: out of memory \(2\)"):
        stand_in.tensorrt_plan.Plan(str(path))
