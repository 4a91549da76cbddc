"""Whose management endpoints are open, and what a key is."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtgr.errors import ConfigurationError
from mtgr.routing.policy import PROFILES
from mtgr.serving.management import RestrictedServer, admin_key, serving_policy

KEY = "correct-horse_battery-0"


def policy(folder: Path, text: str) -> str:
    path = folder / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_profile_is_prod_unless_somebody_says_otherwise(tmp_path: Path) -> None:
    assert serving_policy(None, {}).profile == "prod"
    assert serving_policy(None, {"MTGR_PROFILE": ""}).profile == "prod"
    for name in PROFILES:
        assert serving_policy(None, {"MTGR_PROFILE": name}).profile == name
        assert serving_policy(name, {}).profile == name
        assert serving_policy(name, {"MTGR_PROFILE": "dev"}).profile == name
        assert serving_policy(None, {"MTGR_POLICY": policy(tmp_path, f"extends: {name}\n")}).profile == name
    # A policy comes before MTGR_PROFILE, as in the models.
    given = {"MTGR_POLICY": policy(tmp_path, "extends: prod\n"), "MTGR_PROFILE": "dev"}
    assert serving_policy(None, given).profile == "prod"


def test_a_policy_of_another_profile_than_asked_for_is_refused(tmp_path: Path) -> None:
    given = {"MTGR_POLICY": policy(tmp_path, "extends: test\n")}
    assert serving_policy("test", given).profile == "test"
    with pytest.raises(ConfigurationError, match=r"profile dev was asked for, but MTGR_POLICY .* is test"):
        serving_policy("dev", given)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"MTGR_PROFILE": "live"}, "profile is 'live'"),
        ({"MTGR_POLICY": "/nonexistent/policy.yaml"}, "cannot be read"),
    ],
)
def test_a_profile_that_cannot_be_told_starts_nothing(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        serving_policy(None, environment)


def test_a_key_is_made_up_for_each_start() -> None:
    keys = {admin_key({}) for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) == 64 for key in keys)  # 256 bits


def test_a_key_comes_from_the_variable_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert admin_key({"MTGR_ADMIN_KEY_FILE": str(file)}) == KEY
    assert admin_key({"MTGR_ADMIN_KEY": "0123456789abcdef", "MTGR_ADMIN_KEY_FILE": str(file)}) == "0123456789abcdef"


@pytest.mark.parametrize(
    "key",
    ["short", "a" * 257, "with,commas,in,it", "with=equals=signs", "with:colons:in:it", "with spaces in it", "é" * 20],
)
def test_what_triton_would_read_as_something_else_is_no_key(tmp_path: Path, key: str) -> None:
    file = tmp_path / "file"
    file.write_text(key)
    for environment, source in (
        ({"MTGR_ADMIN_KEY": key}, "MTGR_ADMIN_KEY"),
        ({"MTGR_ADMIN_KEY_FILE": str(file)}, "file"),
    ):
        with pytest.raises(ConfigurationError, match=source) as caught:
            admin_key(environment)
        assert key not in str(caught.value)


def test_a_key_that_is_asked_for_and_not_there_is_not_replaced(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(ConfigurationError, match="is no admin key"):
        admin_key({"MTGR_ADMIN_KEY_FILE": str(empty)})
    with pytest.raises(ConfigurationError, match="names /nonexistent, which cannot be read: No such file"):
        admin_key({"MTGR_ADMIN_KEY_FILE": "/nonexistent"})
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="it is no text"):
        admin_key({"MTGR_ADMIN_KEY_FILE": str(tmp_path / "binary")})


@pytest.mark.parametrize("flag", ["--http-restricted-api", "--grpc-restricted-protocol"])
@pytest.mark.parametrize("argument", ["{}=health:a=b", "{}"])
def test_arguments_cannot_undo_the_restriction(tmp_path: Path, flag: str, argument: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{flag} cannot be passed on .* --allow-management"):
        RestrictedServer(tmp_path, key=KEY, extra_args=["--id=x", argument.format(flag)])
