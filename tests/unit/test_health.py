"""What an orchestrator's probes are told, by a health server over a stand-in for Triton's HTTP endpoint."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mtgr.errors import ConfigurationError
from mtgr.serving.health import Health, HealthServer, ask, main
from mtgr.serving.ports import free_ports


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def door(status: int, body: str) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Something that answers every request so, and keeps what it was asked."""
    asked: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append({"path": self.path, **json.loads(self.rfile.read(int(self.headers["Content-Length"])))})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join()


def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, path)
    response = connection.getresponse()
    text = response.read().decode().strip()
    connection.close()
    return response.status, text


def until(port: int, path: str, status: int) -> str:
    end = time.monotonic() + 5
    while True:
        found, text = get(port, path)
        if found == status:
            return text
        assert time.monotonic() < end, (path, found, text)
        time.sleep(0.01)


def test_a_server_that_never_served_is_not_ready_and_not_dead() -> None:
    clock = Clock()
    health = Health(live_seconds=60, clock=clock)
    assert health.problem("startup") == health.problem("ready") == "the server is starting."
    health.fails("no checkpoint is installed.")
    clock.now += 3600
    assert health.problem("live") == ""
    assert health.problem("startup") == health.problem("ready") == "no checkpoint is installed."


def test_a_server_that_served_and_cannot_any_more_is_dead_after_a_while() -> None:
    clock = Clock()
    health = Health(live_seconds=60, clock=clock)
    health.serves()
    assert [health.problem(probe) for probe in ("startup", "live", "ready")] == ["", "", ""]
    clock.now += 59
    health.fails("Stub process is not healthy.")
    assert health.problem("live") == ""
    assert health.problem("ready") == "Stub process is not healthy."
    clock.now += 2
    assert "Stub process is not healthy." in health.problem("live")
    assert health.problem("startup") == ""
    health.serves()
    assert health.problem("live") == health.problem("ready") == ""


def test_who_leaves_is_alive_and_not_ready() -> None:
    health = Health()
    health.serves()
    health.leave()
    assert health.problem("ready") == "the server is leaving."
    assert health.problem("live") == ""


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, "{}", ""),
        (503, '{"error": "the router: 1024 requests wait, as many as may; try again later."}', ""),
        (503, '{"error": "no engine is ready; run `make export`."}', "no engine is ready; run `make export`."),
        (
            500,
            '{"error": "Stub process is not healthy; try again later"}',
            "Stub process is not healthy; try again later",
        ),
        (500, "not JSON", "the door answered 500."),
        (404, "[]", "the door answered 404."),
    ],
)
def test_full_is_healthy_and_broken_is_not(status: int, body: str, reason: str) -> None:
    with door(status, body) as (address, asked):
        assert ask(address) == reason
    assert asked[0]["path"] == "/v2/models/mtgr/infer"


def test_the_question_names_the_engine_that_must_answer() -> None:
    with door(200, "{}") as (address, asked):
        ask(address, "vllm")
    inputs = {entry["name"]: entry["data"] for entry in asked[0]["inputs"]}  # type: ignore[attr-defined]
    assert inputs["strategy"] == ["vllm"]


def test_nobody_there_is_no_answer() -> None:
    (port,) = free_ports("127.0.0.1", 1)
    assert ask(f"127.0.0.1:{port}", timeout=1) == "the door does not answer (ConnectionRefusedError)."


def test_probes_follow_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    health = Health(live_seconds=0.1)
    with HealthServer("127.0.0.1", 0, interval=0.02, health=health) as server:
        assert get(server.port, "/startup")[0] == get(server.port, "/ready")[0] == 503
        assert get(server.port, "/live") == (200, "ok")
        assert get(server.port, "/metrics")[0] == 404
        with door(200, "{}") as (address, _):
            server.watch(address)
            until(server.port, "/ready", 200)
            assert get(server.port, "/startup") == (200, "ok")
            assert main(["ready", f"--port={server.port}"]) == 0
        until(server.port, "/ready", 503)
        assert "nothing was served" in until(server.port, "/live", 503)
        assert main(["live", f"--port={server.port}"]) == 1
    assert "nothing was served" in capsys.readouterr().out


def test_leaving_waits_and_is_for_this_machine() -> None:
    health = Health()
    health.serves()
    with HealthServer("127.0.0.1", 0, health=health) as server:
        assert get(server.port, "/ready", "POST")[0] == 404
        assert get(server.port, "/ready")[0] == 200
        start = time.monotonic()
        assert main(["leave", f"--port={server.port}", "--wait=0.3"]) == 0
        assert time.monotonic() - start >= 0.3
        assert get(server.port, "/ready") == (503, "the server is leaving.")


def test_only_this_machine_may_make_a_server_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    health = Health()
    health.serves()
    monkeypatch.setattr("mtgr.serving.health._LOOPBACK", "192.0.2.1")  # as if the caller came from elsewhere
    with HealthServer("127.0.0.1", 0, health=health) as server:
        assert get(server.port, "/leave", "POST")[0] == 404
        assert get(server.port, "/ready")[0] == 200


def test_no_health_server_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports("127.0.0.1", 1)
    assert main(["ready", f"--port={port}"]) == 1
    assert f"no health server answers on port {port}" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said() -> None:
    with HealthServer("127.0.0.1", 0) as server, pytest.raises(ConfigurationError, match="another --health-port"):
        HealthServer("127.0.0.1", server.port)
