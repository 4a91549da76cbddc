"""Validation of requests: from the door's tensors to a typed request, or one sentence that says what was wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.errors import InvalidRequestError
from mtgr.routing.strategies import AUTO, STRATEGIES
from mtgr.schema import Schema

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Tensors = Mapping[str, npt.NDArray[Any]]

MAX_CANDIDATES = 16_384
MAX_EVENTS = 16_384
MAX_TOP_K = 16_384
MAX_USER_ID_BYTES = 256
MAX_PROFILE_BYTES = 16_384
# A request may be about a later moment than the server's clock shows, but not by more than clocks differ.
MAX_CLOCK_SKEW = 86_400
# Times from here on are taken for milliseconds: as such March 1973, as seconds the year 5138.
MIN_MILLISECONDS = 100_000_000_000

_TEXT_INPUTS = frozenset({"user_id", "profile", "strategy"})
_INT32_MAX = np.iinfo(np.int32).max

STRATEGY_NAMES = (AUTO, *STRATEGIES)


@dataclass(frozen=True)
class History:
    """Events that a request brings along, ascending in time (events of one second in the order given).

    Attributes:
        items: INT64 [E], raw item ids.
        actions: INT32 [E], actions from 0.
        times: INT64 [E], unix seconds.
    """

    items: Int64Array
    actions: Int32Array
    times: Int64Array


@dataclass(frozen=True)
class Request:
    """A valid request.

    Attributes:
        user_id: The user.
        history: Events that stand in for the feature store's; None to use the store.
        candidates: INT64 [k] raw item ids, each once, in order of first appearance; None to retrieve.
        request_time: Unix seconds; only events of the store before it are used.
        profile: Profile values that override the store's.
        strategy: What the request asks for.
        top_k: Items to return; None for all candidates, or the default when recommending.
    """

    user_id: str
    history: History | None
    candidates: Int64Array | None
    request_time: int
    profile: Mapping[str, str | float]
    strategy: str
    top_k: int | None


def parse_request(tensors: Tensors, schema: Schema, now: int) -> Request:
    """Check and convert the door's tensors.

    Args:
        tensors: By name, each with a leading dimension of 1; absent optional ones are missing.
        schema: The schema.
        now: The server's clock, unix seconds.

    Raises:
        InvalidRequestError: With a sentence that names the tensor, what was wrong, and what is allowed.
    """
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or tensor.shape[0] != 1:
            raise InvalidRequestError(
                f"{name} has shape {list(tensor.shape)}; its shape must be [1, n]: one user a request."
            )
        if tensor.dtype.kind != ("O" if name in _TEXT_INPUTS else "i"):
            wanted = "text (BYTES)" if name in _TEXT_INPUTS else "integers"
            raise InvalidRequestError(f"{name} has type {tensor.dtype}; it must hold {wanted}.")
    request_time = _request_time(tensors, schema, now)
    return Request(
        user_id=_user_id(tensors),
        history=_history(tensors, request_time),
        candidates=_candidates(tensors, schema),
        request_time=request_time,
        profile=_profile(tensors, schema),
        strategy=_strategy(tensors),
        top_k=_top_k(tensors),
    )


def _single(tensors: Tensors, name: str) -> Any:
    """The one value of a tensor, or None if it is absent."""
    tensor = tensors.get(name)
    if tensor is None:
        return None
    if tensor.size != 1:
        raise InvalidRequestError(f"{name} has {tensor.size} values; give exactly one.")
    return tensor.reshape(-1)[0]


def _text(value: Any, name: str) -> str:
    try:
        encoded = value.encode("utf-8") if isinstance(value, str) else bytes(value)
        return encoded.decode("utf-8")
    except (UnicodeError, TypeError) as error:
        raise InvalidRequestError(f"{name} is not UTF-8 text; encode it as UTF-8.") from error


def _user_id(tensors: Tensors) -> str:
    value = _single(tensors, "user_id")
    if value is None:
        raise InvalidRequestError("user_id is missing; every request must name one user.")
    text = _text(value, "user_id")
    length = len(text.encode())
    if not 1 <= length <= MAX_USER_ID_BYTES or "\x00" in text:
        wrong = f"has {length} bytes" if "\x00" not in text else "contains a NUL"
        raise InvalidRequestError(f"user_id {wrong}; give 1 to {MAX_USER_ID_BYTES} bytes of text without NUL.")
    return text


def _request_time(tensors: Tensors, schema: Schema, now: int) -> int:
    value = _single(tensors, "request_time")
    if value is None:
        return now
    time = int(value)
    latest = min(now + MAX_CLOCK_SKEW, schema.epoch + np.iinfo(np.int32).max)
    if not 0 <= time <= latest:
        hint = " (is it in milliseconds?)" if MIN_MILLISECONDS <= time <= latest * 1000 else ""
        raise InvalidRequestError(
            f"request_time is {time}{hint}; it must be unix seconds between 0 and {latest}, "
            "one day ahead of the server's clock."
        )
    return time


def _history(tensors: Tensors, request_time: int) -> History | None:
    names = ("history_items", "history_actions", "history_times")
    given = [name for name in names if name in tensors]
    if not given:
        return None
    if len(given) < len(names):
        missing = next(name for name in names if name not in tensors)
        raise InvalidRequestError(f"{missing} is missing; send {', '.join(names)} together, or none of them.")
    items, actions, times = (tensors[name].reshape(-1) for name in names)
    if not len(items) == len(actions) == len(times):
        raise InvalidRequestError(
            f"history_items, history_actions, history_times have lengths {len(items)}, {len(actions)}, {len(times)}; "
            "they must be equal."
        )
    if len(items) > MAX_EVENTS:
        raise InvalidRequestError(
            f"history_items has {len(items)} events; at most {MAX_EVENTS} are allowed, send the latest."
        )
    if len(items):
        _check_range("history_items", items, 0, None, "item ids")
        _check_range("history_actions", actions, 0, _INT32_MAX, "actions")
        _check_range("history_times", times, 0, request_time, "unix seconds up to request_time")
    order = np.argsort(times, kind="stable")
    return History(items[order].astype(np.int64), actions[order].astype(np.int32), times[order].astype(np.int64))


def _candidates(tensors: Tensors, schema: Schema) -> Int64Array | None:
    tensor = tensors.get("candidates")
    if tensor is None:
        if "retrieve" not in schema.operations:
            raise InvalidRequestError(
                "candidates is missing; the installed model ranks items and cannot retrieve any, so send candidates."
            )
        return None
    candidates = tensor.reshape(-1).astype(np.int64)
    if not len(candidates):
        raise InvalidRequestError(
            "candidates is empty; give at least one item, or leave it out to get recommendations."
        )
    if len(candidates) > MAX_CANDIDATES:
        raise InvalidRequestError(f"candidates has {len(candidates)} items; at most {MAX_CANDIDATES} are allowed.")
    _check_range("candidates", candidates, 0, None, "item ids")
    listed = candidates.tolist()
    once = dict.fromkeys(listed)  # in order of first appearance
    return candidates if len(once) == len(listed) else np.array(list(once), dtype=np.int64)


def _profile(tensors: Tensors, schema: Schema) -> dict[str, str | float]:
    value = _single(tensors, "profile")
    if value is None:
        return {}
    text = _text(value, "profile")
    if len(text.encode()) > MAX_PROFILE_BYTES:
        raise InvalidRequestError(f"profile is longer than {MAX_PROFILE_BYTES} bytes; send known fields only.")
    try:
        profile = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        raise InvalidRequestError("profile is not valid JSON; send one JSON object.") from error
    if not isinstance(profile, dict):
        raise InvalidRequestError('profile is not a JSON object; send one, such as {"age": 30}.')
    known = [field.name for field in schema.profile]
    for key, entry in profile.items():
        if key not in known:
            raise InvalidRequestError(f"profile has the unknown field {key[:64]!r}; known are {', '.join(known)}.")
        if isinstance(entry, bool) or not isinstance(entry, str | int | float) or not _finite(entry):
            raise InvalidRequestError(f"profile field {key!r} must be text or a finite number.")
    return profile


def _finite(value: str | float) -> bool:
    if isinstance(value, str):
        return True
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float holds
        return False


def _strategy(tensors: Tensors) -> str:
    value = _single(tensors, "strategy")
    if value is None:
        return AUTO
    text = _text(value, "strategy")
    if text not in STRATEGY_NAMES:
        raise InvalidRequestError(f"strategy is {text[:64]!r}; it must be one of {', '.join(STRATEGY_NAMES)}.")
    return text


def _top_k(tensors: Tensors) -> int | None:
    value = _single(tensors, "top_k")
    if value is None:
        return None
    if not 1 <= int(value) <= MAX_TOP_K:
        raise InvalidRequestError(f"top_k is {int(value)}; it must lie between 1 and {MAX_TOP_K}.")
    return int(value)


def _check_range(name: str, values: npt.NDArray[Any], low: int, high: int | None, what: str) -> None:
    if values.min() < low or (high is not None and values.max() > high):
        wrong = values < low if high is None else (values < low) | (values > high)
        index = int(wrong.argmax())
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequestError(f"{name} holds {values[index]} at index {index}; {what} must be {allowed}.")
