"""A module to be imported as ``tensorrt``, and a CUDA runtime that copies within the host's memory.

What a test builds is a "plan" of JSON; running it adds up each row of ``context`` and ``candidates``. The fakes hold
only what the import boundary holds: the code under test is the project's own.
"""

from __future__ import annotations

import base64
import ctypes
import json
import subprocess
import sys
import types
from collections.abc import Callable
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from export import tensorrt_host
from export.tensorrt import build_tensorrt_engine
from export.tensorrt_device import Gpu
from export.tensorrt_options import BuildOptions
from mtgr.errors import ConfigurationError
from mtgr.manifest import Manifest

H200 = Gpu("NVIDIA H200", (9, 0))

CUDART = """
#include <stdlib.h>
#include <string.h>
int fail_after = -1, live = 0, capturing = 0, no_graph = 0;
void (*on_launch)(void *);
static int ok(void) { return fail_after < 0 || fail_after-- > 0 ? 0 : 2; }
int cudaSetDevice(int d) { return d > 7; }
int cudaMalloc(void **p, size_t n) { if (ok()) return 2; *p = malloc(n); memset(*p, 0x7f, n); live++; return 0; }
int cudaMallocHost(void **p, size_t n) { return cudaMalloc(p, n); }
int cudaFree(void *p) { free(p); live--; return 0; }
int cudaFreeHost(void *p) { return cudaFree(p); }
int cudaMemcpyAsync(void *a, void *b, size_t n, int k, void *s) { memcpy(a, b, n); return s ? 0 : 1; }
int cudaStreamCreateWithFlags(void **s, unsigned f) { *s = malloc(1); live++; return f != 1; }
int cudaStreamDestroy(void *s) { return cudaFree(s); }
int cudaStreamSynchronize(void *s) { return s && !capturing ? 0 : 1; }
int cudaStreamBeginCapture(void *s, int mode) { capturing = s && mode == 1; return !capturing; }
int cudaStreamEndCapture(void *s, void **g) {
  capturing = 0; *g = no_graph ? 0 : malloc(1); live += !no_graph; return no_graph ? 901 : 0;
}
int cudaGraphInstantiateWithFlags(void **e, void *g, unsigned long long f) { *e = malloc(1); live++; return f || !g; }
int cudaGraphLaunch(void *e, void *s) { on_launch(e); return !s; }
int cudaGraphDestroy(void *g) { return cudaFree(g); }
int cudaGraphExecDestroy(void *e) { return cudaFree(e); }
char *cudaGetErrorString(int e) { return e == 2 ? "out of memory" : "invalid argument"; }
"""


def install(module: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make this a host with ``module`` as its TensorRT and with an H200."""
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(tensorrt_host, "first_gpu", lambda: H200)
    return module


def write_graph(folder: Path) -> Path:
    """What stands for an exported graph with its manifest; the fake parser does not read it."""
    path = folder / "mtgr_onnx_rank" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"graph")
    Manifest("mtgr_onnx_rank", "c" * 64, "s" * 64, "fp16", {"opset": "20"}, {}, {}, {"operations": ["rank"]}).save(
        path.parent
    )
    return path


def failed_build(graph: Path, tmp_path: Path, precision: Any = "fp16", **options: Any) -> str:
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


def in_profile(profile: Any, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a profile serves these shapes."""
    return all(
        all(low <= size <= high for low, size, high in zip(entry[0], shapes[name], entry[2], strict=True))
        for name, entry in profile.shapes.items()
    )


def compile_cudart(folder: Path) -> str:
    """Build the runtime above and give its path."""
    source, library = folder / "cudart.c", folder / "libcudart.so"
    source.write_text(CUDART, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    return str(library)


class Tensor:
    def __init__(self, name: str, dtype: Any, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape


class Layer:
    def __init__(self, kind: Any, *outputs: Tensor, inputs: tuple[Tensor, ...] = ()) -> None:
        self.type, self.outputs, self.inputs = kind, outputs, inputs
        self.num_outputs, self.num_inputs = len(outputs), len(inputs)
        self.precision: Any = None
        self.types: dict[int, Any] = {}
        self.name = ""
        self.to_type: Any = None
        self.weights: Any = None

    @property
    def precision_is_set(self) -> bool:
        return self.precision is not None

    def reset_precision(self) -> None:
        self.precision = None

    def reset_output_type(self, index: int) -> None:
        del self.types[index]

    def output_type_is_set(self, index: int) -> bool:
        return index in self.types

    def get_output_type(self, index: int) -> Any:
        return self.types[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def set_output_type(self, index: int, dtype: Any) -> None:
        self.types[index] = dtype


class CastLayer(Layer):
    """What the bindings make of a layer on demand."""


class ConstantLayer(Layer):
    """The same of a constant."""


class Shared:
    """What a test sets before a build and reads after it."""

    def __init__(self) -> None:
        self.parse_errors: list[str] = []
        self.build_errors: list[str] = []
        self.plan: bytes | None = b"plan"
        self.raises: Exception | None = None
        self.layers: list[Layer] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.network_flags: int | None = None
        self.config: Any = None
        self.cache_refused = False
        self.refuses: Callable[[Any], bool] = lambda config: False  # whether it finds no kernels


def fake_tensorrt(version: str = "11.4.0") -> Any:
    """The module; ``module.shared`` is what tests set and read."""
    trt = types.ModuleType("tensorrt")
    trt.__spec__ = ModuleSpec("tensorrt", None)  # PyTorch's exporter asks whether there is one
    shared = trt.shared = Shared()  # type: ignore[attr-defined]
    legacy = version.startswith("8")
    trt.__version__ = version  # type: ignore[attr-defined]

    class Severity(IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    flags = "TF32 VERSION_COMPATIBLE" + (
        " FP16 INT8 OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS" if legacy else ""
    )
    enums = {
        "BuilderFlag": flags,
        "NetworkDefinitionCreationFlag": "EXPLICIT_BATCH" if legacy else "OTHER STRONGLY_TYPED",
        "DataType": "FLOAT HALF INT8 INT32" + ("" if legacy else " BF16"),
        "HardwareCompatibilityLevel": "NONE AMPERE_PLUS" + ("" if legacy else " SAME_COMPUTE_CAPABILITY"),
        "LayerType": "QUANTIZE DEQUANTIZE CONSTANT SHAPE ACTIVATION CAST IDENTITY ELEMENTWISE GATHER MATRIX_MULTIPLY "
        "TOPK",
        "MemoryPoolType": "WORKSPACE",
        "ProfilingVerbosity": "DETAILED",
        "TensorIOMode": "NONE INPUT OUTPUT",
        "TacticSource": "CUBLAS CUBLAS_LT CUDNN EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS",
        "PreviewFeature": "FASTER_DYNAMIC_SHAPES_0805 DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805",
    }
    for name, members in enums.items():
        setattr(trt, name, IntEnum(name, members.split(), start=0))
    trt.ICastLayer, trt.IConstantLayer = CastLayer, ConstantLayer  # type: ignore[attr-defined]
    trt.float32, trt.float16 = trt.DataType.FLOAT, trt.DataType.HALF  # type: ignore[attr-defined]

    class ILogger:
        Severity_ = Severity

    class Logger:
        WARNING = Severity.WARNING

        def __init__(self, severity: Any) -> None: ...

    class IProgressMonitor: ...

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            assert all(low <= best <= high for low, best, high in zip(min, opt, max, strict=True))
            self.shapes[input] = (min, opt, max)

    class Cache:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def serialize(self) -> bytes:
            return self.data + b"+timings"

    class Config:
        def __init__(self) -> None:
            self.set, self.cleared, self.profiles = set(), set(), []
            self.limits: dict[Any, int] = {}
            self.tactics: int | None = None
            self.cache: Any = None
            self.previews: dict[str, bool] = {}

        def set_flag(self, flag: Any) -> None:
            self.set.add(flag.name)

        def get_flag(self, flag: Any) -> bool:
            return flag.name in self.set

        def clear_flag(self, flag: Any) -> None:
            self.set.discard(flag.name)
            self.cleared.add(flag.name)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            self.limits[pool.name] = size

        def set_preview_feature(self, feature: Any, enable: bool) -> None:
            self.previews[feature.name] = enable

        def set_tactic_sources(self, sources: int) -> None:
            self.tactics = sources

        def add_optimization_profile(self, profile: Any) -> None:
            self.profiles.append(profile.shapes)

        def create_timing_cache(self, data: bytes) -> Cache:
            return Cache(data)

        def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
            if shared.cache_refused and cache.data:
                return False
            self.cache = cache
            return True

        def get_timing_cache(self) -> Cache:
            return self.cache

    class Network:
        num_layers = property(lambda self: len(shared.layers))
        num_inputs = property(lambda self: len(shared.inputs))
        num_outputs = property(lambda self: len(shared.outputs))

        def get_layer(self, index: int) -> Layer:
            return shared.layers[index]

        def get_input(self, index: int) -> Tensor:
            return shared.inputs[index]

        def get_output(self, index: int) -> Tensor:
            return shared.outputs[index]

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> Network:
            shared.network_flags = flags
            return Network()

        def create_builder_config(self) -> Config:
            shared.config = Config()
            return shared.config

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            monitor = getattr(config, "progress_monitor", None)
            if monitor is not None:
                monitor.phase_start("Building Engine", None, 3)
                monitor.phase_start("inner", "Building Engine", 99)
                assert monitor.step_complete("inner", 1)
                assert monitor.step_complete("Building Engine", 1)
                monitor.phase_finish("Building Engine")
            self.logger.log(Severity.INFO, "[MemUsageChange] something")
            for text in shared.build_errors:
                self.logger.log(Severity.ERROR, text)
            if shared.raises is not None:
                raise shared.raises
            return None if shared.refuses(config) else shared.plan

    class Error:
        def __init__(self, text: str) -> None:
            self.text = text

        def desc(self) -> str:
            return self.text

    class OnnxParser:
        num_errors = property(lambda self: len(shared.parse_errors))

        def __init__(self, network: Any, logger: Any) -> None: ...

        def parse_from_file(self, model: str) -> bool:
            return not shared.parse_errors

        def get_error(self, index: int) -> Error:
            return Error(shared.parse_errors[index])

    class Context:
        def __init__(self, plan: dict[str, Any]) -> None:
            self.plan = plan
            trt.contexts = [*getattr(trt, "contexts", []), self]  # type: ignore[attr-defined]
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.addresses: dict[str, int] = {}

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            self.profile = index
            return bool(stream)

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            if "dims" in self.plan:
                low = high = self.plan["dims"][name]
            else:
                low, _, high = self.plan["profiles"][self.profile][name]
            if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                return False
            self.shapes[name] = tuple(shape)
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            if name in self.shapes:
                return self.shapes[name]
            return (*self.shapes["candidates"][:2], 1)

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self.addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            trt.runs = [*getattr(trt, "runs", []), (self.profile, dict(self.shapes))]  # type: ignore[attr-defined]

            def at(name: str, kind: Any) -> np.ndarray:
                shape = self.get_tensor_shape(name)
                memory = (kind * int(np.prod(shape))).from_address(self.addresses[name])
                return np.ctypeslib.as_array(memory).reshape(shape)

            sums = at("context", ctypes.c_int32).sum(axis=(1, 2))[:, None]
            at("task_scores", ctypes.c_float)[:] = (sums + at("candidates", ctypes.c_int32).sum(axis=2))[..., None]
            return True

    class Engine:
        def __init__(self, plan: dict[str, Any]) -> None:
            self.plan = plan
            self.num_optimization_profiles = len(plan["profiles"])
            self.names = ["context", "candidates", "task_scores"]
            self.num_io_tensors = len(self.names)

        def get_tensor_name(self, index: int) -> str:
            return self.names[index]

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.OUTPUT if name == "task_scores" else trt.TensorIOMode.INPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return trt.DataType.FLOAT if name == "task_scores" else trt.DataType.INT32

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(self.plan.get("dims", {}).get(name, (-1, -1, 1 if name == "task_scores" else 4)))

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
            assert "dims" not in self.plan
            return self.plan["profiles"][profile_index][name]

        def create_execution_context(self) -> Context | None:
            return None if self.plan.get("too_large") else Context(self.plan)

    class Runtime:
        def __init__(self, logger: Any) -> None: ...

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            return Engine(json.loads(data)) if data.startswith(b"{") else None

    def nptype(dtype: Any) -> Any:
        return {trt.DataType.FLOAT: np.float32, trt.DataType.INT32: np.int32}[dtype]

    for thing in (ILogger, Logger, IProgressMonitor, Builder, OnnxParser, Runtime, nptype):
        setattr(trt, thing.__name__, thing)
    shared.inputs = [
        Tensor("context", trt.DataType.INT32, (-1, -1, 12)),
        Tensor("candidates", trt.DataType.INT32, (-1, -1, 12)),
    ]
    shared.outputs = [Tensor("task_scores", trt.DataType.FLOAT, (-1, -1, 3))]
    floats = Tensor("time", trt.DataType.FLOAT, (-1,))
    halves = Tensor("x", trt.DataType.HALF, (-1,))
    shared.layers = [
        Layer(trt.LayerType.ELEMENTWISE, floats, inputs=(floats,)),
        Layer(trt.LayerType.MATRIX_MULTIPLY, halves, inputs=(halves,)),
    ]
    return trt


def running_tensorrt(version: str = "11.4.0") -> Any:
    """The module again, of which a "plan" holds the ONNX graph it was built from and runs it in ONNX Runtime."""
    trt = fake_tensorrt(version)
    builder, names = trt.Builder, {np.int32: trt.DataType.INT32, np.float32: trt.DataType.FLOAT}

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: Any, logger: Any) -> None: ...

        def parse_from_file(self, model: str) -> bool:
            trt.shared.graph = Path(model).read_bytes()
            graph = onnx.load(model).graph
            kinds = {1: trt.DataType.FLOAT, 6: trt.DataType.INT32}

            def tensors(values: Any) -> list[Tensor]:
                return [
                    Tensor(
                        value.name,
                        kinds[value.type.tensor_type.elem_type],
                        tuple(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim),
                    )
                    for value in values
                ]

            trt.shared.inputs, trt.shared.outputs = tensors(graph.input), tensors(graph.output)
            is_half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)
            kind = trt.DataType.HALF if is_half else trt.DataType.FLOAT
            trt.shared.layers = [Layer(trt.LayerType.MATRIX_MULTIPLY, Tensor("x", kind, (-1,)))]
            return True

    class Builder(builder):  # type: ignore[misc, valid-type]
        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            if super().build_serialized_network(network, config) is None:
                return None
            graph = base64.b64encode(trt.shared.graph).decode()
            return json.dumps({"profiles": config.profiles, "graph": graph}).encode()

    class Context:
        def __init__(self, engine: Any) -> None:
            self.engine = engine
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.addresses: dict[str, int] = {}

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.shapes[name] = tuple(shape)
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            if name in self.shapes:
                return self.shapes[name]
            dims = self.engine.get_tensor_shape(name)
            lengths = self.shapes.get("candidates", self.shapes["context"])
            return (lengths[0], *(lengths[1] if dim == -1 else dim for dim in dims[1:]))

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self.addresses[name] = memory
            return True

        def at(self, name: str) -> np.ndarray:
            kind = {trt.DataType.INT32: ctypes.c_int32, trt.DataType.FLOAT: ctypes.c_float}
            shape = self.get_tensor_shape(name)
            memory = (kind[self.engine.get_tensor_dtype(name)] * int(np.prod(shape))).from_address(self.addresses[name])
            return np.ctypeslib.as_array(memory).reshape(shape)

        def execute_async_v3(self, stream_handle: int) -> bool:
            answer = self.engine.session.run(None, {name: self.at(name) for name in self.shapes})
            for output, array in zip(self.engine.session.get_outputs(), answer, strict=True):
                self.at(output.name)[...] = array + trt.shared.off
            return True

    class Engine:
        def __init__(self, data: bytes) -> None:
            plan = json.loads(data)
            self.profiles = plan["profiles"]
            self.num_optimization_profiles = len(self.profiles)
            graph = base64.b64decode(plan["graph"])
            self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
            self.inputs = {node.name: node for node in self.session.get_inputs()}
            self.tensors = self.inputs | {node.name: node for node in self.session.get_outputs()}
            self.num_io_tensors = len(self.tensors)

        def get_tensor_name(self, index: int) -> str:
            return list(self.tensors)[index]

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if name in self.inputs else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return names[np.int32 if "int32" in self.tensors[name].type else np.float32]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
            return self.profiles[profile_index][name]

        def create_execution_context(self) -> Context:
            return Context(self)

    class Runtime:
        def __init__(self, logger: Any) -> None: ...

        def deserialize_cuda_engine(self, data: bytes) -> Engine:
            return Engine(data)

    for thing in (OnnxParser, Builder, Runtime):
        setattr(trt, thing.__name__, thing)
    trt.shared.off = 0
    return trt
