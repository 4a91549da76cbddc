"""Manifests, and whether an installed artifact belongs to the installed schema."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from mtgr.errors import ConfigurationError
from mtgr.manifest import MANIFEST_FILE, Manifest, latest_version
from mtgr.routing.readiness import artifact_problem, largest_batch
from mtgr.routing.strategies import STRATEGIES, Strategy
from tests.conftest import ROOT

SCHEMA_HASH = "ab" * 32
MODEL = "mtgr_onnx_rank"


def manifest(schema: str = SCHEMA_HASH) -> Manifest:
    return Manifest(
        model=MODEL,
        checkpoint="cd" * 32,
        schema=schema,
        precision="fp32",
        versions={"torch": "2.0"},
        shapes={"context": ["int32", -1, -1, 8]},
        parity={"max_abs_error": 1e-7, "shapes": [[1, 1, 1]]},
        details={"nodes": 3},
    )


def install(repository: Path, version: int = 1, schema: str = SCHEMA_HASH) -> Path:
    directory = repository / MODEL / str(version)
    directory.mkdir(parents=True)
    manifest(schema).save(directory)
    return directory


def test_manifest_round_trip(tmp_path: Path) -> None:
    manifest().save(tmp_path)
    assert Manifest.load(tmp_path) == manifest()
    assert json.loads((tmp_path / MANIFEST_FILE).read_text())["parity"]["max_abs_error"] == 1e-7


def test_a_missing_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": "m"}', "null", "\x00\xff"])
def test_damaged_manifests_are_errors(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(ConfigurationError):
        Manifest.load(tmp_path)


def test_keys_of_a_later_release_are_not_ignored(tmp_path: Path) -> None:
    manifest().save(tmp_path)
    values = json.loads((tmp_path / MANIFEST_FILE).read_text())
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(values | {"quantization": "int8"}))
    with pytest.raises(ConfigurationError, match="is not a manifest"):
        Manifest.load(tmp_path)


def test_the_highest_version_counts_as_a_number(tmp_path: Path) -> None:
    assert latest_version(tmp_path / "nothing") is None
    for name in ("2", "10", "9", "staging", ".1"):
        (tmp_path / name).mkdir()
    (tmp_path / "11").write_text("a file is no version")
    assert latest_version(tmp_path) == tmp_path / "10"


def test_a_fitting_artifact_has_no_problem(tmp_path: Path) -> None:
    install(tmp_path)
    assert artifact_problem(tmp_path, MODEL, SCHEMA_HASH) is None


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_missing_artifact_names_what_installs_it(tmp_path: Path, strategy: object) -> None:
    for model in strategy.models:
        assert artifact_problem(tmp_path, model, SCHEMA_HASH) == f"{model} is not installed ({strategy.remedy})"


def test_a_directory_without_version_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / MODEL).mkdir()
    assert "is not installed" in (artifact_problem(tmp_path, MODEL, SCHEMA_HASH) or "")


def test_an_artifact_without_manifest_says_so(tmp_path: Path) -> None:
    (install(tmp_path) / MANIFEST_FILE).unlink()
    problem = artifact_problem(tmp_path, MODEL, SCHEMA_HASH)
    assert problem is not None
    assert "no usable manifest" in problem
    assert "make export" in problem


def test_another_schema_is_a_problem_and_only_the_highest_version_counts(tmp_path: Path) -> None:
    install(tmp_path, 1)
    install(tmp_path, 2, schema="of another model")
    assert artifact_problem(tmp_path, MODEL, SCHEMA_HASH) == (
        f"{MODEL} was exported for another schema (run `make export`, and restart the server)"
    )
    install(tmp_path, 3)
    assert artifact_problem(tmp_path, MODEL, SCHEMA_HASH) is None


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_what_a_user_is_told_to_run_exists(strategy: Strategy) -> None:
    if strategy.setup is not None:
        for target in strategy.setup.removeprefix("make ").split():
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_largest_batch_is_that_of_the_version(tmp_path: Path) -> None:
    assert largest_batch(tmp_path, MODEL) is None  # nothing is installed
    directory = install(tmp_path)
    assert largest_batch(tmp_path, MODEL) is None
    dataclasses.replace(manifest(), details={"options": {"max_batch": 1}}).save(directory)
    install(tmp_path, version=2)
    assert largest_batch(tmp_path, MODEL) is None
    assert largest_batch(tmp_path, f"{MODEL}@1") == 1
    (directory / MANIFEST_FILE).write_text("{")
    assert largest_batch(tmp_path, f"{MODEL}@1") is None
