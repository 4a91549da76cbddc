"""ONNX Runtime as a Python-based backend, for servers that lack Triton's C++ ``onnxruntime`` backend.

It serves the same model directories: a config.pbtxt with ``backend: "onnxruntime"`` and ``<version>/model.onnx``. What
it refuses at load, the C++ backend refuses too, so that a repository that starts here starts in NVIDIA's image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

_ONNX_TYPES = {
    "TYPE_BOOL": "tensor(bool)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_UINT16": "tensor(uint16)",
    "TYPE_UINT32": "tensor(uint32)",
    "TYPE_UINT64": "tensor(uint64)",
    "TYPE_INT8": "tensor(int8)",
    "TYPE_INT16": "tensor(int16)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP64": "tensor(double)",
}

# ONNX Runtime raises these for a graph that cannot compute on what it was given.
_RUN_ERRORS = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


@dataclass
class _Work:
    """One request of the batch: where its response goes and what it feeds the graph."""

    position: int
    feeds: dict[str, np.ndarray[Any, Any]]
    outputs: list[str]
    rows: int  # length of the batch axis


class TritonPythonModel:
    """One instance of a model: an ONNX Runtime session and its configuration."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the session and check the graph against config.pbtxt.

        Raises:
            pb_utils.TritonModelException: If the file is missing or does not fit the config.
        """
        config = json.loads(args["model_config"])
        self._logger = pb_utils.Logger
        self._batching = int(config["max_batch_size"]) > 0
        self._input_names = [entry["name"] for entry in config["input"]]
        self._output_names = [entry["name"] for entry in config["output"]]

        filename = config.get("default_model_filename") or "model.onnx"
        path = os.path.join(args["model_repository"], args["model_version"], filename)
        if not os.path.isfile(path):
            raise pb_utils.TritonModelException(f"{path} does not exist; export the model again.")
        self._session = ort.InferenceSession(
            path,
            sess_options=_session_options(config.get("parameters", {})),
            providers=self._providers(args),
        )
        _check_tensors("input", config["input"], self._session.get_inputs(), self._batching)
        _check_tensors("output", config["output"], self._session.get_outputs(), self._batching)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests that the batcher put together, with one run of the session per shape.

        Args:
            requests: Triton requests; inputs have a leading batch axis when ``max_batch_size`` is positive.

        Returns:
            One response per request, in order. A request that fails gets an error of its own.
        """
        responses: list[Any] = [None] * len(requests)
        groups: dict[Any, list[_Work]] = {}
        for position, request in enumerate(requests):
            if request.is_cancelled():
                responses[position] = _failure("the client cancelled the request.", pb_utils.TritonError.CANCELLED)
                continue
            feeds = {}
            missing = ""
            for name in self._input_names:
                tensor = pb_utils.get_input_tensor_by_name(request, name)
                if tensor is None:
                    missing = missing or name
                else:
                    feeds[name] = tensor.as_numpy()
            if missing:
                responses[position] = _failure(
                    f"input '{missing}' is missing; the model needs {', '.join(self._input_names)}.",
                    pb_utils.TritonError.INVALID_ARG,
                )
                continue
            wanted = set(request.requested_output_names())
            work = _Work(
                position=position,
                feeds=feeds,
                outputs=[name for name in self._output_names if name in wanted],
                rows=len(feeds[self._input_names[0]]) if self._batching else 1,
            )
            # Without a batch axis requests cannot be merged: each is a group of its own.
            key = tuple(array.shape[1:] for array in feeds.values()) if self._batching else position
            groups.setdefault(key, []).append(work)
        for group in groups.values():
            self._run(group, responses)
        return responses

    def finalize(self) -> None:
        """Free the session."""
        del self._session

    def _run(self, group: list[_Work], responses: list[Any]) -> None:
        """Run requests of equal shape together and store a response for each."""
        wanted = [name for name in self._output_names if any(name in work.outputs for work in group)]
        if len(group) == 1:
            feeds = group[0].feeds  # views of the request's memory: nothing is copied
        else:
            feeds = {name: np.concatenate([work.feeds[name] for work in group]) for name in self._input_names}
        try:
            arrays = dict(zip(wanted, self._session.run(wanted, feeds), strict=True))
            if self._batching:
                _check_batch_axis(arrays, sum(work.rows for work in group))
        except _RUN_ERRORS as error:
            if len(group) > 1:
                # One bad request must not fail the others: find out which by running each alone.
                for work in group:
                    self._run([work], responses)
                return
            invalid = isinstance(error, ort_errors.InvalidArgument)
            code = pb_utils.TritonError.INVALID_ARG if invalid else pb_utils.TritonError.INTERNAL
            responses[group[0].position] = _failure(f"ONNX Runtime: {error}", code)
            return
        start = 0
        for work in group:
            stop = start + work.rows
            tensors = [
                pb_utils.Tensor(name, arrays[name] if len(group) == 1 else arrays[name][start:stop])
                for name in work.outputs
            ]
            responses[work.position] = pb_utils.InferenceResponse(output_tensors=tensors)
            start = stop

    def _providers(self, args: dict[str, str]) -> list[Any]:
        """Execution providers for the instance's kind, the preferred first."""
        if args["model_instance_kind"] != "GPU":
            return ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            self._logger.log_warn(
                f"{args['model_name']} asks for a GPU, but the installed onnxruntime has no CUDA provider: "
                "it runs on the CPU. Install onnxruntime-gpu."
            )
            return ["CPUExecutionProvider"]
        return [("CUDAExecutionProvider", {"device_id": int(args["model_instance_device_id"])}), "CPUExecutionProvider"]


def _session_options(parameters: dict[str, dict[str, str]]) -> ort.SessionOptions:
    """Session options from the config's parameters, named as the C++ backend names them."""
    options = ort.SessionOptions()
    allowed = len(os.sched_getaffinity(0))
    intra = _thread_count(parameters, "intra_op_thread_count")
    if intra == 0 and allowed < (os.cpu_count() or 1):
        # ONNX Runtime counts the machine's cores; in a container that may use fewer, its threads would queue.
        intra = allowed
    options.intra_op_num_threads = intra
    options.inter_op_num_threads = _thread_count(parameters, "inter_op_thread_count")
    # Threads that spin between two runs take the cores from the other models of the server.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _thread_count(parameters: dict[str, dict[str, str]], name: str) -> int:
    """A thread count; 0 (also when absent) leaves the choice to ONNX Runtime."""
    text = parameters.get(name, {}).get("string_value", "0")
    if not text.isdecimal():
        raise pb_utils.TritonModelException(f"parameter {name} is '{text}'; it must be 0 or a positive integer.")
    return int(text)


def _check_tensors(kind: str, entries: list[dict[str, Any]], nodes: list[Any], batching: bool) -> None:
    """Compare the config's tensors of one kind with the graph's.

    Raises:
        pb_utils.TritonModelException: If names, types or shapes differ.
    """
    graph = {node.name: node for node in nodes}
    names = [entry["name"] for entry in entries]
    unknown = [name for name in names if name not in graph]
    if unknown:
        raise pb_utils.TritonModelException(
            f"{kind} '{unknown[0]}' of config.pbtxt is not in the ONNX graph, which has {', '.join(graph)}."
        )
    absent = [name for name in graph if name not in names]
    if absent and kind == "input":
        raise pb_utils.TritonModelException(f"input '{absent[0]}' of the ONNX graph is not in config.pbtxt; add it.")
    for entry in entries:
        node = graph[entry["name"]]
        expected = _ONNX_TYPES.get(entry["data_type"])
        if expected is None:
            raise pb_utils.TritonModelException(
                f"{kind} '{node.name}' is {entry['data_type']}; this backend serves {', '.join(_ONNX_TYPES)}."
            )
        if node.type != expected:
            raise pb_utils.TritonModelException(
                f"{kind} '{node.name}' is {entry['data_type']} in config.pbtxt but {node.type} in the ONNX graph."
            )
        _check_shape(kind, entry, node, batching)


def _check_shape(kind: str, entry: dict[str, Any], node: Any, batching: bool) -> None:
    """Compare one tensor's dims: an input may be narrower than the graph, an output must be exactly the graph's."""
    dims = [int(size) for size in entry.get("reshape", {}).get("shape", entry["dims"])]
    shape = [size if isinstance(size, int) else -1 for size in node.shape]
    if batching and (not shape or shape[0] != -1):
        raise pb_utils.TritonModelException(
            f"{kind} '{node.name}' has shape {shape} in the ONNX graph, without a dynamic batch axis; "
            "export it with one or set max_batch_size to 0."
        )
    full = [-1, *dims] if batching else dims
    fits = len(full) == len(shape) and all(
        theirs == ours or (kind == "input" and theirs == -1) for theirs, ours in zip(shape, full, strict=True)
    )
    if not fits:
        raise pb_utils.TritonModelException(
            f"{kind} '{node.name}' has shape {full} by config.pbtxt "
            f"({'with' if batching else 'without'} a batch axis) but {shape} in the ONNX graph."
        )


def _check_batch_axis(arrays: dict[str, np.ndarray[Any, Any]], rows: int) -> None:
    """Refuse outputs that do not have one row per row of the batch: splitting them would mix up users."""
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != rows:
            raise ort_errors.Fail(f"output '{name}' has shape {list(array.shape)} for a batch of {rows}.")


def _failure(message: str, code: int) -> Any:
    """A response that carries an error and its status code."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
