"""A Triton server as an object: started on a model repository, stopped without leftovers."""

from __future__ import annotations

import atexit
import http.client
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.routing.drain import DRAIN_VARIABLE, drain
from mtgr.serving.command import server_command
from mtgr.serving.find import find_installation
from mtgr.serving.log import PassedOnLog, excerpt, loaded_count, poll_failure, read_log
from mtgr.serving.ports import free_ports, is_free, resolve_host
from mtgr.serving.process import ServerProcess
from mtgr.serving.progress import StartProgress

# Without these nothing can be asked; every other model is an engine, which the router can do without.
DOOR_MODELS = ("mtgr", "mtgr_features", "mtgr_router")

_POLL_S = 0.05
_HTTP_TIMEOUT_S = 5.0
# What this class must know to find the server again.
_OWN_FLAGS = frozenset(
    f"--{name}"
    for name in (
        "allow-http",
        "http-address",
        "http-port",
        "grpc-address",
        "grpc-port",
        "metrics-address",
        "metrics-port",
        "model-repository",
        "model-store",
        "log-file",
    )
)


@dataclass(frozen=True)
class ModelStatus:
    """One version of a model as the server's repository index shows it.

    Attributes:
        name: The model.
        version: Its version; empty if no version was taken up.
        state: ``READY``, ``UNAVAILABLE``, ``LOADING``, ``UNLOADING``, or empty.
        reason: Why it is not ready, in the server's words.
    """

    name: str
    version: str
    state: str
    reason: str

    @property
    def ready(self) -> bool:
        """Whether it answers requests."""
        return self.state == "READY"


class TritonServer:
    """A tritonserver process on a model repository; use it as a context manager.

    It listens on loopback unless told otherwise. An engine that does not load leaves the server up (see
    :meth:`models`); a required model that does not load ends it.

    Args:
        model_repository: The repository's directory.
        host: Name or IPv4 address to listen on.
        http_port: Port for HTTP; 0 picks a free one, also for the other two.
        grpc_port: Port for gRPC.
        metrics_port: Port for Prometheus metrics.
        extra_args: More arguments for tritonserver.
        environment: Variables to set for the server and its models, on top of the process's own.
        log: File for the server's output; by default a temporary one, deleted by :meth:`stop`.
        output: Where the server's output goes besides; the file then keeps the latest MiB of it.
        startup_timeout: Seconds until every model must have loaded or failed.
        stop_timeout: Seconds for requests in flight and for unloading, before everything is killed.
        tritonserver: Path of the executable; found by default.
        required_models: Models without which the start fails.

    Attributes:
        http_url: ``address:port`` for HTTP clients, after :meth:`start`.
        grpc_url: ``address:port`` for gRPC clients, after :meth:`start`.
        metrics_url: Address of the metrics page, after :meth:`start`.
        log_path: The log file, after :meth:`start`.
    """

    def __init__(
        self,
        model_repository: Path | str,
        *,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        extra_args: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        output: IO[bytes] | None = None,
        startup_timeout: float = 300.0,
        stop_timeout: float = 35.0,
        tritonserver: Path | None = None,
        required_models: Sequence[str] = DOOR_MODELS,
    ) -> None:
        self.model_repository = Path(model_repository).absolute()
        self.http_url = ""
        self.grpc_url = ""
        self.metrics_url = ""
        self.log_path: Path | None = None
        self._host = host
        self._ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self._extra_args = tuple(extra_args)
        self._environment = dict(environment or {})
        self._log = log
        self._output = output
        self._passed_on: PassedOnLog | None = None
        self._startup_timeout = startup_timeout
        self._stop_timeout = stop_timeout
        self._tritonserver = tritonserver
        self._headers: Mapping[str, str] = {}
        self._required_models = tuple(required_models)
        self._process: ServerProcess | None = None
        self._state: tempfile.TemporaryDirectory[str] | None = None
        self._ready = False

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The server's process id.

        Raises:
            UnavailableError: If the server is not running.
        """
        return self._running().pid

    def start(self) -> None:
        """Start the server and wait until every model has loaded or failed.

        Raises:
            ConfigurationError: If the repository, a port, an argument or the installation is wrong.
            UnavailableError: If there is no server, it dies, it is too slow, or a required model does not load.
        """
        if self._process is not None:
            raise ConfigurationError("this server is already running; stop it before you start it again.")
        self._check_repository()
        self._check_arguments()
        command, environment = server_command(find_installation(self._tritonserver))
        address = resolve_host(self._host)
        ports = self._choose_ports(address)
        command += [
            f"--model-repository={self.model_repository}",
            *(
                flag
                for name, port in ports.items()
                for flag in (f"--{name}-address={address}", f"--{name}-port={port}")
            ),
            *self._defaults(),
            *self._extra_args,
        ]
        local = "127.0.0.1" if address == "0.0.0.0" else address
        self.http_url = f"{local}:{ports['http']}"
        self.grpc_url = f"{local}:{ports['grpc']}"
        self.metrics_url = f"http://{local}:{ports['metrics']}/metrics"
        self.log_path = self._open_log()
        atexit.register(self.stop)
        try:
            if self._output is not None:
                self._passed_on = PassedOnLog(self.log_path, self._output)
            with self._passed_on or self.log_path.open("wb") as log:
                environment |= {DRAIN_VARIABLE: str(self._drain_file())}
                self._process = ServerProcess(command, environment | self._environment, log)
            self._await_start()
            self._check_required()
            self._ready = "mtgr_router" in self._required_models
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server with its stubs and its shared memory; does nothing if it is not running.

        Requests in flight are answered before, further ones refused: at SIGTERM tritonserver itself would fail them.
        """
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        deadline = time.monotonic() + self._stop_timeout
        try:
            if process is not None:
                try:
                    if process.exit_code() is None and self._ready:
                        drain(self._drain_file(), self._stop_timeout)
                finally:
                    process.stop(max(0.0, deadline - time.monotonic()))
            if self._passed_on is not None:
                self._passed_on.join()
                self._passed_on = None
        finally:
            self._ready = False
            if self._state is not None:
                self._state.cleanup()
                self._state = None
            if self._log is None and self.log_path is not None:
                self.log_path.unlink(missing_ok=True)

    def wait(self, seconds: float | None = None) -> None:
        """Block for as long as the server runs, or for so many seconds if that is less.

        Raises:
            UnavailableError: When the server ends by itself, with the last lines of its log.
        """
        process = self._running()
        end = math.inf if seconds is None else time.monotonic() + seconds
        while process.exit_code() is None:
            if time.monotonic() >= end:
                return
            time.sleep(0.2)
        raise UnavailableError(f"tritonserver ended with exit code {process.exit_code()}.{excerpt(self._log_text())}")

    def models(self) -> list[ModelStatus]:
        """Every version of every model in the repository, by the server's index.

        Raises:
            UnavailableError: If the server does not answer.
        """
        self._running()
        status, body = self._request("POST", "/v2/repository/index")
        if status != http.client.OK:
            raise UnavailableError(f"tritonserver answered {status} to a request for its model index.")
        text = self._log_text()
        statuses = []
        for entry in json.loads(body):
            reason = entry.get("reason", "")
            if not entry.get("state") and not reason:
                reason = poll_failure(text, entry["name"])
            statuses.append(ModelStatus(entry["name"], entry.get("version", ""), entry.get("state", ""), reason))
        return statuses

    def _drain_file(self) -> Path:
        """What tells the router to drain, in a directory that lives as long as the server."""
        if self._state is None:
            self._state = tempfile.TemporaryDirectory(prefix="mtgr-")
        return Path(self._state.name) / "drain"

    def _running(self) -> ServerProcess:
        if self._process is None:
            raise UnavailableError("the server is not running; start it first.")
        return self._process

    def _check_repository(self) -> None:
        if not self.model_repository.is_dir():
            raise ConfigurationError(
                f"model repository {self.model_repository} does not exist; give the path of a directory of models."
            )
        for name in self._required_models:
            if not (self.model_repository / name).is_dir():
                raise ConfigurationError(
                    f"model repository {self.model_repository} has no model '{name}'; give the repository that has it."
                )

    def _check_arguments(self) -> None:
        for argument in self._extra_args:
            flag = argument.split("=", 1)[0]
            if flag in _OWN_FLAGS:
                raise ConfigurationError(
                    f"{flag} cannot be passed on to tritonserver: this launcher sets it from its own options."
                )

    def _choose_ports(self, address: str) -> dict[str, int]:
        for name, port in self._ports.items():
            if port and not is_free(address, port):
                raise ConfigurationError(
                    f"port {port} of {address} is in use: stop what listens there, or choose another {name} port."
                )
        spare = iter(free_ports(address, sum(port == 0 for port in self._ports.values())))
        return {name: port or next(spare) for name, port in self._ports.items()}

    def _defaults(self) -> list[str]:
        """Flags that extra arguments may replace."""
        given = {argument.split("=", 1)[0] for argument in self._extra_args}
        defaults = [
            # An engine that fails leaves the door up, and the door says why.
            "--exit-on-error=false",
            "--strict-readiness=false",
            # A caller's trace context reaches the models, whose log lines carry its id.
            "--grpc-header-forward-pattern=traceparent",
            "--http-header-forward-pattern=(?i)traceparent",
        ]
        if "--strict-model-config" not in given:
            # The configs are complete, and completing one costs a start of the model's stub and its imports.
            defaults.append("--disable-auto-complete-config")
        return [flag for flag in defaults if flag.split("=", 1)[0] not in given]

    def _open_log(self) -> Path:
        if self._log is None:
            with tempfile.NamedTemporaryFile(prefix="tritonserver-", suffix=".log", delete=False) as file:
                return Path(file.name)
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            self._log.touch()
        except OSError as error:
            raise ConfigurationError(f"log file {self._log} cannot be written: {error.strerror}.") from error
        return self._log.absolute()

    def _await_start(self) -> None:
        """Wait for HTTP, which tritonserver opens when every model has loaded or failed."""
        process = self._running()
        deadline = time.monotonic() + self._startup_timeout
        total = sum(1 for _ in self.model_repository.glob("*/config.pbtxt"))
        with StartProgress(total) as progress:
            while True:
                code = process.exit_code()
                text = self._log_text()
                if code is not None:
                    raise UnavailableError(f"tritonserver ended with exit code {code} while it started.{excerpt(text)}")
                if self._is_live():
                    return
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        f"tritonserver did not finish loading within {self._startup_timeout:g} s "
                        f"({loaded_count(text)} of {total} models): raise the start-up timeout or remove the "
                        f"model that hangs.{excerpt(text)}"
                    )
                progress.update(loaded_count(text))
                time.sleep(_POLL_S)

    def _is_live(self) -> bool:
        try:
            status, _ = self._request("GET", "/v2/health/live")
        except UnavailableError:
            return False
        return status == http.client.OK

    def _check_required(self) -> None:
        statuses = self.models()
        ready = {status.name for status in statuses if status.ready}
        reasons = {status.name: status.reason for status in statuses if not status.ready}
        failed = [name for name in self._required_models if name not in ready]
        # An ensemble fails with its step, without a reason of its own: name the step.
        failed.sort(key=lambda name: not reasons.get(name) or "depends on" in reasons[name])
        if failed:
            text = self._log_text()
            reason = summary(reasons.get(failed[0], "")) or "the server gives no reason"
            raise UnavailableError(f"model '{failed[0]}' did not load: {reason}.{excerpt(text)}")

    def _request(self, method: str, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.http_url, timeout=_HTTP_TIMEOUT_S)
        try:
            connection.request(method, path, headers=dict(self._headers))
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"tritonserver does not answer on {self.http_url}: {error}.") from error
        finally:
            connection.close()

    def _log_text(self) -> str:
        return read_log(self.log_path) if self.log_path is not None else ""


def summary(reason: str) -> str:
    """The first line of a server's reason, without its status code and full stop.

    A Python model's reason goes on with the places of its traceback, which :func:`excerpt` shows.
    """
    first = reason.strip().split("\n", 1)[0].strip()
    return first.removeprefix("Internal: ").removeprefix("Invalid argument: ").rstrip(".;")
