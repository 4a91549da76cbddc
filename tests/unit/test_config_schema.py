"""Configs, schema, catalogue, buckets, requests and state: what is written down, bounded, or refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

from mtgr import files
from mtgr.checkpoint import build_model
from mtgr.config import ModelConfig, preset, preset_names
from mtgr.errors import ConfigurationError, InvalidRequestError
from mtgr.features.buckets import hour_bucket, log_bucket, rate_bucket
from mtgr.features.candidates import CandidateState, build_candidate_state, candidate_rows
from mtgr.features.catalog import SNAPSHOT_PERIOD, ItemCatalog
from mtgr.features.request import (
    MAX_CANDIDATES,
    MAX_CLOCK_SKEW,
    MAX_EVENTS,
    MAX_TOP_K,
    STRATEGY_NAMES,
    Request,
    parse_request,
)
from mtgr.files import replaced_directory
from mtgr.model.hstu import HSTUBlock
from mtgr.schema import (
    CANDIDATE_COLUMNS,
    EVENT_COLUMNS,
    FIRST_COLUMN,
    FIRST_ID,
    HOUR_SIZE,
    LOG_COUNT_SIZE,
    LOG_SECONDS_SIZE,
    RATE_SIZE,
    ROW_FORMAT,
    SLOT_COLUMN,
    TIME,
    TYPE_COLUMN,
    UNKNOWN,
    ProfileField,
    Schema,
    TaskSpec,
    TokenType,
)
from tests.unit.models import DAYS, EPOCH, NUM_ACTIONS, small_catalog, small_config, small_schema

SCHEMA = small_schema()
CATALOG = small_catalog()
NOW = EPOCH + 30 * 86_400


# Model config


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "millions"),
    [
        ("tiny", 2, 96, 3, 0.092),
        ("small", 3, 512, 2, 3.93),
        ("medium", 5, 768, 3, 14.7),
        ("large", 15, 768, 3, 44.2),
        ("xlarge", 22, 1024, 8, 115.3),
        ("8b", 24, 8192, 64, 8050.0),
    ],
)
def test_presets_have_the_published_sizes(name: str, layers: int, width: int, heads: int, millions: float) -> None:
    config = preset(name)
    assert (config.num_layers, config.d_model, config.num_heads) == (layers, width, heads)
    assert config.block_parameters == pytest.approx(millions * 1e6, rel=0.01)
    with torch.device("meta"):
        block = HSTUBlock(config)
    weights = sum(layer.weight.numel() for layer in (block.uvqk, block.output))
    assert layers * weights == config.block_parameters


def test_preset_names_are_the_presets_and_hold_the_longest_context() -> None:
    assert preset_names() == ("tiny", "small", "medium", "large", "xlarge", "8b")
    longest = small_schema(max_history=1900)
    for name in preset_names():
        assert longest.max_context < preset(name).max_positions


def test_presets_take_overrides_and_refuse_what_they_do_not_know() -> None:
    assert preset("tiny", num_layers=5) == dataclasses.replace(preset("tiny"), num_layers=5)
    with pytest.raises(ConfigurationError, match="huge"):
        preset("huge")
    with pytest.raises(ConfigurationError, match="layers"):
        preset("tiny", layers=5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in (
            "num_layers",
            "d_model",
            "num_heads",
            "attention_norm_length",
            "max_positions",
            "time_buckets",
            "feature_dim",
            "item_dim",
            "num_experts",
            "head_dim",
            "retrieve_count",
        )
        for value in (0, -1, 1.5, "3", True, None)
    ]
    + [("dqk", -1), ("dqk", 2.0), ("dv", -8), ("dv", "8")]
    + [("norm_epsilon", value) for value in (0.0, -1e-6, 1.0, math.nan)]
    + [("temperature", value) for value in (0.0, -1.0, math.nan)]
    + [("dropout", value) for value in (-0.1, 1.0, math.nan)]
    + [("static_attention", "none"), ("static_attention", None), ("heads", "single"), ("num_heads", 5)],
)
def test_invalid_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=name):
        ModelConfig.from_dict({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm_epsilon", "1e-6"),
        ("norm_epsilon", None),
        ("temperature", "1"),
        ("temperature", math.inf),
        ("dropout", "0"),
    ],
)
def test_values_that_are_no_numbers_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=name):
        ModelConfig.from_dict({name: value})


def test_head_widths_follow_the_model_width_unless_given() -> None:
    assert (ModelConfig(d_model=96, num_heads=3).dqk, ModelConfig(d_model=96, num_heads=3).dv) == (32, 32)
    config = ModelConfig(d_model=10, num_heads=3, dqk=4, dv=7)
    assert config.block_parameters == 2 * (10 * 3 * 2 * (4 + 7) + 3 * 7 * 10)


@pytest.mark.parametrize("name", preset_names())
def test_config_survives_json(name: str) -> None:
    config = preset(name, static_attention="causal", relative_bias=True)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_config_keys_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="n_layers"):
        ModelConfig.from_dict({"n_layers": 2})


def test_contexts_that_outgrow_the_position_table_are_refused() -> None:
    """Candidates stand one further than the last context token, so the table needs one row more than contexts."""
    fits = small_config(max_positions=SCHEMA.max_context + 1)
    assert build_model(fits, SCHEMA, CATALOG).embedding.position_table.num_embeddings == SCHEMA.max_context + 1
    with pytest.raises(ConfigurationError, match="max_positions"):
        build_model(small_config(max_positions=SCHEMA.max_context), SCHEMA, CATALOG)


# Schema

CHANGES: dict[str, Any] = {
    "name": "other",
    "epoch": EPOCH + 1,
    "profile": (ProfileField("gender", values=("M", "F")), *SCHEMA.profile[1:]),
    "num_items": 41,
    "items_hash": "0" * 64,
    "num_actions": 6,
    "liked_action": 2,
    "categories": ("action", "drama", "comedy"),
    "tasks": (TaskSpec("engagement", "another definition"), *SCHEMA.tasks[1:]),
    "width": 9,
    "event_columns": ("item", "time", "action"),
    "candidate_columns": ("item", "time", "gap"),
    "max_history": 300,
    "realtime_step": 50,
    "operations": ("rank",),
}


def test_schema_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    SCHEMA.save(path)
    loaded = Schema.load(path)
    assert loaded == SCHEMA
    assert loaded.hash == SCHEMA.hash
    assert len(SCHEMA.hash) == 64
    assert os.listdir(tmp_path) == ["schema.json"]


def test_every_field_counts_in_the_schema_hash() -> None:
    assert set(CHANGES) == {field.name for field in dataclasses.fields(Schema)}
    hashes = {dataclasses.replace(SCHEMA, **{name: value}).hash for name, value in CHANGES.items()}
    assert len(hashes | {SCHEMA.hash}) == len(CHANGES) + 1


def test_the_row_format_counts_in_the_schema_hash() -> None:
    before = SCHEMA.hash
    with mock.patch("mtgr.schema.ROW_FORMAT", ROW_FORMAT + 1):
        assert SCHEMA.hash != before


@pytest.mark.parametrize("row_format", [ROW_FORMAT + 1, 0, None, str(ROW_FORMAT)])
def test_another_row_format_is_refused(row_format: object) -> None:
    with pytest.raises(ConfigurationError, match="row format"):
        Schema.from_dict(SCHEMA.to_dict() | {"row_format": row_format})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"event_columns": ("item", "time", "colour")}, "event_columns"),
        ({"event_columns": ("time", "item")}, "begin"),
        ({"candidate_columns": ("item", "time", "action")}, "candidate_columns"),
        ({"candidate_columns": ("item", "time", "gap", "gap")}, "distinct"),
        ({"candidate_columns": ("gap", "item", "time")}, "begin"),
        ({"width": 6}, "width 6 is too small"),
        ({"max_history": 150}, "multiple"),
        ({"max_history": -100}, "multiple"),
        ({"realtime_step": 0}, "multiple"),
        ({"tasks": ()}, "tasks"),
        ({"profile": ()}, "profile"),
        ({"num_items": 1}, "items"),
        ({"num_actions": 0}, "actions"),
    ],
)
def test_invalid_schemas_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        dataclasses.replace(SCHEMA, **change)


@pytest.mark.parametrize(
    "field",
    [
        {"name": "both", "values": ("a",), "boundaries": (1.0,)},
        {"name": "neither"},
        {"name": "twice", "values": ("a", "a")},
        {"name": "falling", "boundaries": (2.0, 1.0)},
        {"name": "equal", "boundaries": (1.0, 1.0)},
    ],
    ids=lambda field: str(field["name"]),
)
def test_invalid_profile_fields_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=field["name"]):
        ProfileField(**field)


def test_damaged_schema_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        Schema.load(tmp_path / "schema.json")
    (tmp_path / "schema.json").write_text("{")
    with pytest.raises(ConfigurationError, match="not valid JSON"):
        Schema.load(tmp_path / "schema.json")
    for key in ("profile", "tasks", "epoch"):
        values = SCHEMA.to_dict()
        del values[key]
        with pytest.raises(ConfigurationError, match=key):
            Schema.from_dict(values)
    with pytest.raises(ConfigurationError, match="colour"):
        Schema.from_dict(SCHEMA.to_dict() | {"colour": 1})


def test_every_known_column_has_a_size() -> None:
    for name in {*EVENT_COLUMNS, *CANDIDATE_COLUMNS} - {TIME}:
        assert SCHEMA.column_size(name) > FIRST_ID
    assert SCHEMA.column_size("item") == SCHEMA.num_items
    assert SCHEMA.column_size("action") == FIRST_ID + NUM_ACTIONS
    # Absent and unknown; then each field's own unknown and its values, or one bucket more than boundaries.
    assert SCHEMA.profile_size == 2 + (1 + 2) + (1 + 4) + (1 + 4)


# Item catalogue


def test_catalog_survives_its_file(tmp_path: Path) -> None:
    CATALOG.save(tmp_path / "catalog")
    loaded = ItemCatalog.load(tmp_path / "catalog")
    assert loaded.hash == CATALOG.hash == SCHEMA.items_hash
    for field in dataclasses.fields(ItemCatalog):
        expected, actual = getattr(CATALOG, field.name), getattr(loaded, field.name)
        np.testing.assert_array_equal(actual, expected, err_msg=field.name)
        if isinstance(expected, np.ndarray):
            assert actual.dtype == expected.dtype


def test_damaged_catalogs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalog"
    with pytest.raises(ConfigurationError, match="does not exist"):
        ItemCatalog.load(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ConfigurationError, match="not an item catalog"):
        ItemCatalog.load(path)
    for name in ("raw_ids", "first_snapshot"):
        CATALOG.save(path)
        arrays = load_file(path)
        del arrays[name]
        save_file(arrays, path)
        with pytest.raises(ConfigurationError, match=name):
            ItemCatalog.load(path)


@given(raw=hnp.arrays(np.int64, st.integers(0, 20), elements=st.integers(-(2**63), 2**63 - 1) | st.integers(0, 150)))
def test_raw_ids_map_to_internal_ids_and_back(raw: npt.NDArray[np.int64]) -> None:
    internal = CATALOG.to_internal(raw)
    known = np.isin(raw, CATALOG.raw_ids)
    assert (internal[~known] == UNKNOWN).all()
    assert ((internal[known] >= FIRST_ID) & (internal[known] < CATALOG.num_items)).all()
    np.testing.assert_array_equal(CATALOG.to_raw(internal[known]), raw[known])


def test_all_internal_ids_map_to_raw_ids_and_back() -> None:
    internal = np.arange(FIRST_ID, CATALOG.num_items)
    np.testing.assert_array_equal(CATALOG.to_raw(internal), CATALOG.raw_ids)
    np.testing.assert_array_equal(CATALOG.to_internal(CATALOG.raw_ids), internal)


def test_the_item_hash_depends_on_ids_and_their_order() -> None:
    other = dataclasses.replace(CATALOG, raw_ids=CATALOG.raw_ids + 1)
    assert len({CATALOG.hash, other.hash, dataclasses.replace(CATALOG, raw_ids=CATALOG.raw_ids[::-1]).hash}) == 3


@given(time=st.integers(0, 2**40))
def test_snapshots_are_the_latest_one_not_after_a_time(time: int) -> None:
    index = int(CATALOG.snapshot(time))
    last = len(CATALOG.popularity) - 1
    assert 0 <= index <= last
    start = CATALOG.first_snapshot + index * SNAPSHOT_PERIOD
    assert start <= time or index == 0
    assert time < start + SNAPSHOT_PERIOD or index == last


# Directories that appear whole or not at all


def fill(directory: Path, text: str) -> None:
    (directory / "a").write_text(text)
    (directory / "deep").mkdir()
    (directory / "deep" / "b").write_text(text)


def test_a_directory_is_created_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "target"
    for text in ("first", "second"):
        with replaced_directory(target) as staging:
            assert os.listdir(staging) == []
            assert os.stat(staging).st_dev == os.stat(target.parent).st_dev
            fill(staging, text)
            if text == "first":
                assert not target.exists()
            else:
                assert (target / "a").read_text() == "first"
        assert (target / "a").read_text() == (target / "deep" / "b").read_text() == text
        assert os.listdir(target.parent) == ["target"]


def test_what_the_old_directory_held_is_gone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    with replaced_directory(target) as staging:
        (staging / "new").touch()
    assert os.listdir(target) == ["new"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "target"

    def interrupted() -> None:
        with replaced_directory(target) as staging:
            fill(staging, "half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert os.listdir(tmp_path) == []
    with replaced_directory(target) as staging:
        fill(staging, "whole")
    with pytest.raises(error):
        interrupted()
    assert os.listdir(tmp_path) == ["target"]
    assert (target / "a").read_text() == "whole"


def test_another_staging_root_leaves_the_parent_alone(tmp_path: Path) -> None:
    target, root = tmp_path / "repository" / "model", tmp_path / "staging"
    for text in ("first", "second"):
        with replaced_directory(target, root) as staging:
            assert staging.parent == root
            fill(staging, text)
            assert os.listdir(target.parent) == ([] if text == "first" else ["model"])
        assert (target / "a").read_text() == text
        assert not root.exists()


def test_without_an_atomic_exchange_the_directory_is_replaced_all_the_same(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with mock.patch.object(files, "_exchange", return_value=False):
        for text in ("first", "second"):
            with replaced_directory(target) as staging:
                fill(staging, text)
    assert (target / "a").read_text() == "second"
    assert os.listdir(tmp_path) == ["target"]


def test_a_concurrent_reader_never_finds_the_target_missing(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    if not files._exchange(tmp_path / "first", tmp_path / "second"):
        pytest.skip("the file system of the temporary directory cannot exchange two directories")
    target = tmp_path / "target"
    with replaced_directory(target) as staging:
        fill(staging, "0")
    done = threading.Event()
    looks = 0
    problems: list[str] = []

    def read() -> None:
        nonlocal looks
        while not done.is_set():
            looks += 1
            try:
                os.stat(target)
            except FileNotFoundError as error:
                problems.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        round_ = 0
        while round_ < 200 or looks < 1000:
            round_ += 1
            with replaced_directory(target) as staging:
                fill(staging, str(round_))
    finally:
        done.set()
        reader.join()
    assert problems == []
    assert (target / "a").read_text() == str(round_)


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
    bucket = int(hour_bucket(time))
    assert bucket == FIRST_ID + time % 86_400 // 3600 < HOUR_SIZE
    assert bucket == hour_bucket(time + 86_400)


@pytest.mark.parametrize(("time", "hour"), [(0, 0), (3599, 0), (3600, 1), (86_399, 23), (86_400, 0)])
def test_hour_buckets_at_their_edges(time: int, hour: int) -> None:
    assert hour_bucket(time) == FIRST_ID + hour


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
