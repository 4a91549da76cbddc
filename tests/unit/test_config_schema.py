"""Configs, schema and catalogue: what is written down, bounded, or refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

from mtgr.checkpoint import build_model
from mtgr.config import ModelConfig, preset, preset_names
from mtgr.errors import ConfigurationError
from mtgr.features.catalog import SNAPSHOT_PERIOD, ItemCatalog, snapshot_of
from mtgr.model.hstu import HSTUBlock
from mtgr.schema import (
    CANDIDATE_COLUMNS,
    EVENT_COLUMNS,
    FIRST_ID,
    ROW_FORMAT,
    TIME,
    UNKNOWN,
    ProfileField,
    Schema,
    TaskSpec,
)
from tests.unit.models import EPOCH, NUM_ACTIONS, small_catalog, small_config, small_schema

SCHEMA = small_schema()
CATALOG = small_catalog()


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
    for change in ({"categories": CATALOG.categories[:-1]}, {"popularity": CATALOG.popularity.astype(np.int32)}):
        dataclasses.replace(CATALOG, **change).save(path)
        with pytest.raises(ConfigurationError, match="do not fit"):
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
    last = len(CATALOG.popularity) - 1
    index = snapshot_of(time, CATALOG.first_snapshot, last + 1)
    assert 0 <= index <= last
    start = CATALOG.first_snapshot + index * SNAPSHOT_PERIOD
    assert start <= time or index == 0
    assert time < start + SNAPSHOT_PERIOD or index == last
