"""A TensorRT plan on one GPU: buffers that are allocated once, a stream of its own, one execution per batch.

Needs TensorRT's Python runtime (8.6, 10 or 11), NumPy, and libcudart; runs on Python 3.10.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import glob
import importlib
import os
import site
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = dict[str, "np.ndarray[Any, Any]"]
Shape = tuple[int, ...]

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_NON_BLOCKING = 1  # the stream does not wait for the default one
_THREAD_LOCAL = 1  # what other threads do meanwhile does not spoil a capture


class PlanError(Exception):
    """A plan cannot be loaded or run; its message is one sentence."""


class ShapeError(PlanError):
    """The plan does not take tensors of these names, types, or shapes: the caller's fault."""


class Cuda:
    """The few calls of the CUDA runtime that are needed.

    Args:
        library: Path of libcudart; by default what MTGR_CUDART names, else found by itself.

    Raises:
        PlanError: If there is none.
    """

    def __init__(self, library: str | None = None) -> None:
        self._library = _load_cudart(library)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the runtime.

        Raises:
            PlanError: If it fails, or this runtime has no such function.
        """
        function = getattr(self._library, name, None)
        if function is None:
            raise PlanError(f"this CUDA runtime has no {name}; install one of CUDA 12 or later.")
        status = function(*arguments)
        if status:
            self._library.cudaGetErrorString.restype = ctypes.c_char_p
            text = self._library.cudaGetErrorString(status) or b"unknown"
            raise PlanError(f"{name} failed: {text.decode()} ({status}).")

    def allocate(self, size: int, pinned: bool = False) -> int:
        """Address of ``size`` bytes of device memory, or of host memory that copies need not be staged for."""
        address = ctypes.c_void_p()
        self.call("cudaMallocHost" if pinned else "cudaMalloc", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return int(address.value or 0)

    def free(self, address: int, pinned: bool = False) -> None:
        """Give memory back."""
        self.call("cudaFreeHost" if pinned else "cudaFree", ctypes.c_void_p(address))

    def copy(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        """Copy ``size`` bytes in the order of ``stream``."""
        self.call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size),
            ctypes.c_int(kind),
            ctypes.c_void_p(stream),
        )


@dataclass
class _Buffer:
    """Memory of one tensor, large enough for every profile: on the device, and pinned on the host."""

    device: int
    host: int
    size: int
    dtype: np.dtype[Any]

    def array(self, shape: Shape) -> np.ndarray[Any, Any]:
        """The first elements of the host's side as an array."""
        memory = (ctypes.c_byte * self.size).from_address(self.host)
        return np.frombuffer(memory, self.dtype, int(np.prod(shape))).reshape(shape)


@dataclass
class _Graph:
    """A recorded execution of one profile at one shape of each input."""

    handle: ctypes.c_void_p
    outputs: dict[str, Shape]


class Plan:
    """A plan that is ready to run. Not for two threads at once.

    Args:
        path: The plan.
        device: Ordinal of the GPU.
        profiles: Optimization profiles to use; all by default.
        cuda: The CUDA runtime; found by itself by default.

    Attributes:
        inputs: Input name to NumPy dtype and dims, -1 for those that vary.
        outputs: The same of outputs.

    Raises:
        PlanError: If the plan is missing, of another GPU or TensorRT, or does not fit into memory.
    """

    def __init__(
        self, path: str, device: int = 0, profiles: Sequence[int] | None = None, cuda: Cuda | None = None
    ) -> None:
        self._trt = _load_tensorrt()
        self._cuda = cuda or Cuda()
        self._device = device
        self._buffers: dict[str, _Buffer] = {}
        self._contexts: dict[int, Any] = {}
        self._graphs: dict[frozenset[tuple[str, Shape]], _Graph] = {}
        self._stream = ctypes.c_void_p()
        self._cuda.call("cudaSetDevice", ctypes.c_int(device))
        self._engine = self._deserialize(path)
        try:
            self._cuda.call("cudaStreamCreateWithFlags", ctypes.byref(self._stream), ctypes.c_uint(_NON_BLOCKING))
            self._describe()
            known = range(self._engine.num_optimization_profiles)
            chosen = list(known) if profiles is None else list(profiles)
            unknown = [index for index in chosen if index not in known]
            if unknown or not chosen:
                raise PlanError(f"{path} has no profile {unknown[:1] or ''}; it has {len(known)}.")
            self._ranges = {index: self._range(index) for index in chosen}
            for index in chosen:
                self._contexts[index] = self._context(index)
            self._allocate()
        except BaseException:
            self.close()
            raise

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]], outputs: Sequence[str] | None = None) -> Arrays:
        """Run one batch.

        Args:
            inputs: An array per input, [B, ...], of the input's dtype.
            outputs: Names of the outputs to return; all by default.

        Returns:
            Arrays that own their memory, by name.

        Raises:
            ShapeError: If the plan does not take these tensors.
            PlanError: If the GPU fails.
        """
        shapes = {name: tuple(array.shape) for name, array in inputs.items()}
        context = self._contexts[self._profile(shapes)]
        self._cuda.call("cudaSetDevice", ctypes.c_int(self._device))
        stream = int(self._stream.value or 0)
        for name, array in inputs.items():
            dtype, _ = self.inputs[name]
            buffer = self._buffers[name]
            if array.dtype != dtype:
                raise ShapeError(f"{name} is {array.dtype}; the plan takes {dtype}.")
            buffer.array(shapes[name])[...] = array
            self._cuda.copy(buffer.device, buffer.host, array.size * dtype.itemsize, _HOST_TO_DEVICE, stream)
        graph = self._graphs.get(frozenset(shapes.items()))
        if graph is None:
            self._execute(context, shapes)
        else:
            self._cuda.call("cudaGraphLaunch", graph.handle, self._stream)
        wanted = list(self.outputs) if outputs is None else list(outputs)
        known = self._output_shapes(context) if graph is None else graph.outputs
        found = {name: known[name] for name in wanted}
        for name, shape in found.items():
            buffer = self._buffers[name]
            size = int(np.prod(shape)) * buffer.dtype.itemsize
            self._cuda.copy(buffer.host, buffer.device, size, _DEVICE_TO_HOST, stream)
        self._cuda.call("cudaStreamSynchronize", self._stream)
        return {name: self._buffers[name].array(shape).copy() for name, shape in found.items()}

    def capture(self, shapes: Mapping[str, Shape]) -> None:
        """Record the execution at these shapes as a CUDA graph: ``run`` then launches the whole of it at once.

        Args:
            shapes: Of each input, [B, ...].

        Raises:
            ShapeError: If the plan does not take them.
            PlanError: If the plan cannot be recorded; it runs at these shapes as before.
        """
        shapes = {name: tuple(shape) for name, shape in shapes.items()}
        context = self._contexts[self._profile(shapes)]
        self._cuda.call("cudaSetDevice", ctypes.c_int(self._device))
        self._execute(context, shapes)  # what TensorRT does at the first execution only must not be recorded
        self._cuda.call("cudaStreamSynchronize", self._stream)
        graph, handle = ctypes.c_void_p(), ctypes.c_void_p()
        self._cuda.call("cudaStreamBeginCapture", self._stream, ctypes.c_int(_THREAD_LOCAL))
        try:
            self._execute(context, shapes)
        finally:
            self._cuda.call("cudaStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            self._cuda.call("cudaGraphInstantiateWithFlags", ctypes.byref(handle), graph, ctypes.c_ulonglong(0))
        finally:
            self._cuda.call("cudaGraphDestroy", graph)
        self._forget(frozenset(shapes.items()))
        self._graphs[frozenset(shapes.items())] = _Graph(handle, self._output_shapes(context))

    def poison(self) -> None:
        """Fill the outputs with NaN and -1, so that a check cannot meet the answer before."""
        stream = int(self._stream.value or 0)
        for buffer in (self._buffers[name] for name in self.outputs):
            ctypes.memset(buffer.host, 0xFF, buffer.size)
            self._cuda.copy(buffer.device, buffer.host, buffer.size, _HOST_TO_DEVICE, stream)
        self._cuda.call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free graphs, contexts, buffers, stream, and engine, in this order."""
        for key in list(self._graphs):
            self._forget(key)
        self._contexts.clear()
        for buffer in self._buffers.values():
            self._cuda.free(buffer.device)
            if buffer.host:
                self._cuda.free(buffer.host, pinned=True)
        self._buffers.clear()
        if self._stream.value:
            self._cuda.call("cudaStreamDestroy", self._stream)
            self._stream = ctypes.c_void_p()
        self._engine = None

    def _execute(self, context: Any, shapes: Mapping[str, Shape]) -> None:
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise ShapeError(f"the plan refuses shape {list(shape)} of {name}.")
        if not context.execute_async_v3(int(self._stream.value or 0)):
            raise PlanError("TensorRT could not start the plan; its log has the reason.")

    def _output_shapes(self, context: Any) -> dict[str, Shape]:
        return {name: tuple(context.get_tensor_shape(name)) for name in self.outputs}

    def _forget(self, key: frozenset[tuple[str, Shape]]) -> None:
        graph = self._graphs.pop(key, None)
        if graph is not None:
            self._cuda.call("cudaGraphExecDestroy", graph.handle)

    def _deserialize(self, path: str) -> Any:
        trt = self._trt
        if not os.path.isfile(path):
            raise PlanError(f"{path} does not exist; export the model again.")
        self._log = trt.Logger(trt.Logger.WARNING)  # the runtime holds no reference to it
        self._runtime = trt.Runtime(self._log)
        with open(path, "rb") as file:
            engine = self._runtime.deserialize_cuda_engine(file.read())
        if engine is None:
            raise PlanError(
                f"TensorRT {trt.__version__} cannot load {path}; it is of another GPU or version: export on this host."
            )
        return engine

    def _describe(self) -> None:
        trt, engine = self._trt, self._engine
        self.inputs: dict[str, tuple[np.dtype[Any], Shape]] = {}
        self.outputs: dict[str, tuple[np.dtype[Any], Shape]] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
            (self.inputs if is_input else self.outputs)[name] = dtype, tuple(engine.get_tensor_shape(name))

    def _range(self, profile: int) -> dict[str, tuple[Shape, Shape, Shape]]:
        """Smallest, best, and largest shape of each input."""
        found = {}
        for name, (_, dims) in self.inputs.items():
            if -1 not in dims:  # a plan of one shape needs no profile
                found[name] = dims, dims, dims
                continue
            smallest, best, largest = self._engine.get_tensor_profile_shape(name, profile)
            found[name] = tuple(smallest), tuple(best), tuple(largest)
        return found

    def _profile(self, shapes: Mapping[str, Shape]) -> int:
        """The profile that serves these shapes and is tuned for the nearest ones."""
        if set(shapes) != set(self.inputs):
            raise ShapeError(
                f"the plan needs {', '.join(self.inputs)}, but was given {', '.join(shapes) or 'nothing'}."
            )
        best, least = None, float("inf")
        for index, ranges in self._ranges.items():
            if all(_within(shapes[name], low, high) for name, (low, _, high) in ranges.items()):
                far = sum(_distance(shapes[name], tuned) for name, (_, tuned, _) in ranges.items())
                if far < least:
                    best, least = index, far
        if best is None:
            given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            allowed = "; ".join(
                ", ".join(f"{name} {list(low)} to {list(high)}" for name, (low, _, high) in ranges.items())
                for ranges in self._ranges.values()
            )
            raise ShapeError(f"no profile of the plan serves {given}; allowed are {allowed}.")
        return best

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise PlanError("the plan's working memory does not fit on the GPU; free it or use fewer instances.")
        stream = int(self._stream.value or 0)
        if not context.set_optimization_profile_async(profile, stream):
            raise PlanError(f"the plan's profile {profile} is in use by another instance; give each its own.")
        self._cuda.call("cudaStreamSynchronize", self._stream)
        return context

    def _allocate(self) -> None:
        sizes = dict.fromkeys([*self.inputs, *self.outputs], 0)
        for index, context in self._contexts.items():
            for name, (_, _, largest) in self._ranges[index].items():
                context.set_input_shape(name, largest)
            for name in sizes:
                shape = tuple(context.get_tensor_shape(name))
                if min(shape, default=1) < 0:
                    raise PlanError(f"output {name} has a shape that depends on data; the plan cannot be served.")
                sizes[name] = max(sizes[name], int(np.prod(shape)))
        for name, count in sizes.items():
            dtype = {**self.inputs, **self.outputs}[name][0]
            size = max(count * dtype.itemsize, 1)
            # Noted before the second half is asked for, so that both are freed if that fails.
            buffer = self._buffers[name] = _Buffer(self._cuda.allocate(size), 0, size, dtype)
            buffer.host = self._cuda.allocate(size, pinned=True)
        for context in self._contexts.values():
            for name, buffer in self._buffers.items():
                context.set_tensor_address(name, buffer.device)


def _within(shape: Shape, low: Shape, high: Shape) -> bool:
    return len(shape) == len(low) and all(a <= size <= b for size, a, b in zip(shape, low, high, strict=True))


def _distance(shape: Shape, tuned: Shape) -> int:
    return sum(abs(size - best) for size, best in zip(shape, tuned, strict=True))


def _load_tensorrt() -> Any:
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise PlanError(f"TensorRT's Python runtime cannot be imported ({error}); install tensorrt.") from error


def _load_cudart(library: str | None) -> Any:
    """CUDA's runtime library where the system, CUDA's folder, or NVIDIA's packages have it; the newest first."""
    library = library or os.environ.get("MTGR_CUDART")
    found = [library] if library else [ctypes.util.find_library("cudart")]
    if not library:
        folders = [*site.getsitepackages(), *(entry for entry in sys.path if entry.endswith("site-packages"))]
        places = ["/usr/local/cuda*/lib64", *(f"{folder}/nvidia/*/lib" for folder in folders)]
        for place in places:
            found += sorted(glob.glob(f"{place}/libcudart.so*"), reverse=True)
    for path in filter(None, found):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise PlanError("libcudart is not found; install nvidia-cuda-runtime, or put its folder into LD_LIBRARY_PATH.")
