"""Reloading: what a file may go through while the service runs, and what is in force meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mtgr.errors import ConfigurationError
from mtgr.routing.policy import Policy
from mtgr.routing.reload import PolicyFile

FULL = """
extends: prod
admission: { max_concurrent: 250, max_queue: 900 }
experiment:
  name: rollout
  arms: [ { name: control }, { name: vllm, strategy: vllm } ]
log: { level: error }
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def replace(path: Path, text: str) -> None:
    """By renaming, as careful writers do."""
    os.replace(write(path.with_suffix(".new"), text), path)


def batch(file: PolicyFile) -> int:
    return file.current.routing.max_batch


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "policy.yaml", "routing: { max_batch: 3 }")


def test_a_changed_file_is_taken_over_once_it_stays_the_same(path: Path) -> None:
    file = PolicyFile(path)
    assert [file.poll() for _ in range(3)] == [False] * 3
    replace(path, "routing: { max_batch: 5 }")
    assert [file.poll() for _ in range(4)] == [False, True, False, False]
    assert (batch(file), file.problem, file.reloads, file.refusals) == (5, None, 1, 0)


def test_a_wrong_file_is_refused_and_said_once(path: Path) -> None:
    file = PolicyFile(path)
    for text in ("routing: { max_batch: many }", "routing:   { max_batch: many }"):
        replace(path, text)
        news = [file.poll() for _ in range(4)]
        assert news == [False, text == "routing: { max_batch: many }", False, False]
        assert file.problem is not None
        assert "max_batch is 'many'; it must be an integer. The policy of before stays in force." in file.problem
    assert (batch(file), file.reloads, file.refusals) == (3, 0, 2)
    replace(path, "routing: { max_batch: 0 }")
    assert [file.poll(), file.poll()] == [False, True]  # another problem
    assert "max_batch is 0" in (file.problem or "")
    replace(path, "routing: { max_batch: 3 }")
    assert [file.poll(), file.poll()] == [False, True]  # no problem any more
    assert (batch(file), file.problem, file.reloads) == (3, None, 0)


def test_a_file_that_is_deleted_and_comes_back(path: Path) -> None:
    file = PolicyFile(path)
    away = path.with_suffix(".away")
    os.replace(path, away)
    assert [file.poll() for _ in range(3)] == [False, True, False]
    assert "cannot be read" in (file.problem or "")
    assert batch(file) == 3
    os.replace(away, path)  # the very same
    assert [file.poll() for _ in range(3)] == [False, True, False]
    assert (batch(file), file.problem, file.reloads) == (3, None, 0)
    path.unlink()
    write(path, "routing: { max_batch: 8 }")  # never looked at in between
    assert [file.poll() for _ in range(3)] == [False, True, False]
    assert (batch(file), file.reloads) == (8, 1)


def test_a_touched_file_is_no_news(path: Path) -> None:
    file = PolicyFile(path)
    os.utime(path, (1, 1))
    assert [file.poll() for _ in range(3)] == [False] * 3
    assert (file.reloads, file.refusals) == (0, 0)


def test_a_file_that_is_being_written_is_left_alone(path: Path) -> None:
    """Some beginnings of a policy are valid, and without the experiment that stands further down."""
    write(path, FULL)
    file = PolicyFile(path)
    expected = file.current
    for end in range(len(FULL)):
        write(path, FULL[:end])
        os.utime(path, (end, end))
        assert not file.poll()
    write(path, FULL)
    assert [file.poll() for _ in range(3)] == [False] * 3
    assert (file.current, file.problem, file.reloads, file.refusals) == (expected, None, 0, 0)


def test_a_policy_that_does_not_fit_is_refused_as_a_whole(path: Path) -> None:
    def check(policy: Policy) -> None:
        if "clicks" in policy.routing.task_weights:
            raise ConfigurationError("routing: there is a weight for 'clicks'.")

    file = PolicyFile(path)
    file.check = check
    replace(path, "routing: { max_batch: 9, task_weights: { clicks: 1 } }")
    assert [file.poll(), file.poll()] == [False, True]
    assert "weight for 'clicks'" in (file.problem or "")
    assert (batch(file), file.refusals) == (3, 1)
    with pytest.raises(ConfigurationError, match="weight for 'clicks'"):
        PolicyFile(path, check)


def test_a_symbolic_link_may_be_turned_to_another_file(tmp_path: Path) -> None:
    """As Kubernetes does with files of a ConfigMap."""
    for index, size in enumerate((4, 6)):
        (tmp_path / str(index)).mkdir()
        write(tmp_path / str(index) / "policy.yaml", f"routing: {{ max_batch: {size} }}")
    (tmp_path / "data").symlink_to("0")
    file = PolicyFile(tmp_path / "data" / "policy.yaml")
    (tmp_path / "new").symlink_to("1")
    os.replace(tmp_path / "new", tmp_path / "data")
    assert [file.poll(), file.poll()] == [False, True]
    assert batch(file) == 6


def test_a_file_that_is_wrong_to_begin_with_is_an_error(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not a setting"):
        PolicyFile(write(path, "x: 1"))
