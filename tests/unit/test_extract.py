"""Feature extraction: only what happened strictly before the request is used, and what a request brings along wins."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mtgr.errors import InvalidRequestError, UnavailableError
from mtgr.features.context import context_rows
from mtgr.features.extract import FeatureExtractor, Features
from mtgr.features.state import NEVER, CandidateState, build_candidate_state
from mtgr.features.store import UserRecord
from mtgr.schema import FIRST_COLUMN, FIRST_ID, SLOT_COLUMN, TYPE_COLUMN, UNKNOWN, TokenType
from perf.features import BAR_MS, extraction_ms
from tests.unit.models import EPOCH, small_catalog, small_schema

SCHEMA = small_schema()
CATALOG = small_catalog()
NOW = EPOCH + 50_000
PROFILE = {"gender": "F", "age": 30, "city": "b"}
ITEMS = [10, 13, 999, 19]
ACTIONS = [4, 0, 2, 3]
TIMES = [EPOCH + second for second in (100, 200, 200, 300)]
NUM_PROFILE = len(SCHEMA.profile)


def user_record(
    items: list[int], actions: list[int], times: list[int], profile: dict[str, str | float] | None = None
) -> UserRecord:
    return UserRecord(
        profile or {},
        np.array(items, dtype=np.int64),
        np.array(actions, dtype=np.int32),
        np.array(times, dtype=np.int64),
    )


class MemoryStore:
    def __init__(self, **records: UserRecord) -> None:
        self.records = records

    def get(self, user_id: str) -> UserRecord | None:
        if user_id == "broken":
            raise UnavailableError("the feature store cannot be read (disk I/O error); try again later.")
        return self.records.get(user_id)


@pytest.fixture
def extractor() -> FeatureExtractor:
    store = MemoryStore(ann=user_record(ITEMS, ACTIONS, TIMES, PROFILE))
    return FeatureExtractor(SCHEMA, CATALOG, store, clock=lambda: NOW + 0.9)


def tensors(user_id: str = "ann", **values: Any) -> dict[str, npt.NDArray[Any]]:
    """The door's inputs."""
    dtypes = {"history_actions": np.int32, "top_k": np.int32}
    result: dict[str, npt.NDArray[Any]] = {"user_id": np.array([[user_id.encode()]], dtype=np.object_)}
    for name, value in values.items():
        if name == "profile":
            value = json.dumps(value)
        if isinstance(value, str):
            result[name] = np.array([[value.encode()]], dtype=np.object_)
        else:
            result[name] = np.atleast_1d(np.array(value, dtype=dtypes.get(name, np.int64)))[None]
    return result


def history(items: list[int], actions: list[int], times: list[int]) -> dict[str, list[int]]:
    return {"history_items": items, "history_actions": actions, "history_times": times}


def state_of(features: Features) -> CandidateState:
    return CandidateState.from_array(features.candidate_state, SCHEMA.epoch)


def assert_same(first: Features, second: Features, labels: bool = True) -> None:
    for name in ("context", "candidate_state", "candidates"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert (first.strategy, first.top_k) == (second.strategy, second.top_k)
    assert not labels or first.labels == second.labels


@pytest.mark.parametrize(
    ("second", "events"), [(0, 0), (100, 0), (101, 1), (200, 1), (201, 3), (300, 3), (301, 4), (40_000, 4)]
)
def test_only_events_strictly_before_the_request_are_used(
    extractor: FeatureExtractor, second: int, events: int
) -> None:
    request_time = EPOCH + second
    features = extractor.extract(tensors(request_time=request_time))
    items = CATALOG.to_internal(ITEMS[:events])
    actions, times = np.array(ACTIONS[:events], dtype=np.int32), np.array(TIMES[:events], dtype=np.int64)
    expected = context_rows(SCHEMA, PROFILE, items, actions, times)
    np.testing.assert_array_equal(features.context, expected)
    state = build_candidate_state(SCHEMA, CATALOG, items, actions, times, request_time, NUM_PROFILE + events)
    np.testing.assert_array_equal(features.candidate_state, state.to_array(SCHEMA.epoch))
    assert features.labels == (() if events else ("cold_start",))


def test_what_comes_after_the_request_changes_nothing() -> None:
    """A leak from the future would show here whatever it went through."""
    request_time = TIMES[-1]
    late = user_record([*ITEMS, 22, 25], [*ACTIONS, 4, 4], [*TIMES, request_time + 1, request_time + 5000], PROFILE)
    early = user_record(ITEMS[:3], ACTIONS[:3], TIMES[:3], PROFILE)
    answers = [
        FeatureExtractor(SCHEMA, CATALOG, MemoryStore(ann=record), clock=lambda: NOW).extract(
            tensors(request_time=request_time)
        )
        for record in (late, early)
    ]
    assert_same(*answers)


def test_the_clock_stands_in_for_the_request_time(extractor: FeatureExtractor) -> None:
    assert_same(extractor.extract(tensors()), extractor.extract(tensors(request_time=NOW)))
    assert state_of(extractor.extract(tensors())).request_time == NOW


def test_a_history_of_the_request_replaces_the_stored_one(extractor: FeatureExtractor) -> None:
    brought = history([22, 25], [1, 4], [EPOCH + 5, EPOCH + 6])
    features = extractor.extract(tensors(**brought))
    other = FeatureExtractor(
        SCHEMA,
        CATALOG,
        MemoryStore(ann=user_record(*brought.values(), PROFILE)),
        clock=lambda: NOW,
    )
    assert_same(features, other.extract(tensors()))
    assert not np.isin(CATALOG.to_internal(ITEMS[:2]), state_of(features).seen_items).any()


def test_an_empty_history_replaces_the_stored_one_too(extractor: FeatureExtractor) -> None:
    features = extractor.extract(tensors(**history([], [], [])))
    assert features.labels == ("cold_start",)
    assert len(features.context) == NUM_PROFILE
    assert_same(features, extractor.extract(tensors("nobody", profile=PROFILE)))
    state = state_of(features)
    assert (state.num_events, state.first_time, state.last_time) == (0, NEVER, NEVER)


def test_an_unsorted_history_is_sorted_and_one_second_keeps_its_order(extractor: FeatureExtractor) -> None:
    times = [EPOCH + second for second in (9, 5, 9, 1)]
    mixed = extractor.extract(tensors(**history([10, 13, 16, 19], [0, 1, 2, 3], times)))
    tidy = extractor.extract(tensors(**history([19, 13, 10, 16], [3, 1, 0, 2], sorted(times))))
    assert_same(mixed, tidy)
    swapped = extractor.extract(tensors(**history([19, 13, 16, 10], [3, 1, 2, 0], sorted(times))))
    assert not np.array_equal(mixed.context, swapped.context)


def test_profile_values_of_the_request_win_one_by_one(extractor: FeatureExtractor) -> None:
    features = extractor.extract(tensors(profile={"city": "d", "age": 60}))
    whole = {"gender": "F", "city": "d", "age": 60}
    empty = np.empty(0, dtype=np.int64)
    expected = context_rows(SCHEMA, whole, empty, empty.astype(np.int32), empty)
    np.testing.assert_array_equal(features.context[:NUM_PROFILE], expected)
    stored = extractor.extract(tensors())
    changed = features.context[:, FIRST_COLUMN] != stored.context[:, FIRST_COLUMN]
    names = [field.name for field in SCHEMA.profile]
    assert np.flatnonzero(changed).tolist() == sorted([names.index("city"), names.index("age")])


@pytest.mark.parametrize("profile", [{}, {"gender": "X", "age": "old", "city": 7}])
def test_unknown_profile_values_are_the_unknown_of_their_field(
    extractor: FeatureExtractor, profile: dict[str, Any]
) -> None:
    features = extractor.extract(tensors("nobody", profile=profile))
    offsets = FIRST_ID + np.cumsum([0, *(field.size for field in SCHEMA.profile[:-1])])
    np.testing.assert_array_equal(features.context[:, FIRST_COLUMN], offsets)


def test_unknown_items_and_actions_get_the_reserved_id(extractor: FeatureExtractor) -> None:
    features = extractor.extract(tensors(**history([10**15, 10], [2, 99], [EPOCH + 1, EPOCH + 2])))
    events = features.context[NUM_PROFILE:]
    columns = {name: index for index, name in enumerate(SCHEMA.event_columns, start=FIRST_COLUMN)}
    assert events[:, columns["item"]].tolist() == [UNKNOWN, int(CATALOG.to_internal(10))]
    assert events[:, columns["action"]].tolist() == [2 + FIRST_ID, UNKNOWN]


def test_a_user_nobody_knows_is_cold(extractor: FeatureExtractor) -> None:
    features = extractor.extract(tensors("nobody"))
    assert features.labels == ("cold_start",)
    assert features.context[:, TYPE_COLUMN].tolist() == [TokenType.PROFILE] * NUM_PROFILE
    assert state_of(features).context_length == NUM_PROFILE


@pytest.mark.parametrize("events", [0, 1, 99, 100, 101, 199, 200, 299, 300, 301, 450])
def test_segments_meet_at_multiples_of_the_step(extractor: FeatureExtractor, events: int) -> None:
    times = list(range(EPOCH, EPOCH + events))
    features = extractor.extract(tensors(**history([10] * events, [1] * events, times)))
    kinds = features.context[:, TYPE_COLUMN].tolist()
    static = events // 100 * 100
    assert kinds.count(TokenType.HISTORY) == min(static, SCHEMA.max_history)
    assert kinds.count(TokenType.REALTIME) == events - static
    assert kinds == sorted(kinds)
    assert features.context[:, SLOT_COLUMN].tolist() == list(range(len(kinds)))
    assert len(kinds) <= SCHEMA.max_context
    # The state counts all events, also those that the context has no room for.
    state = state_of(features)
    assert (state.num_events, state.context_length) == (events, len(kinds))


def test_the_context_stays_the_same_from_request_to_request(extractor: FeatureExtractor) -> None:
    first, second = (extractor.extract(tensors(request_time=EPOCH + second)) for second in (1000, 49_000))
    np.testing.assert_array_equal(first.context, second.context)
    assert not np.array_equal(first.candidate_state, second.candidate_state)


def test_candidates_are_ranked_once_in_order_of_first_appearance(extractor: FeatureExtractor) -> None:
    features = extractor.extract(tensors(candidates=[16, 10, 16, 13, 10]))
    assert features.candidates.tolist() == [16, 10, 13]
    assert len(extractor.extract(tensors()).candidates) == 0


def test_strategy_and_top_k_go_through(extractor: FeatureExtractor) -> None:
    assert (extractor.extract(tensors()).strategy, extractor.extract(tensors()).top_k) == ("auto", 0)
    features = extractor.extract(tensors(strategy="onnx", top_k=7))
    assert (features.strategy, features.top_k) == ("onnx", 7)


def test_no_id_is_ever_out_of_range(extractor: FeatureExtractor) -> None:
    generator = np.random.default_rng(3)
    for events in (1, 7, 250):
        times = np.sort(generator.integers(0, NOW, events))
        features = extractor.extract(
            tensors(
                **history(
                    generator.integers(0, 2**62, events).tolist(),
                    generator.integers(0, 2**31 - 1, events).tolist(),
                    times.tolist(),
                )
            )
        )
        tokens = features.context[NUM_PROFILE:]
        for index, name in enumerate(SCHEMA.event_columns, start=FIRST_COLUMN):
            assert (tokens[:, index] >= 0).all()
            if name != "time":
                assert (tokens[:, index] < SCHEMA.column_size(name)).all()
        assert (features.context[:NUM_PROFILE, FIRST_COLUMN] < SCHEMA.profile_size).all()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"request_time": NOW + 86_401}, "request_time is"),
        ({"request_time": NOW * 1000}, "milliseconds"),
        ({"request_time": -1}, "request_time is -1"),
        ({"candidates": []}, "candidates is empty"),
        ({"candidates": [1, -1]}, "candidates holds -1 at index 1"),
        ({"history_items": [10]}, "history_actions is missing"),
        (history([10], [1], [NOW + 1]), "history_times holds"),
        (history([10], [1, 2], [NOW, NOW]), "lengths 1, 2, 2"),
        ({"profile": {"height": 2}}, "unknown field 'height'; known are gender, age, city"),
        ({"profile": [1]}, "not a JSON object"),
        ({"strategy": "gpu"}, "one of auto, baseline, onnx, tensorrt, vllm"),
        ({"top_k": 0}, "top_k is 0; it must lie between 1 and 16384"),
        ({"top_k": [1, 2]}, "top_k has 2 values"),
    ],
)
def test_wrong_requests_are_refused(extractor: FeatureExtractor, values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        extractor.extract(tensors(**values))
    assert words in str(caught.value)


def test_integers_of_thousands_of_digits_are_no_crash(extractor: FeatureExtractor) -> None:
    request = tensors()
    request["profile"] = np.array([[b'{"age": ' + b"1" * 5000 + b"}"]], dtype=np.object_)
    with pytest.raises(InvalidRequestError, match="profile is not valid JSON"):
        extractor.extract(request)


def test_times_a_little_ahead_are_not_taken_for_milliseconds(extractor: FeatureExtractor) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        extractor.extract(tensors(request_time=NOW + 3 * 86_400))
    assert "milliseconds" not in str(caught.value)


def test_two_users_in_one_request_are_refused(extractor: FeatureExtractor) -> None:
    request = {name: np.repeat(array, 2, axis=0) for name, array in tensors(candidates=[10]).items()}
    with pytest.raises(InvalidRequestError, match=r"user_id has shape \[2, 1\]; its shape must be \[1, n\]"):
        extractor.extract(request)


def test_a_store_that_does_not_answer_leaves_what_the_request_brings(extractor: FeatureExtractor) -> None:
    brought = history(ITEMS, ACTIONS, TIMES)
    features = extractor.extract(tensors("broken", **brought, profile={"age": 30}))
    assert features.labels == ("features_unavailable",)
    assert_same(features, extractor.extract(tensors("nobody", **brought, profile={"age": 30})), labels=False)


def test_a_store_that_does_not_answer_leaves_a_cold_start(extractor: FeatureExtractor) -> None:
    features = extractor.extract(tensors("broken"))
    assert features.labels == ("features_unavailable", "cold_start")
    assert_same(features, extractor.extract(tensors("nobody")), labels=False)


def test_a_request_that_brings_everything_does_not_ask_the_store(extractor: FeatureExtractor) -> None:
    features = extractor.extract(tensors("broken", **history(ITEMS, ACTIONS, TIMES), profile=PROFILE))
    assert features.labels == ()
    assert_same(features, extractor.extract(tensors()))


def test_earlier_features_are_labelled() -> None:
    stale = dataclasses.replace(user_record(ITEMS, ACTIONS, TIMES, PROFILE), stale=True)
    extractor = FeatureExtractor(SCHEMA, CATALOG, MemoryStore(ann=stale), clock=lambda: NOW)
    assert extractor.extract(tensors()).labels == ("stale_features",)


def test_extraction_of_a_long_history_takes_less_than_a_millisecond() -> None:
    # The quickest of three rounds: others may be at work on the machine.
    medians = [np.median(extraction_ms(num_events=2048, num_items=2000, rounds=100)) for _ in range(3)]
    assert min(medians) < BAR_MS
