"""Buckets, requests and the user's state: what is bounded, or refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mtgr.errors import ConfigurationError, InvalidRequestError
from mtgr.features.buckets import hour_id, log_bucket, rate_bucket
from mtgr.features.candidates import candidate_rows
from mtgr.features.request import (
    MAX_CANDIDATES,
    MAX_CLOCK_SKEW,
    MAX_EVENTS,
    MAX_TOP_K,
    STRATEGY_NAMES,
    Request,
    parse_request,
)
from mtgr.features.state import CandidateState, build_candidate_state
from mtgr.schema import (
    CANDIDATE_COLUMNS,
    FIRST_COLUMN,
    FIRST_ID,
    HOUR_SIZE,
    LOG_COUNT_SIZE,
    LOG_SECONDS_SIZE,
    RATE_SIZE,
    SLOT_COLUMN,
    TIME,
    TYPE_COLUMN,
    UNKNOWN,
    TokenType,
)
from tests.unit.models import DAYS, EPOCH, NUM_ACTIONS, small_catalog, small_schema

SCHEMA = small_schema()
CATALOG = small_catalog()
NOW = EPOCH + 30 * 86_400

# Buckets

SIZES = st.sampled_from([LOG_SECONDS_SIZE, LOG_COUNT_SIZE, RATE_SIZE, FIRST_ID + 1])


@given(values=hnp.arrays(np.int64, st.integers(1, 30), elements=st.integers(-(2**63), 2**63 - 1)), size=SIZES)
def test_log_buckets_are_in_range_and_rise(values: npt.NDArray[np.int64], size: int) -> None:
    ids = log_bucket(np.sort(values), size)
    assert ids.dtype == np.int64
    assert (np.diff(ids) >= 0).all()
    assert ((ids == UNKNOWN) == (np.sort(values) < 0)).all()
    assert ((ids >= UNKNOWN) & (ids < size)).all()


@pytest.mark.parametrize("power", range(31))
def test_log_buckets_begin_at_powers_of_two_less_one(power: int) -> None:
    first = 2**power - 1
    assert log_bucket(first, LOG_SECONDS_SIZE) == FIRST_ID + power
    assert log_bucket(2 * first, LOG_SECONDS_SIZE) == FIRST_ID + power
    assert log_bucket(2 * first + 1, LOG_SECONDS_SIZE) == FIRST_ID + power + 1
    assert log_bucket(first - 1, LOG_SECONDS_SIZE) == (FIRST_ID + power - 1 if power else UNKNOWN)


@given(total=st.integers(0, 2**40), data=st.data())
def test_rate_buckets_are_in_range_and_rise(total: int, data: st.DataObject) -> None:
    positive = sorted(data.draw(st.lists(st.integers(0, total), min_size=1, max_size=20)))
    ids = rate_bucket(positive, [total] * len(positive), RATE_SIZE)
    assert (np.diff(ids) >= 0).all()
    if total == 0:
        assert (ids == UNKNOWN).all()
    else:
        assert ((ids >= FIRST_ID) & (ids < RATE_SIZE)).all()
        for share, step in zip(positive, (ids - FIRST_ID).tolist(), strict=True):
            assert Fraction(step, 20) <= Fraction(share + 1, total + 2) < Fraction(step + 1, 20)


@pytest.mark.parametrize(
    ("positive", "total", "step"), [(0, 1, 6), (1, 1, 13), (0, 18, 1), (0, 19, 0), (10**6, 10**6, 19), (5, 10, 10)]
)
def test_rate_buckets_at_their_edges(positive: int, total: int, step: int) -> None:
    """20 steps of (positive + 1) / (total + 2)."""
    assert rate_bucket(positive, total, RATE_SIZE) == FIRST_ID + step


@given(time=st.integers(0, 2**40))
def test_hour_buckets_are_the_hour_of_the_day(time: int) -> None:
    bucket = int(hour_id(time))
    assert bucket == FIRST_ID + time % 86_400 // 3600 < HOUR_SIZE
    assert bucket == hour_id(time + 86_400)


@pytest.mark.parametrize(("time", "hour"), [(0, 0), (3599, 0), (3600, 1), (86_399, 23), (86_400, 0)])
def test_hour_buckets_at_their_edges(time: int, hour: int) -> None:
    assert hour_id(time) == FIRST_ID + hour


# Requests


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Mostly [1, n], now and then something else."""
    right = st.tuples(st.just(1), st.integers(0, 6))
    return right | right | hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


def integers(dtype: type[np.signedinteger[Any]], *likely: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    info = np.iinfo(dtype)
    elements = st.one_of(*likely, st.integers(int(info.min), int(info.max)))
    return hnp.arrays(dtype, shapes(), elements=elements)


def texts(*likely: st.SearchStrategy[bytes]) -> st.SearchStrategy[Any]:
    return hnp.arrays(object, shapes(), elements=st.one_of(*likely, st.binary(max_size=300)), fill=st.nothing())


PROFILES = st.dictionaries(
    st.sampled_from([field.name for field in SCHEMA.profile]) | st.text(max_size=5),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2),
    max_size=3,
).map(lambda profile: json.dumps(profile).encode())

TENSORS = st.fixed_dictionaries(
    {"user_id": texts(st.just(b"7"), st.text(max_size=9).map(str.encode))},
    optional={
        "history_items": integers(np.int64, st.integers(0, 200)),
        "history_actions": integers(np.int32, st.integers(0, NUM_ACTIONS)),
        "history_times": integers(np.int64, st.integers(0, NOW)),
        "candidates": integers(np.int64, st.integers(0, 200)),
        "request_time": integers(np.int64, st.integers(0, NOW)),
        "profile": texts(PROFILES, st.just(b'{"age": 1e999}'), st.just(b"[" * 9000)),
        "strategy": texts(st.sampled_from([name.encode() for name in STRATEGY_NAMES])),
        "top_k": integers(np.int32, st.integers(1, MAX_TOP_K)),
    },
)


def text_tensor(value: object) -> npt.NDArray[Any]:
    return np.array([[value]], dtype=object)


def check_request(request: Request) -> None:
    """A request that was let through keeps every promise of its docstring."""
    assert 1 <= len(request.user_id.encode()) <= 256
    assert 0 <= request.request_time <= NOW + MAX_CLOCK_SKEW
    assert request.strategy in STRATEGY_NAMES
    assert request.top_k is None or 1 <= request.top_k <= MAX_TOP_K
    assert set(request.profile) <= {field.name for field in SCHEMA.profile}
    for value in request.profile.values():
        assert isinstance(value, str) or math.isfinite(value)
    if request.candidates is not None:
        assert request.candidates.dtype == np.int64
        assert 1 <= len(request.candidates) <= MAX_CANDIDATES
        assert len(set(request.candidates.tolist())) == len(request.candidates)
        assert (request.candidates >= 0).all()
    if request.history is not None:
        history = request.history
        assert len(history.items) == len(history.actions) == len(history.times) <= MAX_EVENTS
        assert [str(array.dtype) for array in (history.items, history.actions, history.times)] == [
            "int64",
            "int32",
            "int64",
        ]
        assert (np.diff(history.times) >= 0).all()
        assert (history.times <= request.request_time).all()


@settings(max_examples=300, deadline=None)
@given(tensors=TENSORS)
@example(
    tensors={"user_id": np.array([[b"1"]], dtype=object), "profile": np.array([[b'{"age": ' + b"9" * 5000 + b"}"]])}
)
def test_any_tensors_parse_or_are_refused(tensors: dict[str, npt.NDArray[Any]]) -> None:
    try:
        request = parse_request(tensors, SCHEMA, NOW)
    except InvalidRequestError as error:
        message = str(error)
        assert any(name in message for name in ("user_id", *tensors, "history_"))
        assert message.endswith(".")
        assert "\n" not in message
    else:
        check_request(request)


@pytest.mark.parametrize(
    "tensors",
    [
        {"user_id": text_tensor("\ud800")},
        {"user_id": text_tensor(b"1"), "request_time": text_tensor(b"now")},
        {"user_id": text_tensor(b"1"), "request_time": np.array([[math.nan]])},
        {"user_id": text_tensor(b"1"), "top_k": text_tensor(b"many")},
        {"user_id": text_tensor(b"1"), "candidates": text_tensor(b"all")},
        {"user_id": text_tensor(b"1"), "candidates": np.array([[1.5]])},
        {"user_id": text_tensor(b"1")}
        | {f"history_{name}": text_tensor(b"x") for name in ("items", "actions", "times")},
    ],
    ids=["surrogate", "time_text", "time_nan", "top_k_text", "candidates_text", "candidates_float", "history_text"],
)
def test_tensors_of_another_type_are_refused(tensors: dict[str, npt.NDArray[Any]]) -> None:
    with pytest.raises(InvalidRequestError, match=list(tensors)[-1].split("_")[0]):
        parse_request(tensors, SCHEMA, NOW)


PROFILE_TEXTS = [b"{}", b'{"age": 3.5, "gender": "F"}']
VALID: dict[str, Callable[[st.DataObject, int], npt.NDArray[Any]]] = {
    "candidates": lambda data, _: np.array([data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9))]),
    "request_time": lambda _, time: np.array([[time]]),
    "profile": lambda data, _: np.array(
        [[data.draw(st.sampled_from([b"{}", b'{"age": 3.5, "gender": "F"}']))]], object
    ),
    "strategy": lambda data, _: text_tensor(data.draw(st.sampled_from(STRATEGY_NAMES)).encode()),
    "top_k": lambda data, _: np.array([[data.draw(st.integers(1, MAX_TOP_K))]], dtype=np.int32),
}


@given(data=st.data(), time=st.integers(0, NOW + MAX_CLOCK_SKEW), names=st.sets(st.sampled_from(sorted(VALID))))
def test_valid_tensors_parse(data: st.DataObject, time: int, names: set[str]) -> None:
    """The control of the test above: not everything is refused, and what was sent is what is understood."""
    names |= {"request_time"}
    events = data.draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9), st.integers(0, time)), max_size=9))
    items, actions, times = (np.array([[event[index] for event in events]], dtype=np.int64) for index in range(3))
    tensors = {"user_id": text_tensor("é".encode())}
    tensors |= {"history_items": items, "history_actions": actions.astype(np.int32), "history_times": times}
    tensors |= {name: VALID[name](data, time) for name in names}
    request = parse_request(tensors, SCHEMA, NOW)
    check_request(request)
    assert request.user_id == "é"
    assert request.request_time == time
    assert request.history is not None
    # Python's sort keeps the order of equal times, as the history's must.
    ordered = sorted(events, key=lambda event: event[2])
    parsed = zip(request.history.items, request.history.actions, request.history.times, strict=True)
    assert [tuple(int(value) for value in event) for event in parsed] == ordered
    if "candidates" in names:
        assert request.candidates is not None
        assert request.candidates.tolist() == list(dict.fromkeys(tensors["candidates"][0].tolist()))
    assert (request.top_k is None) == ("top_k" not in names)


# The user's state


def random_events(
    generator: np.random.Generator, count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Items, actions and ascending times; items repeat, and unknown ones and actions occur."""
    items = generator.integers(UNKNOWN, SCHEMA.num_items, count)
    actions = generator.integers(0, NUM_ACTIONS + 1, count).astype(np.int32)
    return items, actions, np.sort(generator.integers(EPOCH, EPOCH + DAYS * 86_400, count))


def random_state(seed: int, count: int, wait: int) -> CandidateState:
    items, actions, times = random_events(np.random.default_rng(seed), count)
    last = int(times[-1]) if count else EPOCH
    return build_candidate_state(SCHEMA, CATALOG, items, actions, times, last + wait, count + len(SCHEMA.profile))


STATES = st.builds(random_state, st.integers(0, 10_000), st.integers(0, 60), st.integers(0, 10**8))


@settings(deadline=None)
@given(state=STATES)
def test_state_survives_its_tensor(state: CandidateState) -> None:
    array = state.to_array(EPOCH)
    assert array.dtype == np.int32
    assert array.ndim == 1
    read = CandidateState.from_array(array, EPOCH)
    for field in dataclasses.fields(CandidateState):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(state, field.name), err_msg=field.name)
    items = np.arange(UNKNOWN, SCHEMA.num_items)
    np.testing.assert_array_equal(
        candidate_rows(SCHEMA, CATALOG, read, items), candidate_rows(SCHEMA, CATALOG, state, items)
    )


@settings(deadline=None)
@given(state=STATES, columns=st.permutations(CANDIDATE_COLUMNS[2:]))
def test_candidate_rows_stay_within_the_columns(state: CandidateState, columns: list[str]) -> None:
    schema = dataclasses.replace(SCHEMA, candidate_columns=("item", TIME, *columns), width=4 + len(columns))
    rows = candidate_rows(schema, CATALOG, state, np.arange(UNKNOWN, SCHEMA.num_items))
    assert (rows[:, TYPE_COLUMN] == TokenType.CANDIDATE).all()
    assert rows[:, SLOT_COLUMN].tolist() == [state.context_length + index for index in range(len(rows))]
    for index, name in enumerate(schema.candidate_columns, start=FIRST_COLUMN):
        column = rows[:, index]
        assert column.min() >= 0
        if name != TIME:
            assert column.max() < schema.column_size(name), name


def test_times_before_the_epoch_become_the_epoch() -> None:
    """Rows clip times in the same way, so the state may."""
    state = random_state(seed=1, count=5, wait=10)
    later = EPOCH + 2 * DAYS * 86_400
    read = CandidateState.from_array(state.to_array(later), later)
    assert read.first_time == read.last_time == read.request_time == later
    assert (read.seen_times == later).all()


@pytest.mark.parametrize(
    "damage", ["empty", "short", "another_version", "odd_length", "negative_categories", "missing_categories"]
)
def test_damaged_states_are_refused(damage: str) -> None:
    array = random_state(seed=1, count=5, wait=10).to_array(EPOCH)
    if damage == "empty":
        array = array[:0]
    elif damage == "short":
        array = array[:5]
    elif damage == "another_version":
        array[0] += 1
    elif damage == "odd_length":
        array = array[:-1]
    else:
        array[9] = -1
    with pytest.raises(ConfigurationError, match="candidate_state"):
        CandidateState.from_array(array, EPOCH)


def test_states_without_their_categories_are_refused() -> None:
    array = random_state(seed=1, count=5, wait=10).to_array(EPOCH)
    with pytest.raises(ConfigurationError, match="candidate_state"):
        CandidateState.from_array(array[:11], EPOCH)


def test_a_state_of_another_catalogue_is_refused() -> None:
    """Loops would read beyond its sums of categories."""
    state = random_state(seed=1, count=5, wait=10)
    other = dataclasses.replace(
        state, category_events=state.category_events[:0], category_liked=state.category_liked[:0]
    )
    with pytest.raises(ConfigurationError, match="another catalogue"):
        candidate_rows(SCHEMA, CATALOG, other, np.arange(UNKNOWN, SCHEMA.num_items))
