"""One server of a local fleet: ``python -m mtgr.serving`` in a process of its own, with its health."""

from __future__ import annotations

import http.client
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.serving.child import ChildProcess
from mtgr.serving.gateway import Replica
from mtgr.serving.health import LEAVE
from mtgr.serving.ports import free_ports

_LOOPBACK = "127.0.0.1"
_POLL_S = 0.1
_PROBE_TIMEOUT_S = 2.0
# The launcher gives requests in flight and unloading 35 s.
_STOP_S = 40.0


class ReplicaProcess:
    """A server on ports that stay the same over restarts.

    Args:
        name: For messages and the log's name.
        model_repository: What it serves.
        logs: Directory for its logs.
        environment: Variables on top of the process's own.
        arguments: More arguments for ``python -m mtgr.serving``.

    Attributes:
        name: Its name.
        address: Where it listens.
        metrics_port: Triton's port for metrics.
    """

    def __init__(
        self,
        name: str,
        model_repository: Path,
        logs: Path,
        environment: Mapping[str, str],
        arguments: Sequence[str] = (),
    ) -> None:
        grpc, http_port, metrics, health = free_ports(_LOOPBACK, 4)
        self.name = name
        self.address = Replica(_LOOPBACK, grpc, http_port, health)
        self.metrics_port = metrics
        self._logs = logs
        self._environment = os.environ | environment
        self._command = [
            *(sys.executable, "-m", "mtgr.serving"),
            f"--model-repository={model_repository}",
            f"--grpc-port={grpc}",
            f"--http-port={http_port}",
            f"--metrics-port={metrics}",
            f"--health-port={health}",
            f"--log={self.log}",
            *arguments,
        ]
        self._process: ChildProcess | None = None

    @property
    def log(self) -> Path:
        """Triton's log."""
        return self._logs / f"{self.name}-triton.log"

    @property
    def pid(self) -> int:
        """Process id of the launcher, whose child tritonserver is.

        Raises:
            UnavailableError: If it was not started.
        """
        return self._running().pid

    @property
    def ended(self) -> bool:
        """Whether it was started and has ended by itself."""
        return self._process is not None and self._process.ended

    def start(self) -> None:
        """Start it, without waiting."""
        if self._process is not None:
            raise ConfigurationError(f"{self.name} is already running; stop it before you start it again.")
        self._process = ChildProcess(self.name, self._command, self._logs / f"{self.name}.log", self._environment)

    def await_ready(self, timeout: float) -> None:
        """Wait until its door answers.

        Raises:
            UnavailableError: If it ends or is too slow, with the last reason.
        """
        deadline = time.monotonic() + timeout
        while True:
            status, text = self._ask("GET", "ready")
            if status == http.client.OK:
                return
            if self._running().ended:
                raise UnavailableError(f"{self.name} ended while it started.{self._running().last_words()}")
            if time.monotonic() > deadline:
                raise UnavailableError(f"{self.name} was not ready within {timeout:g} s: {text}")
            time.sleep(_POLL_S)

    def leave(self) -> None:
        """Make it say that it is not ready, while it goes on answering.

        Raises:
            UnavailableError: If it does not take this in.
        """
        status, text = self._ask("POST", LEAVE)
        if status != http.client.OK:
            raise UnavailableError(f"{self.name} cannot be asked to leave: {text}")

    def stop(self) -> None:
        """Answer what is in flight and end; does nothing if it is not running."""
        process, self._process = self._process, None
        if process is not None:
            process.stop(_STOP_S)

    def terminate(self) -> None:
        """Begin to stop, without waiting."""
        if self._process is not None:
            self._process.terminate()

    def _running(self) -> ChildProcess:
        if self._process is None:
            raise UnavailableError(f"{self.name} is not running; start it first.")
        return self._process

    def _ask(self, method: str, what: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(_LOOPBACK, self.address.health_port, timeout=_PROBE_TIMEOUT_S)
        try:
            connection.request(method, f"/{what}")
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace").strip()
        except (OSError, http.client.HTTPException) as error:
            return 0, f"its health server does not answer ({error})."
        finally:
            connection.close()
