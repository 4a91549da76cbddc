"""Health against a real server: its answers, its port, its log on standard output, and metrics that manifests name."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import yaml

from mtgr.serving.health import ask
from mtgr.serving.ports import free_ports
from mtgr.serving.server import TritonServer
from tests.conftest import ROOT


def test_a_server_that_serves_says_so(server: TritonServer) -> None:
    assert ask(server.http_url) == ""
    assert ask(server.http_url, "onnx") == ""


def test_an_engine_that_cannot_serve_is_named(server: TritonServer) -> None:
    assert "tensorrt" in ask(server.http_url, "tensorrt")


def test_metrics_that_the_autoscaler_reads_are_on_the_page(server: TritonServer) -> None:
    manifest = (ROOT / "deploy" / "kubernetes" / "monitoring" / "adapter.yaml").read_text(encoding="utf-8")
    rules = yaml.safe_load(yaml.safe_load(manifest)["data"]["config.yaml"])["rules"]
    wanted = {
        name for rule in rules for name in re.findall(r"\b(?:mtgr|nv)_\w+", rule["seriesQuery"] + rule["metricsQuery"])
    }
    assert len(wanted) == 4
    ask(server.http_url)
    end = time.monotonic() + 10
    while True:
        page = urllib.request.urlopen(server.metrics_url, timeout=5).read().decode()
        missing = {name for name in wanted if not re.search(rf"^{name}{{", page, re.MULTILINE)}
        missing |= {"intake", "features", "queue", "engine"} - set(
            re.findall(r'^mtgr_stage_seconds_sum\{stage="(\w+)"\} ', page, re.MULTILINE)
        )
        if not missing:
            break
        assert time.monotonic() < end, missing
        time.sleep(0.1)


def probe(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def test_a_dead_stub_is_noticed_that_triton_calls_ready(model_repository: Path, tmp_path: Path) -> None:
    """As a container runs it: the log on standard output, probes of a port of their own, and SIGTERM at the end."""
    repository = shutil.copytree(model_repository, tmp_path / "repository")  # a path that no other server has
    http_port, grpc_port, metrics_port, health_port = free_ports("127.0.0.1", 4)
    command = [sys.executable, "-m", "mtgr.serving", f"--model-repository={repository}", "--log=-"]
    command += [f"--http-port={http_port}", f"--grpc-port={grpc_port}", f"--metrics-port={metrics_port}"]
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            # Triton waits as long for a dead stub as it may.
            [*command, f"--health-port={health_port}", "--", "--exit-timeout-secs=1"],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 120
        while probe(health_port, "/startup") != 200:
            assert process.poll() is None, (tmp_path / "output").read_text(errors="replace")[-2000:]
            assert time.monotonic() < end
            time.sleep(0.1)
        assert probe(health_port, "/ready") == 200
        pattern = f"triton_python_backend_stub {repository}/mtgr_router/"
        found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True)
        os.kill(int(found.stdout), signal.SIGKILL)
        end = time.monotonic() + 30
        while probe(health_port, "/ready") != 503:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert probe(http_port, "/v2/models/mtgr/ready") == 200, "Triton has mended this: ask it instead"
        assert probe(health_port, "/live") == 200, "it is not given up at once"
    finally:
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 0
    text = (tmp_path / "output").read_text(errors="replace")
    assert "successfully loaded 'mtgr'" in text
    assert "strategy" in text
