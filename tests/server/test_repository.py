"""Plain ``tritonserver --model-repository`` on a fresh clone's repository, and engines that do not fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from mtgr.client import MTGRClient
from mtgr.errors import UnavailableError
from mtgr.serving.launcher import install_launcher
from mtgr.serving.ports import free_ports
from mtgr.serving.server import TritonServer
from tests.conftest import copy_door


def wait_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready"):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError(log.read_text()[-3000:])


def start_plain(repository: Path, tmp_path: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """The command of the README, on free ports."""
    launcher = tmp_path / "tritonserver"
    message = install_launcher(launcher)
    ports = free_ports("127.0.0.1", 3)
    command = [str(launcher) if launcher.exists() else "tritonserver", "--model-repository", str(repository)]
    assert launcher.exists() or "native" in message
    for name, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        command.append(f"--{name}-port={port}")
    log = tmp_path / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_ready(process, ports[0], log)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process, ports


# 127.0.0.1 as the kernel writes it, plain and as an IPv6 address.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}


def listening() -> list[tuple[str, int]]:
    """Address (hexadecimal, as the kernel writes it) and port of every listening TCP socket."""
    tables = (Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6"))
    fields = (line.split() for table in tables for line in table)
    sockets = [line[1].split(":") for line in fields if line[3] == "0A"]
    return [(address, int(port, 16)) for address, port in sockets]


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(40)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_plain_server_before_export(tmp_path: Path) -> None:
    process, ports = start_plain(copy_door(tmp_path / "repository"), tmp_path)
    try:
        with MTGRClient(f"127.0.0.1:{ports[1]}", retries=0) as client:
            assert client.is_ready()
            with pytest.raises(UnavailableError, match="make train"):
                client.recommend("196")
        addresses = {address for address, port in listening() if port in ports}
        assert addresses
        assert addresses <= LOOPBACK
    finally:
        stop(process)


def test_plain_server_after_export(model_repository: Path, tmp_path: Path) -> None:
    process, ports = start_plain(model_repository, tmp_path)
    try:
        with MTGRClient(f"127.0.0.1:{ports[1]}") as client:
            assert client.recommend("196").strategy == "onnx"
    finally:
        stop(process)


def test_engines_that_are_missing_or_of_another_schema_are_not_used(model_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(model_repository, repository)
    shutil.rmtree(repository / "mtgr_onnx_retrieve")
    manifest = repository / "mtgr_baseline" / "1" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": "of another model"}))
    with TritonServer(repository) as server, MTGRClient(server.grpc_url, retries=0) as client:
        with pytest.raises(UnavailableError, match="baseline: mtgr_baseline was exported for another schema"):
            client.rank("196", [1, 2], strategy="baseline")
        with pytest.raises(UnavailableError, match="onnx: mtgr_onnx_retrieve is not installed"):
            client.recommend("196", strategy="onnx")
        assert client.rank("196", [1, 2]).strategy == "onnx"  # ranking does not need the missing model
        with pytest.raises(UnavailableError, match="no engine is ready"):
            client.recommend("196")


def stubs(server: TritonServer, model: str) -> list[int]:
    """Process ids of a model's Python stubs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        # The stub's arguments end with the process id of its server.
        if b"triton_python_backend_stub" in command[0] and str(server.pid).encode() in command:
            found += [int(folder.name)] if f"/{model}/".encode() in command[1] else []
    return found


def test_auto_survives_the_death_of_an_engine(model_repository: Path) -> None:
    with TritonServer(model_repository) as server, MTGRClient(server.grpc_url, retries=0) as client:
        assert client.rank("196", [1, 2]).strategy == "onnx"
        victims = stubs(server, "mtgr_onnx_rank")
        if not victims:
            pytest.skip("the C++ ONNX Runtime backend lives in the server itself: nothing to kill alone")
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        # This one request takes the seconds that the server needs to notice that a stub is gone.
        answer = client.rank("196", [1, 2])
        assert answer.strategy == "baseline"
        assert "fallback" in answer.labels


def test_command_line_ends_with_one_sentence_on_a_bad_repository(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mtgr.serving", "--model-repository", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
