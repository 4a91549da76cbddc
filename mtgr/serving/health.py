"""Health for orchestrators: whether the door answers, as HTTP 200 or 503, and leaving before the end.

Triton itself calls a model ready whose Python stub is dead (2.51). So a thread of the launcher asks the door a question
of one candidate every few seconds, and probes get what it found: they cost nothing, however many come. Answers that
refuse for want of capacity count as healthy: a server under load must not be taken out of the balance or restarted.

``python -m mtgr.serving.health ready`` asks from the command line, ``leave`` makes this server unready and waits, so
that balancers notice before it stops.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from mtgr.errors import ConfigurationError

DEFAULT_PORT = 8080
PROBES = ("startup", "live", "ready")
LEAVE = "leave"
# The user of the question; the store does not know it.
USER = "mtgr-health"

_INTERVAL_S = 5.0
_QUESTION_TIMEOUT_S = 4.0
_LIVE_S = 60.0
_LOOPBACK = "127.0.0.1"
# What the router's refusals for want of capacity end with.
_FULL = "try again later"


class Health:
    """What probes are told.

    Args:
        live_seconds: How long a server that has served may be unable to before it is called dead: its stubs do not come
            back by themselves.
        clock: Seconds, monotonic.
    """

    def __init__(self, live_seconds: float = _LIVE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._live_seconds = live_seconds
        self._clock = clock
        self._served: float | None = None  # when it last did
        self._reason = "the server is starting."
        self._leaving = False

    def serves(self) -> None:
        """The door answered, or refused because it is full."""
        self._served = self._clock()
        self._reason = ""

    def fails(self, reason: str) -> None:
        """The door gave no useful answer."""
        self._reason = reason

    def leave(self) -> None:
        """From now on not ready; requests are answered all the same."""
        self._leaving = True

    def problem(self, probe: str) -> str:
        """Why a probe fails; empty if it does not.

        A server without a checkpoint has never served: it is not ready, but restarting it would not help.
        """
        if probe == "startup":
            return self._reason if self._served is None else ""
        if probe == "live":
            dead = self._served is not None and self._clock() - self._served > self._live_seconds
            return f"nothing was served for {self._live_seconds:g} s: {self._reason}" if dead else ""
        return "the server is leaving." if self._leaving else self._reason


def ask(address: str, strategy: str | None = None, timeout: float = _QUESTION_TIMEOUT_S) -> str:
    """Have the door rank one candidate; why it cannot, or nothing if it can or is full.

    Args:
        address: ``address:port`` of Triton's HTTP endpoint.
        strategy: The engine that must answer; None for any.
        timeout: Seconds.
    """
    inputs: list[dict[str, Any]] = [
        {"name": "user_id", "datatype": "BYTES", "shape": [1, 1], "data": [USER]},
        {"name": "candidates", "datatype": "INT64", "shape": [1, 1], "data": [0]},
    ]
    if strategy is not None:
        inputs.append({"name": "strategy", "datatype": "BYTES", "shape": [1, 1], "data": [strategy]})
    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        connection.request("POST", "/v2/models/mtgr/infer", json.dumps({"inputs": inputs}))
        response = connection.getresponse()
        status, body = response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        return f"the door does not answer ({type(error).__name__})."
    finally:
        connection.close()
    if status == http.client.OK:
        return ""
    try:
        reason = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        reason = f"the door answered {status}."
    return "" if status == http.client.SERVICE_UNAVAILABLE and _FULL in reason else reason


class HealthServer:
    """Serves probes while a server starts, runs and stops; use it as a context manager.

    ``GET /startup``, ``/live`` and ``/ready`` answer 200 or 503 with a sentence; ``POST /leave`` is for callers on this
    machine only.

    Args:
        host: IPv4 address to listen on.
        port: Port; 0 picks a free one.
        strategy: The engine that must answer; None for any.
        interval: Seconds between two questions.
        health: What to tell.

    Raises:
        ConfigurationError: If the port is taken.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        strategy: str | None = None,
        interval: float = _INTERVAL_S,
        health: Health | None = None,
    ) -> None:
        self.health = health or Health()
        self._strategy = strategy
        self._interval = interval
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        try:
            self._server = ThreadingHTTPServer((host, port), _handler(self.health))
        except OSError as error:
            raise ConfigurationError(
                f"port {port} of {host} cannot be listened on ({error.strerror}); choose another --health-port."
            ) from error
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> HealthServer:
        self._start(self._server.serve_forever, "health")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join()

    def watch(self, address: str) -> None:
        """The server listens on ``address`` (HTTP): ask it from now on."""

        def run() -> None:
            while True:
                reason = ask(address, self._strategy)
                if reason:
                    self.health.fails(reason)
                else:
                    self.health.serves()
                if self._ended.wait(self._interval):
                    return

        self._start(run, "question")

    def _start(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)


def _handler(health: Health) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version = "mtgr"
        sys_version = ""
        timeout = 10

        def do_GET(self) -> None:
            probe = self.path.removeprefix("/")
            if probe not in PROBES:
                self._answer(http.client.NOT_FOUND, f"there are /{', /'.join(PROBES)}.")
                return
            problem = health.problem(probe)
            self._answer(http.client.SERVICE_UNAVAILABLE if problem else http.client.OK, problem or "ok")

        def do_POST(self) -> None:
            if self.path != f"/{LEAVE}" or self.client_address[0] != _LOOPBACK:
                self._answer(http.client.NOT_FOUND, "there is no such thing for callers from elsewhere.")
                return
            health.leave()
            self._answer(http.client.OK, "ok")

        def _answer(self, status: int, text: str) -> None:
            body = f"{text}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: probes come every few seconds."""

    return Handler


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask the health server of this machine; 0 if it says yes."""
    options = _parser().parse_args(arguments)
    connection = http.client.HTTPConnection(_LOOPBACK, options.port, timeout=3.0)
    try:
        connection.request("POST" if options.what == LEAVE else "GET", f"/{options.what}")
        response = connection.getresponse()
        text = response.read().decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        print(f"no health server answers on port {options.port}: {error}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    print(text)
    time.sleep(options.wait)
    return 0 if response.status == http.client.OK else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mtgr.serving.health", description=__doc__)
    parser.add_argument("what", nargs="?", choices=(*PROBES, LEAVE), default="ready")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="before returning")
    return parser


if __name__ == "__main__":
    sys.exit(main())
