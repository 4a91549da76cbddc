"""Every command and every piece of code in the README runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mtgr.routing.policy import load_policy
from mtgr.serving.server import TritonServer
from tests.conftest import ROOT
from tests.unit.redis_server import RedisServer

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """Lines of the shell blocks, without comments."""
    lines = (line.split(" #")[0].split("# ")[0].strip() for block in blocks("bash") for line in block.splitlines())
    return [line for line in lines if line]


def run(arguments: list[str]) -> str:
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_every_command_is_of_a_kind_that_a_test_runs() -> None:
    covered = (
        "make ",  # below, and by what the fixtures run
        ".venv/bin/python clients/",  # below
        "export MTGR_STORE_URL=redis://",  # below, with the test's own Redis
        ".venv/bin/python -m mtgr.features ",  # below
        ". .venv/bin/activate",
        "tritonserver --model-repository model_repository",  # test_repository.py
    )
    assert len(commands()) >= 7
    for command in commands():
        assert command.startswith(covered), command


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    run([*shlex.split(command), "--dry-run"])


@pytest.mark.parametrize("command", [command for command in commands() if "clients/" in command])
def test_client_commands_run(command: str, server: TritonServer) -> None:
    arguments = shlex.split(command)
    output = run([sys.executable, *arguments[1:], "--url", server.grpc_url])
    assert re.search(r"\d+ items, strategy (onnx|baseline), ", output)


def test_store_commands_run(model_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    redis = RedisServer(tmp_path)
    try:
        monkeypatch.setenv("MTGR_STORE_URL", redis.url)
        store = [shlex.split(command) for command in commands() if "-m mtgr.features" in command]
        loaded, appended, shown = (
            run([sys.executable, *words[1:], "--model-repository", str(model_repository)]) for words in store
        )
    finally:
        redis.kill()
    assert loaded.startswith("943 users")
    assert appended == "user 196: 1 event appended\n"
    assert "item 50" in shown.splitlines()[-1]


def test_the_policy_is_one(tmp_path: Path) -> None:
    (example,) = blocks("yaml")
    (tmp_path / "policy.yaml").write_text(example, encoding="utf-8")
    policy = load_policy(tmp_path / "policy.yaml")
    assert policy.experiment is not None
    assert policy.shadow is not None


def test_python_examples_run(server: TritonServer, model_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = blocks("python")
    assert len(examples) == 2
    for example in examples:
        code = example.replace("MTGRClient()", f"MTGRClient({server.grpc_url!r})")
        code = code.replace('"model_repository"', repr(str(model_repository)))
        assert code != example
        exec(compile(code, "README.md", "exec"), {})


def test_demo_recommends_films_with_the_same_ranking(model_repository: Path) -> None:
    output = run([sys.executable, "clients/demo.py", "--model-repository", str(model_repository)])
    assert output.count("last liked:") == 3
    assert output.count("10 items, strategy onnx") == 3
    assert len(re.findall(r"baseline +[\d.]+ ms \(median", output)) == 3
    assert "Both strategies gave every user the same ranking." in output
