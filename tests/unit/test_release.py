"""Releases: packed with checksums, installed whole or not at all, by many at once, and never changed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mtgr.errors import ConfigurationError
from mtgr.serving import release
from tests.conftest import ROOT, copy_door


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository as `make export` leaves it, as far as this module looks."""
    repository = copy_door(tmp_path / "repository")
    bundle = repository / "mtgr_features" / "bundle"
    bundle.mkdir()
    (bundle / "schema.json").write_text("{}")
    engine = repository / "mtgr_onnx_rank" / "1"
    engine.mkdir(parents=True)
    (engine / "model.onnx").write_bytes(bytes(range(256)) * 9000)  # more than one chunk
    (repository / "mtgr_router" / "1" / "__pycache__").mkdir()
    (repository / "mtgr_router" / "1" / "__pycache__" / "model.pyc").write_bytes(b"x")
    monkeypatch.setattr(release, "load_bundle", lambda repository: None)
    release.pack(repository)
    return repository


def test_checksums_are_those_of_sha256sum(packed: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", release.SUMS_FILE], cwd=packed, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names = set(release.read_sums(packed))
    assert {"mtgr/config.pbtxt", "mtgr_features/bundle/schema.json", "mtgr_onnx_rank/1/model.onnx"} <= names
    assert not [name for name in names if "__pycache__" in name or name == release.SUMS_FILE]


def test_a_repository_without_a_checkpoint_is_not_packed(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="make export"):
        release.pack(copy_door(tmp_path / "repository"))


def test_installed_once_and_verified(packed: Path, tmp_path: Path) -> None:
    target = tmp_path / "store" / "v1"
    assert release.install(packed, target)
    assert not release.install(packed, target)
    assert release.verify(target) == len(release.read_sums(packed))
    assert (target / "mtgr" / "1").is_dir(), "Triton wants the ensemble's version directory"
    assert [path.name for path in target.parent.iterdir()] == ["v1"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "added"])
def test_a_damaged_source_is_not_installed_and_leaves_nothing(packed: Path, tmp_path: Path, damage: str) -> None:
    file = packed / "mtgr_onnx_rank" / "1" / "model.onnx"
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "gone":
        file.unlink()
    else:
        (packed / "mtgr_onnx_rank" / "2").mkdir()
        (packed / "mtgr_onnx_rank" / "2" / "model.onnx").write_bytes(content)
        with pytest.raises(ConfigurationError, match="is not in its list"):
            release.verify(packed)
        return
    with pytest.raises(ConfigurationError, match=r"model\.onnx"):
        release.install(packed, tmp_path / "store" / "v1")
    assert list((tmp_path / "store").iterdir()) == []


def test_a_damaged_copy_is_found_by_the_next_pod(packed: Path, tmp_path: Path) -> None:
    target = tmp_path / "v1"
    release.install(packed, target)
    (target / "mtgr" / "config.pbtxt").write_text("other")
    with pytest.raises(ConfigurationError, match=r"config\.pbtxt is not what was packed"):
        release.install(packed, target)


def test_a_name_that_is_taken_is_refused(packed: Path, tmp_path: Path) -> None:
    target = tmp_path / "v1"
    release.install(packed, target)
    (packed / "mtgr_router" / "config.pbtxt").write_text("newer")
    release.pack(packed)
    with pytest.raises(ConfigurationError, match="holds another release"):
        release.install(packed, target)
    release.verify(target)


def test_many_pods_at_once(packed: Path, tmp_path: Path) -> None:
    target = tmp_path / "store" / "v1"
    done: list[bool] = []
    threads = [threading.Thread(target=lambda: done.append(release.install(packed, target))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [False] * 7 + [True]
    assert [path.name for path in target.parent.iterdir()] == ["v1"]
    release.verify(target)


@pytest.mark.parametrize(
    "line", ["", "abc  mtgr/config.pbtxt", f"{'0' * 64}  ../../etc/passwd", f"{'0' * 64}  /etc/passwd"]
)
def test_a_list_that_is_none_is_refused(packed: Path, line: str) -> None:
    (packed / release.SUMS_FILE).write_text(line + "\n" if line else "")
    with pytest.raises(ConfigurationError, match="pack the release"):
        release.read_sums(packed)


def test_links_are_not_followed(packed: Path) -> None:
    (packed / "mtgr_router" / "secret").symlink_to("/etc/passwd")
    with pytest.raises(ConfigurationError, match="neither a file nor a directory"):
        release.pack(packed)


def test_the_command_line_says_one_sentence(packed: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mtgr.serving.release", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    target = tmp_path / "v1"
    assert run("install", str(packed), str(target)).stdout == f"{target}: installed.\n"
    assert run("install", str(packed), str(target)).stdout == f"{target}: is there already.\n"
    shutil.rmtree(target / "mtgr")
    wrong = run("verify", str(target))
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "is missing; install the release again." in wrong.stderr
