"""Every input of the door has a bound: what is just inside passes, what is just outside is refused with the bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from mtgr.errors import InvalidRequestError
from mtgr.features.request import (
    MAX_CANDIDATES,
    MAX_CLOCK_SKEW,
    MAX_EVENTS,
    MAX_PROFILE_BYTES,
    MAX_TOP_K,
    MAX_USER_ID_BYTES,
    Request,
    parse_request,
)
from tests.conftest import ROOT
from tests.unit.models import EPOCH, small_schema

SCHEMA = small_schema()
NOW = EPOCH + 50_000

Tensors = dict[str, npt.NDArray[Any]]


def text(value: bytes) -> npt.NDArray[np.object_]:
    return np.array([[value]], dtype=np.object_)


def history(events: int) -> Tensors:
    return {
        "history_items": np.ones((1, events), np.int64),
        "history_actions": np.ones((1, events), np.int32),
        "history_times": np.full((1, events), EPOCH, np.int64),
    }


def padded_profile(length: int) -> bytes:
    return b'{"age": 30' + b" " * (length - 11) + b"}"


# By input: the bound, and a request of that size. A history's three tensors must be equally long.
BOUNDS: dict[str, tuple[int, Callable[[int], Tensors]]] = {
    "user_id": (MAX_USER_ID_BYTES, lambda size: {"user_id": text(b"u" * size)}),
    "history_items": (MAX_EVENTS, history),
    "history_actions": (MAX_EVENTS, history),
    "history_times": (MAX_EVENTS, history),
    "candidates": (MAX_CANDIDATES, lambda size: {"candidates": np.ones((1, size), np.int64)}),
    "request_time": (NOW + MAX_CLOCK_SKEW, lambda time: {"request_time": np.array([[time]], np.int64)}),
    "profile": (MAX_PROFILE_BYTES, lambda size: {"profile": text(padded_profile(size))}),
    "strategy": (len("baseline"), lambda size: {"strategy": text(b"baseline".ljust(size, b"e"))}),
    "top_k": (MAX_TOP_K, lambda size: {"top_k": np.array([[size]], np.int32)}),
}


def parse(values: Tensors) -> Request:
    return parse_request({"user_id": text(b"ann"), **values}, SCHEMA, NOW)


def test_every_input_of_the_door_is_bounded() -> None:
    config = (ROOT / "model_repository" / "mtgr" / "config.pbtxt").read_text(encoding="utf-8")
    assert {entry.name for entry in text_format.Parse(config, pb.ModelConfig()).input} == set(BOUNDS)


@pytest.mark.parametrize("name", BOUNDS)
def test_the_bound_is_where_it_says(name: str) -> None:
    bound, sized = BOUNDS[name]
    assert parse(sized(bound)).user_id
    with pytest.raises(InvalidRequestError) as caught:
        parse(sized(bound + 1))
    message = str(caught.value)
    assert name in message or (name.startswith("history_") and "history_items" in message)
    assert (str(bound) in message) == (name != "strategy")
    assert len(message) < 300


@pytest.mark.parametrize("name", ["history_items", "history_actions", "history_times"])
def test_one_long_tensor_of_a_history_is_refused(name: str) -> None:
    values = history(2)
    values[name] = history(MAX_EVENTS + 1)[name]
    with pytest.raises(InvalidRequestError, match="must be equal"):
        parse(values)


@pytest.mark.parametrize("name", [name for name in BOUNDS if not name.startswith(("history", "candidates"))])
def test_single_values_are_single(name: str) -> None:
    bound, sized = BOUNDS[name]
    values = sized(bound)
    with pytest.raises(InvalidRequestError, match=f"{name} has 2 values; give exactly one"):
        parse({**values, name: np.repeat(values[name], 2, axis=1)})
