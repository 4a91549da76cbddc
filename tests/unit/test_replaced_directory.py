"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from unittest import mock

import pytest

from mtgr import files
from mtgr.files import replaced_directory


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
