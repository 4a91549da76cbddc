"""``python -m mtgr.serving.fleet``: several servers behind the gateway, with Redis and Prometheus, on this machine.

Everything listens on loopback and ends with this process. ``python -m mtgr.serving.fleet restart`` restarts the servers
of the running fleet one after another, while the others serve; a server that ends by itself is started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self, get_args

from mtgr.errors import ConfigurationError, MTGRError
from mtgr.features.settings import STORE_URL_VARIABLE
from mtgr.routing.policy import PROFILES
from mtgr.serving.gateway import ADMIN_PORT, METRICS_PORT, PORT, Balance, Gateway
from mtgr.serving.neighbours import Envoy, NodeExporter, Prometheus, Redis, installed
from mtgr.serving.ports import free_ports, is_free, on_free_ports
from mtgr.serving.replica import ReplicaProcess

DEFAULT_STATE = Path("build") / "fleet"
PROMETHEUS_PORT = 9090

_LOOPBACK = "127.0.0.1"
_POLL_S = 0.2
_PID_FILE = "pid"


class Fleet:
    """Servers behind Envoy; use it as a context manager, from the main thread.

    Args:
        model_repository: What every server serves.
        state: Directory for logs, configurations and Prometheus' data.
        replicas: How many servers.
        gateway: Ports, balance and certificates; its replicas are this fleet's. A port of 0 is chosen.
        prometheus_port: Prometheus' port; 0 picks a free one, None starts none.
        redis: Whether users come from a Redis of this fleet, filled from the model repository's store.
        scrape_seconds: Between two scrapes; None leaves the deployed value.
        environment: Variables for the servers.
        arguments: More arguments for ``python -m mtgr.serving``.
        startup_timeout: Seconds until every server must be ready.

    Attributes:
        replicas: The servers.
        envoy: The gateway, after :meth:`start`.
        prometheus: Prometheus, after :meth:`start`, if there is one.
    """

    def __init__(
        self,
        model_repository: Path | str,
        state: Path,
        *,
        replicas: int = 2,
        gateway: Gateway | None = None,
        prometheus_port: int | None = PROMETHEUS_PORT,
        redis: bool = True,
        scrape_seconds: float | None = None,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        startup_timeout: float = 300.0,
    ) -> None:
        if replicas < 1:
            raise ConfigurationError(f"replicas are {replicas}; a fleet has 1 or more.")
        self.state = state
        self.replicas: list[ReplicaProcess] = []
        self.envoy: Envoy | None = None
        self.prometheus: Prometheus | None = None
        self._count = replicas
        self._repository = Path(model_repository).absolute()
        self._gateway = gateway or Gateway()
        self._prometheus_port = prometheus_port
        self._redis = redis
        self._scrape_seconds = scrape_seconds
        self._environment = dict(environment or {})
        self._arguments = tuple(arguments)
        self._startup_timeout = startup_timeout
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """``address:port`` of the gateway, for clients of either protocol."""
        return f"{self._gateway.host}:{self._gateway.port}"

    def start(self) -> None:
        """Start everything and wait until every server is in the gateway's ring.

        Raises:
            ConfigurationError: If a port is taken, or something is not installed.
            UnavailableError: If something does not start.
        """
        try:
            self._lock()
            self._check_ports()
            if self._redis:
                self._environment[STORE_URL_VARIABLE] = self._start_redis()
            self._stack.callback(self._stop_replicas)
            for index in range(self._count):
                replica = ReplicaProcess(
                    f"replica-{index}", self._repository, self.state, self._environment, self._arguments
                )
                self.replicas.append(replica)
                replica.start()
            for replica in self.replicas:
                replica.await_ready(self._startup_timeout)
            self._start_gateway()
            if self._prometheus_port is not None:
                self._start_prometheus(self._prometheus_port)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End everything: first the gateway, then the servers, which answer what is in flight."""
        self._stack.close()

    def rolling_restart(self) -> None:
        """Restart the servers one after another: out of the ring, drained, stopped, started, and back in the ring.

        Raises:
            UnavailableError: If one does not leave or come back; those after it are left alone.
        """
        for replica in self.replicas:
            self.restart(replica)

    def restart(self, replica: ReplicaProcess) -> None:
        """Restart one server; one that has ended by itself is only started.

        Raises:
            UnavailableError: If it does not leave or come back.
        """
        envoy = self._running()
        if not replica.ended:
            replica.leave()
            envoy.await_replica(replica.address.grpc_port, healthy=False)
            # What is on its way to the router when that begins to drain would be refused.
            envoy.await_idle(replica.address)
        replica.stop()
        replica.start()
        replica.await_ready(self._startup_timeout)
        envoy.await_replica(replica.address.grpc_port, healthy=True)

    def supervise(self) -> None:
        """Start again what has ended by itself.

        Raises:
            UnavailableError: If it does not come back.
        """
        if self._running().ended:
            print("the gateway ended; starting it again", flush=True)
            self._running().stop()
            self._start_gateway()
        for replica in self.replicas:
            if replica.ended:
                print(f"{replica.name} ended; starting it again", flush=True)
                self.restart(replica)

    def table(self) -> str:
        """Where everything is."""
        rows = [("gateway", self.url, "gRPC and HTTP, users by ring hash")]
        rows.append(("metrics", f"http://{_LOOPBACK}:{self._gateway.metrics_port}/stats/prometheus", "of the gateway"))
        rows.append(("admin", f"http://{_LOOPBACK}:{self._gateway.admin_port}", "of the gateway"))
        for replica in self.replicas:
            where = replica.address
            ports = f"HTTP {where.http_port}, metrics {replica.metrics_port}, health {where.health_port}"
            rows.append((replica.name, f"{where.host}:{where.grpc_port}", f"gRPC; {ports}"))
        if self._redis:
            rows.append(("redis", self._environment[STORE_URL_VARIABLE], "users and their events"))
        if self.prometheus is not None:
            rows.append(("prometheus", f"http://{_LOOPBACK}:{self.prometheus.port}", "rules of deploy/prometheus"))
        rows.append(("logs", str(self.state), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"{name:<{widths[0]}}  {url:<{widths[1]}}  {note}".rstrip() for name, url, note in rows)

    def _lock(self) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        for log in self.state.glob("*.log"):
            log.unlink()
        file = (self.state / _PID_FILE).open("a+")
        self._stack.callback(file.close)
        _hold(file, self.state)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()

    def _check_ports(self) -> None:
        gateway = self._gateway
        for port in (gateway.port, gateway.metrics_port, gateway.admin_port, self._prometheus_port):
            if port and not is_free(_LOOPBACK, port):
                raise ConfigurationError(f"port {port} is in use: stop what listens there, or choose another.")

    def _start_redis(self) -> str:
        # A socket's path may have about 100 characters.
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mtgr-fleet-")))
        redis = Redis(directory, self.state)
        self._stack.callback(redis.stop)
        with (self.state / "load.log").open("wb") as log:
            command = [sys.executable, "-m", "mtgr.features", "load", "--to", redis.url]
            command += ["--model-repository", str(self._repository)]
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            reason = (self.state / "load.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise ConfigurationError(f"the feature store could not be filled: {''.join(reason)}")
        return redis.url

    def _start_gateway(self) -> None:
        replicas = tuple(replica.address for replica in self.replicas)

        def start(ports: Sequence[int]) -> Envoy:
            port, metrics, admin = ports
            gateway = dataclasses.replace(
                self._gateway, replicas=replicas, port=port, metrics_port=metrics, admin_port=admin
            )
            return Envoy(gateway, self.state)

        wanted = (self._gateway.port, self._gateway.metrics_port, self._gateway.admin_port)
        self.envoy = on_free_ports(_LOOPBACK, wanted, start)
        self._gateway = self.envoy.gateway  # a restart keeps its ports
        self._stack.callback(self.envoy.stop)
        for replica in self.replicas:
            self.envoy.await_replica(replica.address.grpc_port, healthy=True)

    def _start_prometheus(self, port: int) -> None:
        targets = {
            "mtgr": [f"{_LOOPBACK}:{replica.metrics_port}" for replica in self.replicas],
            "gateway": [f"{_LOOPBACK}:{self._gateway.metrics_port}"],
        }
        if installed(NodeExporter):
            (node_port,) = free_ports(_LOOPBACK, 1)
            self._stack.callback(NodeExporter(node_port, self.state).stop)
            targets["node"] = [f"{_LOOPBACK}:{node_port}"]
        self.prometheus = on_free_ports(
            _LOOPBACK, [port], lambda ports: Prometheus(ports[0], targets, self.state, self._scrape_seconds)
        )
        self._stack.callback(self.prometheus.stop)

    def _stop_replicas(self) -> None:
        for replica in self.replicas:
            replica.terminate()  # all at once
        for replica in self.replicas:
            replica.stop()
        self.replicas.clear()

    def _running(self) -> Envoy:
        if self.envoy is None:
            raise ConfigurationError("this fleet is not running; start it first.")
        return self.envoy


def _hold(file: IO[str], state: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigurationError(f"a fleet is already running in {state}; stop it, or give another --state.") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 after Ctrl-C or SIGTERM, 1 if something could not start.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.action == "restart":
            os.kill(_running_pid(options.state), signal.SIGUSR1)
            print("the servers are being restarted one after another; the fleet says when it is done")
            return 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupt)
        _run(options)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 0
    except MTGRError as error:
        print(f"mtgr.serving.fleet: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGUSR1, ask)
    gateway = Gateway(
        port=options.port,
        metrics_port=options.metrics_port,
        admin_port=options.admin_port,
        balance=options.balance,
    )
    fleet = Fleet(
        options.model_repository,
        options.state,
        replicas=options.replicas,
        gateway=gateway,
        prometheus_port=options.prometheus_port if installed(Prometheus) else None,
        redis=installed(Redis),
        arguments=[f"--profile={options.profile}"] if options.profile else [],
        startup_timeout=options.startup_timeout,
    )
    for neighbour in (Redis, Prometheus, NodeExporter):
        if not installed(neighbour):
            print(f"without {neighbour.EXECUTABLE}: run `sudo apt-get install -y {neighbour.EXECUTABLE}`")
    print(f"starting {options.replicas} servers; their logs are in {options.state}", flush=True)
    with fleet:
        print(fleet.table(), flush=True)
        print(
            "\nCtrl-C ends all of it; `python -m mtgr.serving.fleet restart` restarts the servers in turn", flush=True
        )
        while True:
            time.sleep(_POLL_S)
            if asked:
                asked = False
                fleet.rolling_restart()
                print("all servers were restarted", flush=True)
            fleet.supervise()


def _running_pid(state: Path) -> int:
    file = state / _PID_FILE
    try:
        with file.open("a+") as held:
            _hold(held, state)
    except ConfigurationError:
        return int(file.read_text(encoding="utf-8"))
    except OSError:
        pass
    raise ConfigurationError(f"no fleet is running in {state}; start one with `python -m mtgr.serving.fleet`.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mtgr.serving.fleet", description=__doc__)
    parser.add_argument("action", nargs="?", choices=("run", "restart"), default="run")
    parser.add_argument("--model-repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--state", type=Path, default=DEFAULT_STATE, help="directory for logs and Prometheus' data")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=PORT, help="of the gateway; 0 picks a free one, as for the others")
    parser.add_argument("--metrics-port", type=int, default=METRICS_PORT, help="of the gateway's metrics")
    parser.add_argument("--admin-port", type=int, default=ADMIN_PORT, help="of the gateway's admin interface")
    parser.add_argument("--prometheus-port", type=int, default=PROMETHEUS_PORT)
    parser.add_argument("--balance", choices=get_args(Balance), default="ring_hash")
    parser.add_argument("--profile", choices=PROFILES, help="of the policy")
    parser.add_argument("--startup-timeout", type=float, default=300.0, metavar="SECONDS")
    return parser


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
