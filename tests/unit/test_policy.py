"""Policy files: complete profiles, strict parsing, and reloading that never takes a wrong file over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from mtgr.errors import ConfigurationError
from mtgr.routing.policy import PROFILES, Policy, load_policy, load_profile, policy_file, profile_path
from mtgr.routing.reload import PolicyFile


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_have_every_switch(name: str) -> None:
    policy = load_profile(name)
    assert policy.profile == name
    values = yaml.safe_load(profile_path(name).read_text(encoding="utf-8"))

    def compare(found: object, kind: object, path: str) -> None:
        fields = getattr(kind, "__dataclass_fields__", None)
        if fields is not None and isinstance(found, dict):
            assert set(found) == set(fields), f"{path} leaves a setting open"
            for key in fields:
                compare(found[key], getattr(kind, key), f"{path}.{key}")

    compare(values, policy, name)


def test_the_three_profiles_differ_as_they_should() -> None:
    dev, test, prod = (load_profile(name) for name in PROFILES)
    assert dev.auto.order[0] == "baseline"
    assert (dev.log.level, dev.routing.max_batch, dev.monitoring, dev.alerting) == ("debug", 1, False, False)
    assert test.auto.order == ("tensorrt", "onnx")
    assert (test.routing.max_batch, test.monitoring, test.timed_run_seconds) == (4, True, 300)
    assert prod.auto.adaptive
    assert (prod.monitoring, prod.alerting, prod.routing.max_batch, prod.admission.max_concurrent) == (
        True,
        True,
        8,
        256,
    )


def test_a_users_file_changes_what_it_names(tmp_path: Path) -> None:
    text = """
    extends: dev
    routing: { task_weights: { engagement: 2 }, max_batch: 16 }
    experiment:
      name: rollout
      arms: [ { name: control, weight: 9 }, { name: vllm, weight: 1, strategy: vllm, version: 2 } ]
    shadow: { strategy: onnx, share: 0.5 }
    """
    policy = load_policy(write(tmp_path / "policy.yaml", text))
    assert policy.profile == "dev"
    assert (policy.routing.max_batch, policy.routing.rank_limit) == (16, 256)
    assert policy.routing.task_weights == {"engagement": 2.0, "retention": 0.1, "monetization": 0.5}
    assert policy.experiment is not None
    assert [arm.weight for arm in policy.experiment.arms] == [9.0, 1.0]
    arm = policy.arm_settings("vllm")
    assert arm is not None
    assert (arm.strategy, arm.version) == ("vllm", 2)
    assert policy.arm_settings("gone") is None
    assert {policy.arm(f"user-{index}") for index in range(200)} == {"control", "vllm"}
    assert load_profile("prod").arm("anybody") == "default"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rooting: {}", "rooting is not a setting; choose out of"),
        ("routing: { max_bach: 1 }", "routing.max_bach is not a setting"),
        ("routing: { max_batch: 1.5 }", "routing.max_batch is 1.5; it must be an integer"),
        ("routing: { max_batch: true }", "routing.max_batch is True; it must be an integer"),
        ("routing: { max_batch: 0 }", "max_batch is 0; it must be at least 1"),
        ("routing: { task_weights: { engagement: a } }", "routing.task_weights.engagement is 'a'; it must be a number"),
        ("routing: [1]", r"routing is \[1\]; it must be a mapping"),
        ("alerting: 1", "alerting is 1; it must be true or false"),
        ("auto: { order: onnx }", "auto.order is 'onnx'; it must be a list"),
        ("auto: { order: [gpu] }", r"order is \['gpu'\]; it must hold some of"),
        ("log: { level: loud }", "level is 'loud'; it must be one of"),
        ("profile: staging", "profile is 'staging'; it must be one of"),
        ("extends: policy.yaml", "extends is 'policy.yaml'; it must be one of dev, test, prod"),
        ("deadline_seconds: 0", "deadline_seconds is 0.0; it must be positive"),
        ("experiment: { name: x }", "experiment.arms is missing"),
        ("experiment: { name: x, arms: [ { nam: a } ] }", r"experiment.arms\[0\].nam is not a setting"),
        ("breaker: { probes: 0 }", "probes is 0; it must be at least 1"),
        ("alerting: true\nalerting: false", "key 'alerting' is there twice"),
        ("a: &x [1]\nb: *x", "aliases are not allowed"),
        ("1: 2", "key 1 is not text"),
        ("- 1", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("a: " + "[" * 5000, "is not YAML"),
        ("# " + "x" * (65 << 10), "is larger than 64 KiB"),
    ],
    ids=lambda value: value[:30],
)
def test_mistakes_name_the_file_and_the_key(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path / "policy.yaml", text)
    with pytest.raises(ConfigurationError, match=words) as caught:
        load_policy(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_policy(tmp_path / "nothing.yaml")


def test_the_environment_comes_before_the_config() -> None:
    parameters = {"profile": "test", "policy": "/a.yaml"}
    assert policy_file(parameters, {"MTGR_POLICY": "/b.yaml"}) == Path("/b.yaml")
    assert policy_file(parameters, {}) == Path("/a.yaml")
    assert policy_file({"profile": "test", "policy": ""}, {"MTGR_PROFILE": "dev"}) == profile_path("dev")
    assert policy_file({"profile": "test"}, {}) == profile_path("test")
    assert policy_file({}, {}) == profile_path("prod")
    with pytest.raises(ConfigurationError, match="profile is 'staging'"):
        policy_file({"profile": "staging"}, {})
    with pytest.raises(ConfigurationError, match="unknown parameter 'polcy'"):
        policy_file({"polcy": "x"}, {})


def replace(path: Path, text: str) -> None:
    """By renaming, as careful writers do."""
    write(path.with_suffix(".new"), text)
    os.replace(path.with_suffix(".new"), path)


def test_a_changed_file_is_taken_over_and_a_wrong_one_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "policy.yaml", "routing: { max_batch: 3 }")
    file = PolicyFile(path)

    def batch() -> int:
        policy: Policy = file.current
        return policy.routing.max_batch

    assert not file.poll()
    replace(path, "routing: { max_batch: 5 }")
    assert file.poll()
    assert (batch(), file.problem, file.reloads, file.refusals) == (5, None, 1, 0)
    replace(path, "routing: { max_batch: many }")
    assert file.poll()
    assert batch() == 5
    assert file.problem is not None
    assert "max_batch is 'many'" in file.problem
    assert not file.poll()  # said once
    path.unlink()
    assert file.poll()
    assert "cannot be read" in (file.problem or "")
    assert batch() == 5
    write(path, "routing: { max_batch: 7 }")
    assert file.poll()
    assert (batch(), file.problem, file.refusals) == (7, None, 2)


def test_a_file_that_is_wrong_to_begin_with_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not a setting"):
        PolicyFile(write(tmp_path / "policy.yaml", "x: 1"))
