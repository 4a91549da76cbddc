"""Policy files: complete profiles and strict parsing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml

from mtgr.errors import ConfigurationError
from mtgr.routing.admission import AdmissionConfig
from mtgr.routing.breaker import BreakerConfig
from mtgr.routing.policy import PROFILES, load_policy, load_profile, policy_file, profile_path


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


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_hold_what_the_code_was_tuned_to(name: str) -> None:
    policy = load_profile(name)
    assert (policy.admission, policy.breaker) == (AdmissionConfig(), BreakerConfig())


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
    assert policy.routing.task_weights == {"engagement": 2.0}  # other schemas have other tasks
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
        ("routing: { max_batch: 010 }", "max_batch is '010'; it must be an integer"),
        ("deadline_seconds: 1:30", "deadline_seconds is '1:30'; it must be a number"),
        ("deadline_seconds: .inf", "deadline_seconds is '.inf'; it must be a number"),
        ("admission: { max_wait: 1e400 }", "admission.max_wait is inf; it must be a finite number"),
        ("deadline_seconds: 1" + "0" * 400, "deadline_seconds is inf; it must be a finite number"),
        ("routing: { max_batch: " + "9" * 5000 + " }", "is not YAML"),
        ("routing: { max_batch: " + "x" * 5000 + " }", r"max_batch is 'x{59}\.\.\.; it must be an integer"),
        ("alerting: on", "alerting is 'on'; it must be true or false"),
        ("log: { level: loud }", "level is 'loud'; it must be one of"),
        ("profile: staging", "profile is 'staging'; it must be one of"),
        ("extends: policy.yaml", "extends is 'policy.yaml'; it must be one of dev, test, prod"),
        ("deadline_seconds: 0", "deadline_seconds is 0.0; it must be positive"),
        ("experiment: { name: x }", "experiment.arms is missing"),
        ("experiment: { name: x, arms: [ { nam: a } ] }", r"experiment.arms\[0\].nam is not a setting"),
        ("breaker: { probes: 0 }", "probes is 0; it must be at least 1"),
        ("alerting: true\nalerting: false", "key 'alerting' is there twice"),
        ("a: &x [1]\nb: *x", "aliases are not allowed"),
        ("alerting: !!bool x", "tags are not allowed"),
        ("profile: !!timestamp x", "tags are not allowed"),
        ("<<: { alerting: false }", "<< is not a setting"),
        ("[a]: 1", "is not text"),
        ("alerting: true\n---\nalerting: false", "is not YAML"),
        ("extends: dev\nextends: prod", "key 'extends' is there twice"),
        ("1: 2", "key 1 is not text"),
        ("- 1", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("a: " + "[" * 5000, "is not YAML"),
        ("{a: " * 16000, "is not YAML"),
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


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ConfigurationError, match="is not a file"):
            load_policy(path)


def test_small_numbers_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    assert load_policy(write(tmp_path / "policy.yaml", "auto: { explore: 1e-3 }")).auto.explore == 0.001


def test_many_keys_are_read_in_no_time(tmp_path: Path) -> None:
    keys = ", ".join(f"t{index}: 1" for index in range(5000))
    started = time.process_time()
    load_policy(write(tmp_path / "policy.yaml", f"routing: {{ task_weights: {{ {keys} }} }}"))
    assert time.process_time() - started < 5


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
