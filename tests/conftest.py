"""Fixtures that are dear: one trained checkpoint, one model repository, one server for all tests that need them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOOR_MODELS = ("mtgr", "mtgr_features", "mtgr_router")


def source_hash() -> str:
    """Hash of all that decides what training makes: an earlier run's checkpoint is used only if it would be equal."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "mtgr").rglob("*.py")):
        if not {"client", "serving", "routing"} & set(path.parts):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The demo's checkpoint, trained by the command that users run (a few minutes, once per state of the sources)."""
    given = os.environ.get("MTGR_TEST_CHECKPOINT")
    if given:
        return Path(given)
    directory = ROOT / "build" / "test" / source_hash() / "checkpoint"
    if not directory.is_dir():
        command = [sys.executable, "-m", "mtgr.training", "--output", str(directory)]
        state = ["--state", str(directory.with_name("state"))]
        done = subprocess.run([*command, *state], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (directory.with_name("training.log")).write_text(done.stdout, encoding="utf-8")
    return directory


def copy_door(target: Path) -> Path:
    """The repository as a fresh clone has it: the door's models and no engine."""
    for name in DOOR_MODELS:
        ignored = shutil.ignore_patterns("bundle*", "__pycache__", "staging")
        shutil.copytree(ROOT / "model_repository" / name, target / name, ignore=ignored)
    return target


@pytest.fixture(scope="session")
def model_repository(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The door's models with the engines that every machine can export; vllm has a server of its own."""
    repository = copy_door(tmp_path_factory.mktemp("repository"))
    command = [sys.executable, "-m", "export", "--checkpoint", str(checkpoint), "--model-repository", str(repository)]
    command += ["--engine", "baseline", "--engine", "onnx"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return repository


@pytest.fixture(scope="session")
def server(model_repository: Path) -> Iterator[object]:
    """A running server on ``model_repository``; tests must leave it as they found it."""
    from mtgr.serving.server import TritonServer

    with TritonServer(model_repository) as running:
        yield running
