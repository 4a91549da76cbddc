"""A request as the door's tensors, and its answer back; every tensor has a leading dimension of 1."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mtgr.client.types import Integers, Recommendation, RecommendationRequest
from mtgr.errors import InvalidRequestError, ServerError

# The output that names the strategy which served.
STRATEGY_OUTPUT = "served_strategy"
# By which a gateway sends a user always to the same server, whose caches know the context.
AFFINITY_HEADER = "x-mtgr-user"


@dataclass(frozen=True, eq=False)
class Tensor:
    """An input: its name in the door's config, Triton's name of its type, and its data [1, n]."""

    name: str
    datatype: str
    data: npt.NDArray[Any]


class InferResult(Protocol):
    """What gRPC's and HTTP's results share."""

    def as_numpy(self, name: str) -> npt.NDArray[Any] | None:
        """The output ``name``, or None if the answer has none."""


def encode(request: RecommendationRequest) -> list[Tensor]:
    """The tensors of a request, in the door's order and without the optional ones that are None.

    Raises:
        InvalidRequestError: If a value has no encoding in its tensor's type. Whether it makes sense is for
            the server to say.
    """
    tensors = [_text("user_id", request.user_id)]
    if request.history is not None:
        tensors.append(_integers("history_items", request.history.items, np.int64))
        tensors.append(_integers("history_actions", request.history.actions, np.int32))
        tensors.append(_integers("history_times", request.history.times, np.int64))
    if request.candidates is not None:
        tensors.append(_integers("candidates", request.candidates, np.int64))
    if request.request_time is not None:
        tensors.append(_integer("request_time", request.request_time, np.int64))
    if request.profile is not None:
        tensors.append(_text("profile", _json_object(request.profile)))
    if request.strategy is not None:
        tensors.append(_text("strategy", request.strategy))
    if request.top_k is not None:
        tensors.append(_integer("top_k", request.top_k, np.int32))
    return tensors


def affinity(user_id: str) -> dict[str, str]:
    """The header that stands for a user: a hash, since headers end up in logs."""
    digest = hashlib.blake2b(user_id.encode("utf-8"), digest_size=8)
    return {AFFINITY_HEADER: digest.hexdigest()}


def to_inputs(tensors: list[Tensor], infer_input: Callable[[str, list[int], str], Any]) -> list[Any]:
    """The tensors as a protocol's ``InferInput`` objects."""
    return [
        infer_input(tensor.name, list(tensor.data.shape), tensor.datatype).set_data_from_numpy(tensor.data)
        for tensor in tensors
    ]


def decode(result: InferResult, latency_ms: float) -> Recommendation:
    """The answer without its leading dimension.

    Raises:
        ServerError: If an output is missing or has another type or shape than the door's.
    """
    items = _output(result, "items", np.int64, 1)
    scores = _output(result, "scores", np.float32, 1)
    task_scores = _output(result, "task_scores", np.float32, 2)
    if not len(items) == len(scores) == len(task_scores):
        raise ServerError(
            f"the server answered {len(items)} items, {len(scores)} scores and {len(task_scores)} rows "
            "of task scores; check that client and server are of one version."
        )
    return Recommendation(
        items=items,
        scores=scores,
        task_scores=task_scores,
        strategy=_output_text(result, STRATEGY_OUTPUT),
        arm=_output_text(result, "arm"),
        latency_ms=latency_ms,
        labels=_labels(result),
    )


def _text(name: str, value: str) -> Tensor:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} is {value!r}; it must be a string.")
    try:
        encoded = value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{name} is {value!r}, which has no UTF-8 form; remove lone surrogates.") from error
    return Tensor(name, "BYTES", np.array([[encoded]], dtype=np.object_))


def _json_object(profile: Mapping[str, Any]) -> str:
    if not isinstance(profile, Mapping):
        raise InvalidRequestError(f"profile is {profile!r}; it must be a mapping of names to JSON values.")
    try:
        # Sorted and without spaces, so that equal profiles are equal bytes to caches.
        return json.dumps(dict(profile), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"profile has no JSON form: {error}.") from error


def _integer(name: str, value: int, dtype: type[np.signedinteger[Any]]) -> Tensor:
    if np.ndim(value) != 0:
        raise InvalidRequestError(f"{name} is {value!r}; it must be one integer.")
    return _integers(name, [value], dtype)


def _integers(name: str, values: Integers, dtype: type[np.signedinteger[Any]]) -> Tensor:
    datatype = f"INT{np.dtype(dtype).itemsize * 8}"
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequestError(f"{name} is not a flat list of integers; it becomes {datatype} [n].") from error
    if array.ndim != 1:
        raise InvalidRequestError(f"{name} has {array.ndim} dimensions; it must be a flat list of integers.")
    if array.size == 0:
        array = np.zeros(0, dtype)  # an empty list has no type of its own
    if array.dtype.kind == "O" and all(isinstance(value, int) for value in array):
        raise InvalidRequestError(f"{name} has an integer that does not fit {datatype}.")
    if array.dtype.kind not in "iu":
        raise InvalidRequestError(f"{name} holds {array.dtype.name} values; it must hold integers only.")
    limits = np.iinfo(dtype)
    # Python integers: NumPy would compare uint64 with int64 as floats.
    if array.size and not (limits.min <= int(array.min()) and int(array.max()) <= limits.max):
        raise InvalidRequestError(f"{name} has an integer that does not fit {datatype}.")
    return Tensor(name, datatype, array.astype(dtype).reshape(1, -1))


def _output(result: InferResult, name: str, dtype: type[np.generic], ndim: int) -> npt.NDArray[Any]:
    array = result.as_numpy(name)
    if array is None:
        raise ServerError(f"the server's answer has no output {name!r}; check that the url is an MTGR server's.")
    if array.dtype != dtype or array.ndim != ndim + 1 or array.shape[0] != 1:
        raise ServerError(
            f"the server's output {name!r} is {array.dtype.name} {list(array.shape)}, not "
            f"{np.dtype(dtype).name} with {ndim + 1} dimensions, the first of size 1; check that client and "
            "server are of one version."
        )
    row: npt.NDArray[Any] = array[0]
    row.setflags(write=False)
    return row


def _labels(result: InferResult) -> tuple[str, ...]:
    # One comma-separated text; a server without this output has none to give.
    if result.as_numpy("labels") is None:
        return ()
    return tuple(filter(None, _output_text(result, "labels").split(",")))


def _output_text(result: InferResult, name: str) -> str:
    values = _output(result, name, np.object_, 1)
    if len(values) != 1:
        raise ServerError(f"the server's output {name!r} has {len(values)} values; it must have one.")
    # HTTP answers in JSON carry strings, binary answers bytes.
    value = values[0]
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
