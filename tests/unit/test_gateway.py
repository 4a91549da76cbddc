"""The gateway's configuration as it is written, and the real Envoy reading it and speaking TLS."""

from __future__ import annotations

import base64
import http.server
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
import yaml
from google.protobuf import descriptor_pb2
from tritonclient.grpc import service_pb2, service_pb2_grpc

from mtgr.client import TLS, MTGRClient
from mtgr.client.wire import AFFINITY_HEADER
from mtgr.errors import ConfigurationError, ServerError, UnavailableError
from mtgr.serving.gateway import TEMPLATE, Certificates, Gateway, Replica, find_envoy, main
from mtgr.serving.health import DEFAULT_PORT
from mtgr.serving.neighbours import Envoy
from mtgr.serving.ports import free_ports

TWO = (Replica("127.0.0.1", 1, 2, 3), Replica("127.0.0.1", 4, 5, 6))

ENVOY: Path | None = None
with suppress(ConfigurationError):
    ENVOY = find_envoy()
needs_envoy = pytest.mark.skipif(ENVOY is None, reason="Envoy is not installed; `make test` installs it")


def clusters(config: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one for one in config["static_resources"]["clusters"]}


def filters(config: dict[str, Any]) -> dict[str, Any]:
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    return {one["name"]: one["typed_config"] for one in manager["http_filters"]}


def sockets(value: Any) -> Iterator[tuple[str, int]]:
    """Every address in a configuration."""
    if isinstance(value, dict):
        if "socket_address" in value:
            yield value["socket_address"]["address"], value["socket_address"]["port_value"]
        for part in value.values():
            yield from sockets(part)
    elif isinstance(value, list):
        for part in value:
            yield from sockets(part)


def test_addresses_are_put_in_and_all_are_loopback() -> None:
    config = Gateway(replicas=TWO, port=10, metrics_port=11, admin_port=12).render()
    assert set(sockets(config)) == {("127.0.0.1", port) for port in (1, 2, 4, 5, 10, 11, 12)}
    for name, ports in (("grpc", [1, 4]), ("http", [2, 5])):
        endpoints = clusters(config)[name]["load_assignment"]["endpoints"][0]["lb_endpoints"]
        assert [one["endpoint"]["address"]["socket_address"]["port_value"] for one in endpoints] == ports
        assert [one["endpoint"]["health_check_config"]["port_value"] for one in endpoints] == [3, 6]


def test_the_deployed_file_exposes_the_door_and_metrics_only() -> None:
    config = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    exposed = {(address, port) for address, port in sockets(config) if address == "0.0.0.0"}
    assert exposed == {("0.0.0.0", 8101), ("0.0.0.0", 9902)}
    assert config["admin"]["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 9901}
    servers = {port for address, port in sockets(config) if address == "mtgr-pods"}
    assert servers == {Replica("").grpc_port, Replica("").http_port}
    checks = [
        one["endpoint"]["health_check_config"]["port_value"]
        for name in ("grpc", "http")
        for one in clusters(config)[name]["load_assignment"]["endpoints"][0]["lb_endpoints"]
    ]
    assert set(checks) == {DEFAULT_PORT}


def test_users_are_hashed_by_the_clients_header() -> None:
    config = Gateway().render()
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    grpc_route, http_route, other = manager["route_config"]["virtual_hosts"][0]["routes"]
    for route in (grpc_route, http_route):
        assert route["route"]["hash_policy"][0] == {"header": {"header_name": AFFINITY_HEADER}, "terminal": True}
        assert clusters(config)[route["route"]["cluster"]]["lb_policy"] == "RING_HASH"
    assert other["direct_response"] == {"status": 404}
    assert not [name for name in filters(config) if "json_transcoder" in name]


def test_names_of_their_own_are_hashed_instead_of_addresses() -> None:
    def hashed(*hosts: str) -> list[str | None]:
        config = Gateway(replicas=tuple(map(Replica, hosts))).render()
        (endpoints,) = clusters(config)["grpc"]["load_assignment"]["endpoints"]
        metadata = (one.get("metadata", {}) for one in endpoints["lb_endpoints"])
        return [one.get("filter_metadata", {}).get("envoy.lb", {}).get("hash_key") for one in metadata]

    assert hashed("mtgr-0.mtgr-pods", "mtgr-1.mtgr-pods") == ["mtgr-0.mtgr-pods", "mtgr-1.mtgr-pods"]
    assert hashed("mtgr-pods") == [None]  # one name for all would be one point for all
    assert hashed("10.0.0.1", "10.0.0.2") == [None, None]


def test_descriptors_say_where_the_models_name_is() -> None:
    """Field numbers and types of what Envoy reads are those of Triton's own protocol."""
    extraction = filters(Gateway().render())["envoy.filters.http.grpc_field_extraction"]
    found = descriptor_pb2.FileDescriptorSet.FromString(base64.b64decode(extraction["descriptor_set"]["inline_bytes"]))
    (file,) = found.file
    wanted = {"ModelInfer": "model_name", "ModelReady": "name", "ModelMetadata": "name"}
    messages = {message.name: message for message in file.message_type}
    for method, field in wanted.items():
        (own,) = messages[f"{method}Request"].field
        theirs = getattr(service_pb2, f"{method}Request").DESCRIPTOR.fields_by_name[field]
        assert (own.name, own.number, own.type) == (theirs.name, theirs.number, theirs.type)
        fields = extraction["extractions_by_method"][f"inference.GRPCInferenceService.{method}"]
        assert list(fields["request_field_extractions"]) == [field]
    (service,) = file.service
    assert {method.name for method in service.method} == set(wanted)
    assert f"{file.package}.{service.name}" == "inference.GRPCInferenceService"


def test_the_rate_is_the_callers() -> None:
    for rate in (1, 3, 50, 5000):
        limit = filters(Gateway(requests_per_second=rate).render())["envoy.filters.http.local_ratelimit"]
        bucket = limit["descriptors"][0]["token_bucket"]
        interval = float(bucket["fill_interval"].removesuffix("s"))
        assert bucket["tokens_per_fill"] / interval == pytest.approx(rate, rel=0.01)
        assert bucket["max_tokens"] >= bucket["tokens_per_fill"] >= 1
        # Envoy wants the whole's interval to divide each descriptor's.
        whole = float(limit["token_bucket"]["fill_interval"].removesuffix("s"))
        assert interval / whole == pytest.approx(round(interval / whole))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tls-certificate", "a.pem"], "without --tls-key"),
        (["--tls-key", "a.pem"], "need --tls-certificate"),
        (["--requests-per-second", "0"], "must be 1 or more"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path / "envoy.yaml"), *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "envoy.yaml").exists()


@needs_envoy
@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="plain"),
        pytest.param(["--replica", "mtgr-0.pods:1:2:3", "--replica", "mtgr-1.pods:1:2:3"], id="names"),
        pytest.param(["--balance", "least_request"], id="least-request"),
        pytest.param(["--balance", "random", "--requests-per-second", "7"], id="random"),
    ],
)
def test_envoy_takes_what_is_written(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "envoy.yaml"
    assert main(["--output", str(path), *options]) == 0
    validate(path)


DEPLOYED = {
    "tls": (),
    "stateful": tuple(Replica(f"mtgr-{number}.mtgr-pods") for number in range(24)),
}


@pytest.mark.parametrize("folder", DEPLOYED)
def test_the_other_files_are_made_of_the_first(folder: str) -> None:
    tls = Certificates(Path("/etc/envoy/tls/tls.crt"), Path("/etc/envoy/tls/tls.key"))
    deployed = yaml.safe_load((TEMPLATE.parent / folder / "envoy.yaml").read_text(encoding="utf-8"))
    # Else: python -m mtgr.serving.gateway --host 0.0.0.0 --tls-certificate ... --tls-key ... --replica ... --output ...
    assert deployed == Gateway(host="0.0.0.0", tls=tls, replicas=DEPLOYED[folder]).render()


@needs_envoy
def test_envoy_takes_the_deployed_file() -> None:
    validate(TEMPLATE)


def validate(path: Path) -> None:
    done = subprocess.run(
        [str(ENVOY), "--mode", "validate", "--config-path", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "deprecated" not in done.stderr.lower()


class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.metadata: list[dict[str, str]] = []

    def ModelReady(self, request: Any, context: Any) -> Any:
        self.metadata.append(dict(context.invocation_metadata()))
        return service_pb2.ModelReadyResponse(ready=True)


@pytest.fixture
def upstream() -> Iterator[tuple[Replica, Triton]]:
    """Triton's service, which is ready, with its health."""
    triton = Triton()
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    health = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ready)
    threading.Thread(target=health.serve_forever, daemon=True).start()
    yield Replica("127.0.0.1", port, port, health.server_address[1]), triton
    health.shutdown()
    health.server_close()
    server.stop(None)


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and keys that it signed for the gateway and for a caller."""
    folder = tmp_path_factory.mktemp("certificates")
    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    openssl(*new, "-subj", "/CN=authority", "-keyout", folder / "ca.key", "-out", folder / "ca.pem")
    signed = ("-CA", folder / "ca.pem", "-CAkey", folder / "ca.key")
    for name in ("gateway", "caller"):
        names = ("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE")
        key, certificate = folder / f"{name}.key", folder / f"{name}.pem"
        openssl(*new, *signed, "-subj", f"/CN={name}", *names, "-keyout", key, "-out", certificate)
    return folder


def started(gateway: Gateway, replica: Replica, folder: Path, *others: Replica) -> Envoy:
    port, metrics, admin = free_ports("127.0.0.1", 3)
    replicas = (replica, *others)
    envoy = Envoy(replace(gateway, replicas=replicas, port=port, metrics_port=metrics, admin_port=admin), folder)
    envoy.await_replica(replica.grpc_port, healthy=True)
    return envoy


@needs_envoy
def test_pods_that_are_not_there_yet_get_nothing(upstream: tuple[Replica, Triton], tmp_path: Path) -> None:
    """Of a StatefulSet's names most do not resolve until the autoscaler starts them."""
    replica, triton = upstream
    absent = [replace(replica, host=f"mtgr-{number}.mtgr-pods.invalid") for number in range(1, 24)]
    envoy = started(Gateway(), replace(replica, host="localhost"), tmp_path, *absent)
    try:
        with MTGRClient(f"127.0.0.1:{envoy.gateway.port}", timeout=5, retries=0) as client:
            assert all(client.is_ready() for _ in range(50))
        assert len(triton.metadata) == 50
    finally:
        envoy.stop()


@needs_envoy
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_callers_are_known_by_their_certificates(
    upstream: tuple[Replica, Triton], certificates: Path, tmp_path: Path, protocol: Any
) -> None:
    replica, triton = upstream
    tls = Certificates(certificates / "gateway.pem", certificates / "gateway.key", certificates / "ca.pem")
    envoy = started(Gateway(tls=tls), replica, tmp_path)
    own = TLS(certificates / "ca.pem", certificates / "caller.pem", certificates / "caller.key")
    url = f"127.0.0.1:{envoy.gateway.port}"
    try:
        with MTGRClient(url, protocol=protocol, tls=own, timeout=5) as client:
            if protocol == "grpc":
                assert client.is_ready()
                assert [one["x-mtgr-client"] for one in triton.metadata] == ["CN=caller"]
            else:  # reaches the upstream, which is none for HTTP
                with pytest.raises((ServerError, UnavailableError)) as error:
                    client.recommend("1")
                assert "answered HTTP" in str(error.value)
        for wrong in (None, TLS(), replace(own, certificate=None, key=None)):
            with MTGRClient(url, protocol=protocol, tls=wrong, timeout=1) as client:
                assert not client.is_ready()
    finally:
        envoy.stop()
    assert len(triton.metadata) == (1 if protocol == "grpc" else 0)


def test_tls_files_that_cannot_be_used_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="TLS files cannot be used"):
        MTGRClient(tls=TLS(tmp_path / "missing.pem"))


@needs_envoy
def test_a_caller_who_asks_too_often_is_refused_and_cannot_pass_for_another(
    upstream: tuple[Replica, Triton], tmp_path: Path
) -> None:
    replica, triton = upstream
    envoy = started(Gateway(requests_per_second=10), replica, tmp_path)
    codes: list[grpc.StatusCode] = []
    try:
        with grpc.insecure_channel(f"127.0.0.1:{envoy.gateway.port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

            def ask(index: int) -> grpc.StatusCode:
                # Another name each time, and a wish for retries, which are thrown away.
                metadata = (("x-mtgr-client", f"other-{index}"), ("x-envoy-max-retries", "100"))
                try:
                    stub.ModelReady(service_pb2.ModelReadyRequest(name="mtgr"), metadata=metadata, timeout=5)
                except grpc.RpcError as error:
                    code: grpc.StatusCode = error.code()
                    return code
                return grpc.StatusCode.OK

            codes = [ask(index) for index in range(40)]
            assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) >= 25
            assert 10 <= codes.count(grpc.StatusCode.OK) <= 15
            time.sleep(1.2)
            assert ask(0) is grpc.StatusCode.OK
    finally:
        envoy.stop()
    assert {one["x-mtgr-client"] for one in triton.metadata} == {"127.0.0.1"}
    assert not [one for one in triton.metadata if "x-envoy-max-retries" in one]
