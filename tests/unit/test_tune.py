"""Tuning's settings: read and written in the real configs, and variants that leave the installed ones alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mtgr.errors import ConfigurationError
from mtgr.routing.policy import load_policy, profile_path
from perf.tune import (
    ENGINE_INSTANCES,
    MAX_RUNNING,
    Trial,
    current,
    get_delay,
    get_instances,
    get_threads,
    knobs,
    main,
    set_delay,
    set_instances,
    set_threads,
    wins,
    with_value,
    write_variant,
)

ROOT = Path(__file__).parents[2]
PROD = profile_path("prod")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The door's models and the engines' configs as they are installed, with an artifact each."""
    target = tmp_path / "repository"
    for model in ("mtgr", "mtgr_features", "mtgr_router"):
        shutil.copytree(ROOT / "model_repository" / model, target / model, ignore=shutil.ignore_patterns("bundle*"))
    for model in ("mtgr_baseline", "mtgr_onnx_rank", "mtgr_onnx_retrieve", "mtgr_vllm"):
        shutil.copytree(ROOT / "export" / "templates" / model, target / model)
        (target / model / "1").mkdir(exist_ok=True)
        (target / model / "1" / "artifact").write_text(model, encoding="utf-8")
    return target


@pytest.mark.parametrize("model", ["mtgr_baseline", "mtgr_onnx_rank", "mtgr_vllm"])
def test_settings_of_real_configs(repository: Path, model: str) -> None:
    text = (repository / model / "config.pbtxt").read_text(encoding="utf-8")
    assert (get_instances(text), get_threads(text), get_delay(text)) == (1, 1, None)
    changed = set_delay(set_threads(set_instances(text, 2), 4), 500)
    assert (get_instances(changed), get_threads(changed), get_delay(changed)) == (2, 4, 500)
    assert set_delay(set_threads(set_instances(changed, 1), 1), None) == text
    assert get_delay(set_delay(changed, 0)) == 0
    assert changed.count("dynamic_batching {") == 1 == set_delay(changed, 9).count("\ndynamic_batching {")


def test_what_is_set_is_found(repository: Path) -> None:
    found = current(repository, knobs(4), PROD)
    assert found["routing.max_batch"] == load_policy(PROD).routing.max_batch
    assert found["engine batcher delay (us)"] is None
    assert found["door instances"] == 1
    for model in ("mtgr_baseline", "mtgr_onnx_rank"):
        shutil.rmtree(repository / model)
    assert ENGINE_INSTANCES not in current(repository, knobs(4), PROD)


def test_a_variant_is_beside_what_is_installed(repository: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    every = knobs(4)
    settings = {**current(repository, every, PROD), "routing.max_batch": 3, "engine threads": 2}
    out = tmp_path / "variant"
    models = ["mtgr", "mtgr_features", "mtgr_router", "mtgr_onnx_rank", "mtgr_vllm"]
    for _ in range(2):  # a second one takes the place of the first
        write_variant(out, repository, PROD, models, every, settings, ["routing.max_batch", "engine threads"])
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in (out / "repository").iterdir()) == sorted(models)
    policy = load_policy(out / "policy.yaml")
    assert (policy.profile, policy.routing.max_batch) == ("prod", 3)
    assert policy.routing.max_running == load_policy(PROD).routing.max_running
    assert get_threads((out / "repository" / "mtgr_vllm" / "config.pbtxt").read_text(encoding="utf-8")) == 2
    rank = out / "repository" / "mtgr_onnx_rank"
    assert (rank / "1").is_symlink()
    assert (rank / "1" / "artifact").read_text(encoding="utf-8") == "mtgr_onnx_rank"
    untouched = out / "repository" / "mtgr_router" / "config.pbtxt"
    assert untouched.read_bytes() == (repository / "mtgr_router" / "config.pbtxt").read_bytes()


def test_a_variant_of_ones_own_policy_keeps_it(repository: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: test\nrouting: { max_batch: 5, default_top_k: 7 }\n", encoding="utf-8")
    every = knobs(2)
    settings = {**current(repository, every, own), MAX_RUNNING: 3}
    write_variant(tmp_path / "variant", repository, own, ["mtgr"], every, settings, [MAX_RUNNING])
    policy = load_policy(tmp_path / "variant" / "policy.yaml")
    assert policy.profile == "test"
    assert (policy.routing.max_batch, policy.routing.default_top_k, policy.routing.max_running) == (5, 7, 3)


def test_engine_processes_are_given_calls() -> None:
    settings = {MAX_RUNNING: 1, ENGINE_INSTANCES: 1}
    assert with_value(settings, ENGINE_INSTANCES, 2) == {MAX_RUNNING: 3, ENGINE_INSTANCES: 2}
    assert with_value({**settings, MAX_RUNNING: 4}, ENGINE_INSTANCES, 2)[MAX_RUNNING] == 4
    assert settings == {MAX_RUNNING: 1, ENGINE_INSTANCES: 1}


def test_noise_does_not_win() -> None:
    assert wins([1.05, 1.04, 1.2])
    assert not wins([1.3, 1.2, 0.99])
    assert not wins([1.01, 1.02, 1.029])
    assert not wins([])


def test_a_trial_says_what_it_changes() -> None:
    trial = Trial("engine batcher delay (us)", None, 500, (1.1, 1.2, 1.3), (100.0, 120.0), True)
    assert (
        str(trial) == "engine batcher delay (us): off -> 500: 100.0 -> 120.0/s, +20.0% (+10.0% to +30.0%): taken over"
    )
    failed = Trial("engine threads", 1, 2, (), (0.0, 0.0), False, "port 1 is in use")
    assert str(failed).endswith("1 -> 2: not measured: port 1 is in use")


@pytest.mark.parametrize("place", ["model_repository", "model_repository/mtgr_router", "mtgr/routing/profiles", "."])
def test_what_is_installed_is_never_written(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(ROOT / place)]) == 2
    assert "would overwrite what is installed" in capsys.readouterr().err


def test_unknown_settings_are_named(repository: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--model-repository", str(repository), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--knob", "colour"]) == 2
    assert "no setting is called colour; there are routing.max_running" in capsys.readouterr().err
    assert main([*arguments, "--rounds", "0"]) == 2
    with pytest.raises(ConfigurationError, match="it must have one"):
        set_instances("", 2)
