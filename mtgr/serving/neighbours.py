"""What stands around the servers of a local fleet: Envoy, Redis, Prometheus, and the machine's own exporter."""

from __future__ import annotations

import http.client
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.serving.child import ChildProcess
from mtgr.serving.gateway import DEPLOY, Gateway, Replica, find_envoy

PROMETHEUS_CONFIG = DEPLOY / "prometheus" / "prometheus.yml"

_LOOPBACK = "127.0.0.1"
_START_S = 15.0
_POLL_S = 0.05
_TIMEOUT_S = 2.0


class Envoy:
    """The gateway as a process.

    Args:
        gateway: Its configuration.
        directory: For its configuration and log.
    """

    def __init__(self, gateway: Gateway, directory: Path) -> None:
        self.gateway = gateway
        config = directory / "envoy.yaml"
        gateway.write(config)
        command = [str(find_envoy()), "--config-path", str(config), "--log-level", "warning", "--use-dynamic-base-id"]
        self._process = ChildProcess("envoy", [*command, "--concurrency", "2"], directory / "envoy.log")
        try:
            _await(self._process, lambda: _get(gateway.metrics_port, "/ready")[0] == http.client.OK)
        except BaseException:
            self.stop()
            raise

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process.ended

    def healthy(self) -> set[int]:
        """Ports (gRPC) of the replicas that get requests.

        Raises:
            UnavailableError: If Envoy does not answer.
        """
        return {
            _port(host)
            for host in self._hosts("grpc")
            if not any(flag.startswith(("failed", "pending")) for flag in host["health_status"])
        }

    def await_replica(self, port: int, healthy: bool, timeout: float = _START_S) -> None:
        """Wait until a replica is in the ring, or out of it.

        Raises:
            UnavailableError: If it is not so in time.
        """
        deadline = time.monotonic() + timeout
        while (port in self.healthy()) != healthy:
            if time.monotonic() > deadline:
                state = "into" if healthy else "out of"
                raise UnavailableError(f"Envoy did not take the replica on port {port} {state} its ring.")
            time.sleep(_POLL_S)

    def await_idle(self, replica: Replica, timeout: float = _START_S) -> None:
        """Wait until no request of ours is at a replica, which must be out of the ring.

        Raises:
            UnavailableError: If it is not so in time.
        """
        ports = {replica.grpc_port, replica.http_port}
        deadline = time.monotonic() + timeout
        while active := sum(_gauge(one, "rq_active") for one in self._hosts() if _port(one) in ports):
            if time.monotonic() > deadline:
                raise UnavailableError(f"the gateway still waits for {active} answers of port {replica.grpc_port}.")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End it."""
        self._process.stop()

    def _hosts(self, *clusters: str) -> list[dict[str, Any]]:
        status, body = _get(self.gateway.admin_port, "/clusters?format=json")
        if status != http.client.OK:
            raise UnavailableError(f"Envoy's admin interface does not answer on port {self.gateway.admin_port}.")
        return [
            host
            for cluster in json.loads(body)["cluster_statuses"]
            if cluster["name"] in (clusters or ("grpc", "http"))
            for host in cluster.get("host_statuses", ())
        ]


class Redis:
    """A feature store of its own on a socket file, in a directory that no other user may enter.

    Args:
        directory: For the socket; its path must be short.
        logs: Directory for the log.
    """

    EXECUTABLE = "redis-server"

    def __init__(self, directory: Path, logs: Path) -> None:
        socket = directory / "redis.sock"
        self.url = f"unix://{socket}"
        options = ["--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "600", "--dir", str(directory)]
        command = [_executable(self.EXECUTABLE), *options, "--save", "", "--appendonly", "no"]
        self._process = ChildProcess("redis-server", command, logs / "redis.log")
        try:
            _await(self._process, socket.exists)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it."""
        self._process.stop()


class NodeExporter:
    """Memory and disk of this machine, for Prometheus."""

    EXECUTABLE = "prometheus-node-exporter"

    def __init__(self, port: int, logs: Path) -> None:
        command = [_executable(self.EXECUTABLE), f"--web.listen-address={_LOOPBACK}:{port}"]
        command += ["--collector.disable-defaults", "--collector.meminfo", "--collector.filesystem", "--collector.cpu"]
        self._process = ChildProcess("node exporter", command, logs / "node-exporter.log")

    def stop(self) -> None:
        """End it."""
        self._process.stop()


class Prometheus:
    """Prometheus with the deployed rules, scraping this fleet.

    Args:
        port: Its own port.
        targets: ``host:port`` by the name of the job in ``prometheus.yml``; other jobs are left out.
        directory: For configuration, log and data.
        interval: Seconds between two scrapes; None leaves the file's.
    """

    EXECUTABLE = "prometheus"

    def __init__(
        self, port: int, targets: Mapping[str, Sequence[str]], directory: Path, interval: float | None = None
    ) -> None:
        self.port = port
        config = directory / "prometheus.yml"
        config.write_text(
            yaml.safe_dump(_prometheus_config({**targets, "prometheus": [f"{_LOOPBACK}:{port}"]}, interval))
        )
        command = [
            _executable(self.EXECUTABLE),
            f"--config.file={config}",
            f"--storage.tsdb.path={directory / 'prometheus'}",
            "--storage.tsdb.retention.time=1d",
            f"--web.listen-address={_LOOPBACK}:{port}",
            "--log.level=warn",
        ]
        self._process = ChildProcess("prometheus", command, directory / "prometheus.log")
        try:
            _await(self._process, lambda: _get(port, "/-/ready")[0] == http.client.OK)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it."""
        self._process.stop()


def installed(neighbour: type[Redis] | type[Prometheus] | type[NodeExporter]) -> bool:
    """Whether its executable is on this machine."""
    return shutil.which(neighbour.EXECUTABLE) is not None


def _executable(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise ConfigurationError(f"{name} is not installed; run `sudo apt-get install -y {name}`.")
    return found


def _prometheus_config(targets: Mapping[str, Sequence[str]], interval: float | None) -> dict[str, Any]:
    """The deployed file with other targets; rules stay where they are."""
    config: dict[str, Any] = yaml.safe_load(PROMETHEUS_CONFIG.read_text(encoding="utf-8"))
    config["rule_files"] = [str((PROMETHEUS_CONFIG.parent / pattern).resolve()) for pattern in config["rule_files"]]
    config.pop("alerting", None)
    jobs = []
    for job in config["scrape_configs"]:
        if job["job_name"] in targets:
            for discovery in [key for key in job if key.endswith("_sd_configs")]:
                del job[discovery]
            jobs.append({**job, "static_configs": [{"targets": list(targets[job["job_name"]])}]})
    config["scrape_configs"] = jobs
    if interval is not None:
        names = ("scrape_interval", "scrape_timeout", "evaluation_interval")
        config["global"] |= dict.fromkeys(names, f"{interval * 1e3:.0f}ms")
    return config


def _port(host: Mapping[str, Any]) -> int:
    return int(host["address"]["socket_address"]["port_value"])


def _gauge(host: Mapping[str, Any], name: str) -> int:
    """Envoy leaves out a value of zero."""
    return sum(int(one.get("value", 0)) for one in host["stats"] if one["name"] == name)


def _await(process: ChildProcess, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_S
    while not ready():
        if process.ended:
            raise UnavailableError(f"{process.name} ended while it started.{process.last_words()}")
        if time.monotonic() > deadline:
            raise UnavailableError(f"{process.name} did not start within {_START_S:g} s.{process.last_words()}")
        time.sleep(_POLL_S)


def _get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(_LOOPBACK, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()
