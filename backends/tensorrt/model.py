"""TensorRT as a Python-based backend, for servers that lack Triton's C++ ``tensorrt`` backend.

It serves the same model directories: a config.pbtxt with ``backend: "tensorrt"`` and ``<version>/model.plan``, with the
profiles that the instance group names and the CUDA graphs of its ``graph_spec``; other shapes are launched kernel by
kernel.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tensorrt_plan import Plan, PlanError, ShapeError


@dataclass
class _Work:
    """One request of the batch: where its response goes and what it feeds the plan."""

    position: int
    feeds: dict[str, np.ndarray[Any, Any]]
    outputs: list[str]
    rows: int  # length of the batch axis


class TritonPythonModel:
    """One instance of a model: a plan on one GPU and its configuration."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the plan and check it against config.pbtxt.

        Raises:
            pb_utils.TritonModelException: If there is no GPU, or the plan is missing or does not fit the config.
        """
        config = json.loads(args["model_config"])
        if args["model_instance_kind"] != "GPU":
            raise pb_utils.TritonModelException(
                f"{args['model_name']} needs a GPU; this instance is of kind {args['model_instance_kind']}."
            )
        self._max_batch = int(config["max_batch_size"])
        filename = config.get("default_model_filename") or "model.plan"
        path = os.path.join(args["model_repository"], args["model_version"], filename)
        try:
            self._plan = Plan(path, int(args["model_instance_device_id"]), _profiles(config))
        except PlanError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        _check_tensors("input", config["input"], self._plan.inputs, self._max_batch > 0)
        _check_tensors("output", config["output"], self._plan.outputs, self._max_batch > 0)
        self._input_names = [entry["name"] for entry in config["input"]]
        self._output_names = [entry["name"] for entry in config["output"]]
        self._capture(config.get("optimization", {}).get("cuda", {}), args["model_name"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests that arrived together, with one execution of the plan per shape.

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
            found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self._input_names}
            missing = [name for name, tensor in found.items() if tensor is None]
            if missing:
                responses[position] = _failure(
                    f"input '{missing[0]}' is missing; the model needs {', '.join(self._input_names)}.",
                    pb_utils.TritonError.INVALID_ARG,
                )
                continue
            feeds = {name: tensor.as_numpy() for name, tensor in found.items()}
            rows = {len(array) for array in feeds.values()} if self._max_batch > 0 else {1}
            if len(rows) > 1:
                responses[position] = _failure(
                    "inputs have batches of different sizes; give all of them one.", pb_utils.TritonError.INVALID_ARG
                )
                continue
            wanted = set(request.requested_output_names())
            outputs = [name for name in self._output_names if name in wanted]
            work = _Work(position, feeds, outputs, rows.pop())
            # Without a batch axis requests cannot be merged: each is a group of its own.
            key = tuple(array.shape[1:] for array in feeds.values()) if self._max_batch > 0 else position
            groups.setdefault(key, []).append(work)
        for group in groups.values():
            for batch in self._batches(group):
                self._run(batch, responses)
        return responses

    def finalize(self) -> None:
        """Free the plan and its buffers."""
        self._plan.close()

    def _capture(self, cuda: dict[str, Any], model: str) -> None:
        """Record the shapes of the config's graph specs; at those that cannot be, the plan runs all the same."""
        for spec in cuda.get("graph_spec", []) if cuda.get("graphs") else []:
            shapes = {
                name: (int(spec["batch_size"]), *(int(size) for size in entry["dim"]))
                for name, entry in spec["input"].items()
            }
            try:
                self._plan.capture(shapes)
            except PlanError as error:
                pb_utils.Logger.log_warn(f"{model} has no CUDA graph at {shapes}: {error}")

    def _batches(self, group: list[_Work]) -> list[list[_Work]]:
        """Requests of equal shape, cut where the plan's largest batch is full."""
        batches: list[list[_Work]] = []
        rows = 0
        for work in group:
            if not batches or rows + work.rows > max(self._max_batch, 1):
                batches.append([])
                rows = 0
            batches[-1].append(work)
            rows += work.rows
        return batches

    def _run(self, batch: list[_Work], responses: list[Any]) -> None:
        """Run requests of equal shape together and store a response for each."""
        wanted = [name for name in self._output_names if any(name in work.outputs for work in batch)]
        if len(batch) == 1:
            feeds = batch[0].feeds
        else:
            feeds = {name: np.concatenate([work.feeds[name] for work in batch]) for name in self._input_names}
        try:
            arrays = self._plan.run(feeds, wanted)
        except PlanError as error:
            invalid = isinstance(error, ShapeError)
            code = pb_utils.TritonError.INVALID_ARG if invalid else pb_utils.TritonError.INTERNAL
            for work in batch:
                responses[work.position] = _failure(str(error), code)
            return
        start = 0
        for work in batch:
            stop = start + work.rows
            tensors = [
                pb_utils.Tensor(name, arrays[name] if len(batch) == 1 else arrays[name][start:stop])
                for name in work.outputs
            ]
            responses[work.position] = pb_utils.InferenceResponse(output_tensors=tensors)
            start = stop


def _profiles(config: dict[str, Any]) -> list[int] | None:
    """Profiles that the instance group names; None, all, where it names none.

    Raises:
        pb_utils.TritonModelException: If groups differ, which this backend cannot tell apart, or are no indices.
    """
    named = [tuple(group.get("profile") or ()) for group in config.get("instance_group", [])]
    if len(set(named)) > 1:
        raise pb_utils.TritonModelException("instance groups name different profiles; give one instance_group.")
    profiles = named[0] if named else ()
    if not all(text.isdecimal() for text in profiles):
        raise pb_utils.TritonModelException(f"profiles are {', '.join(profiles)}; they must be indices such as 0.")
    return [int(text) for text in profiles] or None


def _check_tensors(kind: str, entries: list[dict[str, Any]], tensors: dict[str, Any], batching: bool) -> None:
    """Compare the config's tensors of one kind with the plan's.

    Raises:
        pb_utils.TritonModelException: If names, types or shapes differ.
    """
    names = [entry["name"] for entry in entries]
    unknown = [name for name in names if name not in tensors]
    if unknown:
        raise pb_utils.TritonModelException(
            f"{kind} '{unknown[0]}' of config.pbtxt is not in the plan, which has {', '.join(tensors)}."
        )
    absent = [name for name in tensors if name not in names]
    if absent and kind == "input":
        raise pb_utils.TritonModelException(f"input '{absent[0]}' of the plan is not in config.pbtxt; add it.")
    for entry in entries:
        name = entry["name"]
        dtype, shape = tensors[name]
        if np.dtype(pb_utils.triton_string_to_numpy(entry["data_type"])) != dtype:
            raise pb_utils.TritonModelException(
                f"{kind} '{name}' is {entry['data_type']} in config.pbtxt but {dtype} in the plan."
            )
        dims = [*([-1] if batching else []), *(int(size) for size in entry["dims"])]
        fits = len(dims) == len(shape) and all(
            -1 in pair or pair[0] == pair[1] for pair in zip(dims, shape, strict=True)
        )
        if not fits:
            raise pb_utils.TritonModelException(
                f"{kind} '{name}' has shape {dims} by config.pbtxt but {list(shape)} in the plan."
            )


def _failure(message: str, code: int) -> Any:
    """A response that carries an error and its status code."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
