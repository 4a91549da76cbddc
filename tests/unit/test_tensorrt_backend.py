"""The stand-in backend that serves plans, on a fake of TensorRT's runtime and of CUDA's."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.unit.fake_tensorrt import compile_cudart, fake_tensorrt, install


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    return install(fake_tensorrt(), monkeypatch)


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
    said: list[str] = []
    utils.Logger = types.SimpleNamespace(log_warn=said.append, said=said)
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


def test_a_captured_shape_is_launched_at_once(stand_in: Any, tmp_path: Path) -> None:
    plan = stand_in.tensorrt_plan.Plan(str(plan_file(tmp_path)))
    launched, recorded = [], stand_in.trt.contexts[1]  # of batches

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def on_launch(graph: int) -> None:
        launched.append(graph)
        recorded.shapes = dict(shapes)
        recorded.execute_async_v3(1)

    ctypes.c_void_p.in_dll(stand_in.library, "on_launch").value = ctypes.cast(on_launch, ctypes.c_void_p).value
    captured, other = rows(2, 4, 3, 1), rows(2, 8, 3, 2)
    shapes = {name: array.shape for name, array in captured.items()}
    plan.capture(shapes)
    live = stand_in.live.value
    stand_in.trt.runs = []
    for inputs in (captured, other, rows(1, 4, 3, 4)):
        np.testing.assert_array_equal(plan.run(inputs)["task_scores"], expected(inputs))
    assert (len(launched), len(stand_in.trt.runs)) == (1, 3)
    plan.capture(shapes)
    assert stand_in.live.value == live, "the graph before was given back"
    with pytest.raises(stand_in.tensorrt_plan.ShapeError, match="no profile of the plan serves"):
        plan.capture({"context": (9, 4, 4), "candidates": (9, 3, 4)})
    # What cannot be captured runs as before.
    ctypes.c_int.in_dll(stand_in.library, "no_graph").value = 1
    with pytest.raises(stand_in.tensorrt_plan.PlanError, match=r"cudaStreamEndCapture failed"):
        plan.capture({name: array.shape for name, array in other.items()})
    ctypes.c_int.in_dll(stand_in.library, "no_graph").value = 0
    np.testing.assert_array_equal(plan.run(other)["task_scores"], expected(other))
    assert len(launched) == 1
    plan.close()


def test_the_graphs_of_the_config_are_captured(stand_in: Any, tmp_path: Path) -> None:
    plan_file(tmp_path)
    model = stand_in.model.TritonPythonModel()
    specs = [
        {"batch_size": size, "input": {"context": {"dim": ["4", "4"]}, "candidates": {"dim": ["3", "4"]}}}
        for size in (1, 2, 7)
    ]
    model.initialize(arguments(tmp_path, optimization={"cuda": {"graphs": True, "graph_spec": specs}}))
    assert {dict(key)["context"] for key in model._plan._graphs} == {(1, 4, 4), (2, 4, 4)}
    (said,) = stand_in.utils.Logger.said
    assert said.startswith(
        "mtgr_tensorrt_rank has no CUDA graph at {'context': (7, 4, 4), 'candidates': (7, 3, 4)}: no"
    )
    model.finalize()
    other = stand_in.model.TritonPythonModel()
    other.initialize(arguments(tmp_path, optimization={"cuda": {"graphs": False, "graph_spec": specs}}))
    assert not other._plan._graphs
    other.finalize()


def test_a_plan_of_one_shape_needs_no_profile(stand_in: Any, tmp_path: Path) -> None:
    plan = stand_in.tensorrt_plan.Plan(str(plan_file(tmp_path, dims={"context": [2, 4, 4], "candidates": [2, 3, 4]})))
    inputs = rows(2, 4, 3, 1)
    np.testing.assert_array_equal(plan.run(inputs)["task_scores"], expected(inputs))
    with pytest.raises(stand_in.tensorrt_plan.ShapeError, match=r"allowed are context \[2, 4, 4\] to \[2, 4, 4\]"):
        plan.run(rows(1, 4, 3, 1))
    plan.close()
