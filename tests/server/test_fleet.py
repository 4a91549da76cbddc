"""Two real servers behind the real Envoy: nothing is lost when one dies or is restarted, and users find their cache."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from mtgr.client import AsyncMTGRClient, MTGRClient, Recommendation
from mtgr.config import ModelConfig
from mtgr.errors import ConfigurationError
from mtgr.serving.fleet import Fleet
from mtgr.serving.gateway import Gateway, find_envoy
from mtgr.serving.neighbours import Envoy, Prometheus, Redis, installed
from mtgr.serving.ports import free_ports
from mtgr.serving.replica import ReplicaProcess
from perf.repository import built_repository
from perf.synthetic import EPOCH, SPAN, synthetic_checkpoint
from tests.conftest import ROOT
from tests.server.test_door import REQUEST_TIME
from tests.server.test_faults import CANDIDATES, USERS, Load, same
from tests.static.test_observability import GPU_METRICS, METRIC, dashboard_queries

SCRAPE_SECONDS = 1.0
ANY_PORTS = Gateway(port=0, metrics_port=0, admin_port=0)

with contextlib.suppress(ConfigurationError):
    find_envoy()
    ENVOY = True
pytestmark = [
    pytest.mark.skipif("ENVOY" not in globals(), reason="Envoy is not installed; `make test` installs it"),
    pytest.mark.skipif(
        not (installed(Redis) and installed(Prometheus)),
        reason="Redis or Prometheus is not installed; `make test` installs them where it may",
    ),
]


@pytest.fixture(scope="module")
def fleet(model_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    running = Fleet(
        model_repository,
        tmp_path_factory.mktemp("fleet"),
        gateway=ANY_PORTS,
        prometheus_port=0,
        scrape_seconds=SCRAPE_SECONDS,
    )
    with running:
        yield running


@pytest.fixture(scope="module")
def expected(fleet: Fleet) -> dict[str, Recommendation]:
    """What every user must get, from the servers when nothing happens to them."""
    with MTGRClient(fleet.url) as client:
        return {user: client.rank(user, CANDIDATES, strategy="baseline", request_time=REQUEST_TIME) for user in USERS}


def under_load(fleet: Fleet, expected: dict[str, Recommendation], action: Callable[[], None]) -> Load:
    """Callers in a thread, who do not try again themselves, while ``action`` runs here, whose children it starts."""
    load = Load(fleet.url, expected)
    ended = threading.Event()

    async def run() -> None:
        async with load.running():
            while not ended.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        time.sleep(2.0)
        action()
        time.sleep(1.0)
    finally:
        ended.set()
        thread.join()
    return load


def triton(replica: ReplicaProcess) -> int:
    """The server's own process id, a child of its launcher."""
    found = subprocess.run(["pgrep", "-P", str(replica.pid)], capture_output=True, text=True, check=True)
    return int(found.stdout)


def metric(port: int, name: str) -> float:
    """Sum over the series of a name, on a metrics page."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text = response.read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? ([-+.e\d]+)$", text, flags=re.MULTILINE))


def served(fleet: Fleet) -> list[float]:
    time.sleep(1.2)  # metrics are brought up to date once a second
    return [metric(replica.metrics_port, "mtgr_requests_total") for replica in fleet.replicas]


def test_a_killed_replica_loses_no_request(fleet: Fleet, expected: dict[str, Recommendation]) -> None:
    victim = fleet.replicas[0]
    assert fleet.envoy is not None

    def kill() -> None:
        os.kill(triton(victim), signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not victim.ended:
            assert time.monotonic() < deadline, "the launcher did not notice"
            time.sleep(0.1)
        fleet.supervise()  # starts it again

    load = under_load(fleet, expected, kill)
    load.check(success=1.0)
    assert fleet.envoy.healthy() == {replica.address.grpc_port for replica in fleet.replicas}
    assert load.slowest <= 3.0


def test_a_rolling_restart_fails_no_request(fleet: Fleet, expected: dict[str, Recommendation]) -> None:
    before = [triton(replica) for replica in fleet.replicas]
    load = under_load(fleet, expected, fleet.rolling_restart)
    load.check(success=1.0)
    assert load.slowest <= 3.0
    assert not set(before) & {triton(replica) for replica in fleet.replicas}


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_user_is_served_by_one_replica_and_users_by_all(
    fleet: Fleet, expected: dict[str, Recommendation], protocol: Any
) -> None:
    with MTGRClient(fleet.url, protocol=protocol) as client:
        start = served(fleet)
        for _ in range(20):
            answer = client.rank("1", CANDIDATES, strategy="baseline", request_time=REQUEST_TIME)
            assert same(answer, expected["1"])
        one = [late - early for late, early in zip(served(fleet), start, strict=True)]
        # A question of health may come in between.
        assert max(one) >= 20
        assert min(one) <= 2
        start = served(fleet)
        for user in USERS:
            client.rank(user, CANDIDATES, strategy="baseline", request_time=REQUEST_TIME)
        assert min(late - early for late, early in zip(served(fleet), start, strict=True)) >= len(USERS) / 4


def call(fleet: Fleet, method: str, request: Any, **options: Any) -> tuple[grpc.StatusCode, str]:
    with grpc.insecure_channel(fleet.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            getattr(stub, method)(request, timeout=5, **options)
        except grpc.RpcError as error:
            return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def test_over_grpc_only_the_public_model_can_be_reached(fleet: Fleet) -> None:
    denied = grpc.StatusCode.PERMISSION_DENIED
    assert call(fleet, "ModelReady", service_pb2.ModelReadyRequest(name="mtgr"))[0] is grpc.StatusCode.OK
    assert call(fleet, "ModelMetadata", service_pb2.ModelMetadataRequest(name="mtgr"))[0] is grpc.StatusCode.OK
    for model in ("mtgr_baseline", "mtgr_router", "", "mtgr2"):
        assert call(fleet, "ModelReady", service_pb2.ModelReadyRequest(name=model))[0] is denied
        assert call(fleet, "ModelMetadata", service_pb2.ModelMetadataRequest(name=model))[0] is denied
        assert call(fleet, "ModelInfer", service_pb2.ModelInferRequest(model_name=model))[0] is denied
    # The name that counts is the last one in a message: to Envoy as to Triton.
    twice = service_pb2.ModelReadyRequest(name="mtgr").SerializeToString()
    twice += service_pb2.ModelReadyRequest(name="mtgr_baseline").SerializeToString()
    with grpc.insecure_channel(fleet.url) as channel:
        raw = channel.unary_unary("/inference.GRPCInferenceService/ModelReady", lambda data: data, lambda data: data)
        with pytest.raises(grpc.RpcError) as refused:
            raw(twice, timeout=5)
    assert refused.value.code() in (denied, grpc.StatusCode.INVALID_ARGUMENT)
    for method, request in (
        ("RepositoryIndex", service_pb2.RepositoryIndexRequest()),
        ("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name="mtgr")),
        ("SystemSharedMemoryStatus", service_pb2.SystemSharedMemoryStatusRequest()),
        ("ModelConfig", service_pb2.ModelConfigRequest(name="mtgr")),
        ("LogSettings", service_pb2.LogSettingsRequest()),
        ("ServerMetadata", service_pb2.ServerMetadataRequest()),
    ):
        code, _ = call(fleet, method, request)
        assert code in (grpc.StatusCode.UNIMPLEMENTED, denied), method


def ask(fleet: Fleet, method: str, path: str, body: Any = None) -> int:
    connection = http.client.HTTPConnection(fleet.url, timeout=10)
    try:
        connection.request(method, path, body)
        return connection.getresponse().status
    finally:
        connection.close()


QUESTION = json.dumps(
    {
        "inputs": [
            {"name": "user_id", "datatype": "BYTES", "shape": [1, 1], "data": ["1"]},
            {"name": "candidates", "datatype": "INT64", "shape": [1, 2], "data": [1, 50]},
        ]
    }
)


def test_over_http_only_the_public_model_can_be_reached(fleet: Fleet) -> None:
    assert ask(fleet, "POST", "/v2/models/mtgr/infer", QUESTION) == http.client.OK
    assert ask(fleet, "GET", "/v2/models/mtgr/ready") == http.client.OK
    for method, path in (
        ("POST", "/v2/models/mtgr_baseline/infer"),
        ("POST", "/v2/models/mtgr/../mtgr_baseline/infer"),
        ("POST", "/v2/models/mtgr%2F..%2Fmtgr_baseline/infer"),
        ("POST", "/v2/models/mtgr/versions/1/infer"),
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/mtgr/load"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("GET", "/v2/logging"),
        ("GET", "/metrics"),
        ("GET", "/stats/prometheus"),
        ("POST", "/v2/models/mtgr/generate"),
        ("GET", "/"),
    ):
        assert ask(fleet, method, path, QUESTION if method == "POST" else None) in (400, 403, 404), path


def test_bodies_are_bounded_and_chunks_are_put_together(fleet: Fleet, expected: dict[str, Recommendation]) -> None:
    assert ask(fleet, "POST", "/v2/models/mtgr/infer", b" " * 1_100_000) == http.client.REQUEST_ENTITY_TOO_LARGE
    large = service_pb2.ModelInferRequest(model_name="mtgr", raw_input_contents=[b" " * 1_100_000])
    assert call(fleet, "ModelInfer", large)[0] is not grpc.StatusCode.OK
    # In chunks of one byte: Triton 2.51 would put each on its stack.
    pieces = (character.encode() for character in QUESTION)
    assert ask(fleet, "POST", "/v2/models/mtgr/infer", pieces) == http.client.OK
    host, port = fleet.url.split(":")
    head = b"POST /v2/models/mtgr/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head)
        with contextlib.suppress(ConnectionError):
            for _ in range(120):
                connection.sendall(b"1\r\nx\r\n" * 10_000)
        assert b" 413 " in connection.recv(4096)
    with MTGRClient(fleet.url) as client:
        assert same(client.rank("1", CANDIDATES, strategy="baseline", request_time=REQUEST_TIME), expected["1"])


def test_nothing_listens_beyond_loopback(fleet: Fleet) -> None:
    found = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    ours = descendants(os.getpid())
    addresses = {
        line.split()[3].rsplit(":", 1)[0]
        for line in found.splitlines()
        if ours & {int(pid) for pid in re.findall(r"pid=(\d+)", line)}
    }
    assert addresses <= {"127.0.0.1", "[::ffff:127.0.0.1]"}
    assert addresses


def test_metrics_of_the_gateway_are_there_and_admin_is_not(fleet: Fleet) -> None:
    port = fleet.envoy.gateway.metrics_port if fleet.envoy else 0

    def page(path: str, method: str = "GET") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    status, text = page("/stats/prometheus")
    assert status == http.client.OK
    assert 'envoy_cluster_upstream_rq_total{envoy_cluster_name="grpc"}' in text
    for path, method in (("/quitquitquit", "POST"), ("/config_dump", "GET"), ("/stats/prometheus", "POST")):
        assert page(path, method)[0] == http.client.NOT_FOUND


ZIPF_USERS = 2000
CONTEXT = 128
# Each replica has pages for one user in twenty-five, so that it matters whose they are.
CACHED_USERS = 80
NETWORK = ModelConfig(
    num_layers=2,
    d_model=64,
    num_heads=2,
    attention_norm_length=512,
    feature_dim=16,
    item_dim=32,
    head_dim=32,
    retrieve_count=64,
)
BYTES_PER_TOKEN = 2 * 4 * NETWORK.num_layers * NETWORK.d_model  # keys and values


def prefix_hit_ratio(fleet: Fleet, url: str, crowd: str, seed: int) -> float:
    """Of 1,500 requests by users of a crowd, Zipf-distributed, eight at a time: cached part of all context tokens."""
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, ZIPF_USERS + 1)
    users = iter(generator.choice(ZIPF_USERS, 1500, p=weights / weights.sum()).tolist())

    def tokens() -> list[float]:
        time.sleep(1.2)  # metrics are brought up to date once a second
        names = ("mtgr_vllm_prefix_hit_tokens_total", "mtgr_vllm_context_tokens_total")
        return [sum(metric(replica.metrics_port, name) for replica in fleet.replicas) for name in names]

    async def ask_all() -> None:
        async def caller(client: AsyncMTGRClient) -> None:
            for user in users:
                await client.rank(f"{crowd}-{user}", [1, 2, 3, 4], strategy="vllm", request_time=EPOCH + SPAN)

        async with AsyncMTGRClient(url, timeout=20) as client:
            await asyncio.gather(*(caller(client) for _ in range(8)))

    before = tokens()
    asyncio.run(ask_all())
    cached, asked = (late - early for late, early in zip(tokens(), before, strict=True))
    assert asked >= 1500 * (CONTEXT - 8)
    return cached / asked


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two replicas with vllm and baseline, everything on, scraped once a second, and two crowds of users."""
    pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm` installs it where it can")
    folder = tmp_path_factory.mktemp("crowded")
    users = {f"{crowd}-{index}": CONTEXT for crowd in ("first", "second") for index in range(ZIPF_USERS)}
    model = synthetic_checkpoint(NETWORK, num_items=1000, seed=0, max_history=300)
    memory = {"kv_cache_memory_bytes": CACHED_USERS * CONTEXT * BYTES_PER_TOKEN}
    repository = built_repository(folder, model, users, 0, ("vllm", "baseline"), memory)
    policy = folder / "policy.yaml"
    policy.write_text("shadow: { strategy: baseline, share: 0.02 }", encoding="utf-8")
    fleet = Fleet(
        repository,
        folder / "state",
        gateway=ANY_PORTS,
        prometheus_port=0,
        scrape_seconds=SCRAPE_SECONDS,
        environment={"MTGR_POLICY": str(policy)},
    )
    with fleet:
        yield fleet


def test_affinity_finds_cached_prefixes_more_often_than_random_balancing(crowded: Fleet, tmp_path: Path) -> None:
    assert crowded.envoy is not None
    door, metrics, admin = free_ports("127.0.0.1", 3)
    spread = replace(crowded.envoy.gateway, balance="random", port=door, metrics_port=metrics, admin_port=admin)
    envoy = Envoy(spread, tmp_path)
    try:
        for replica in crowded.replicas:
            envoy.await_replica(replica.address.grpc_port, healthy=True)
        by_chance = prefix_hit_ratio(crowded, f"127.0.0.1:{door}", "first", seed=1)
    finally:
        envoy.stop()
    # The other crowd has the same habits and finds nothing that the first one left behind.
    by_user = prefix_hit_ratio(crowded, crowded.url, "second", seed=1)
    print(f"prefix hit ratio: ring hash {by_user:.3f}, random {by_chance:.3f}, gain {by_user / by_chance:.2f}x")
    assert by_user >= 1.15 * by_chance


def query(fleet: Fleet, expression: str) -> list[float]:
    assert fleet.prometheus is not None
    address = f"http://127.0.0.1:{fleet.prometheus.port}/api/v1/query?" + urlencode({"query": expression})
    with urllib.request.urlopen(address) as response:
        answer = json.load(response)
    assert answer["status"] == "success"
    return [float(one["value"][1]) for one in answer["data"]["result"]]


def test_no_panel_of_the_dashboard_is_empty(crowded: Fleet) -> None:
    with MTGRClient(crowded.url) as client:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            for user in range(20):
                client.rank(f"second-{user}", [1, 2, 3, 4], strategy="vllm", request_time=EPOCH + SPAN)
    time.sleep(2 * SCRAPE_SECONDS)
    found = {
        (panel, expression): query(crowded, expression.replace("$__rate_interval", "1m"))
        for panel, expression in dashboard_queries()
    }
    assert len(found) >= 60
    empty = {key for key, values in found.items() if not any(map(math.isfinite, values))}
    # What a machine without a GPU has no metrics for; their names and queries are checked by test_observability.py.
    without_gpu = {key for key in found if "nv_gpu_" in key[1] or "nv_energy_" in key[1]}
    assert empty == without_gpu
    assert {panel for panel, _ in without_gpu} == {"GPU utilization", "GPU memory", "GPU power"}


def test_rules_are_evaluated_and_no_alert_fires(crowded: Fleet) -> None:
    assert crowded.prometheus is not None
    with urllib.request.urlopen(f"http://127.0.0.1:{crowded.prometheus.port}/api/v1/rules") as response:
        groups = json.load(response)["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) >= 30
    assert not [rule["name"] for rule in rules if rule["health"] != "ok"]
    assert not [rule["name"] for rule in rules if rule.get("state") == "firing"]
    # Every name that a rule asks for is there, but for those of things that have not happened and of a GPU.
    names = {name for rule in rules for name in METRIC.findall(rule["query"])}
    missing = {name for name in names if not query(crowded, f"count({name})")}
    assert missing == {"mtgr_errors_total", "mtgr_breaker_state"} | GPU_METRICS & names


def descendants(pid: int) -> set[int]:
    """Processes below one, whoever started them."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    found: set[int] = set()
    grown = {pid}
    while grown:
        grown = {child for child, parent in parents.items() if parent in grown}
        found |= grown
    return found


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_the_command_ends_all_that_it_started(model_repository: Path, tmp_path: Path, ending: signal.Signals) -> None:
    command = [sys.executable, "-u", "-m", "mtgr.serving.fleet", "--model-repository", str(model_repository)]
    command += ["--state", str(tmp_path), "--replicas", "1", "--port", "0", "--metrics-port", "0", "--admin-port", "0"]
    command += ["--prometheus-port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Ctrl-C"):
            break
    table = "".join(lines)
    assert re.search(r"^gateway +127\.0\.0\.1:\d+", table, flags=re.MULTILINE), table
    started = descendants(process.pid)
    assert len(started) >= 8  # launcher, Triton, stubs, Envoy, Redis, Prometheus
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "already running" in second.stderr
    if ending is signal.SIGINT:
        restart = [sys.executable, "-m", "mtgr.serving.fleet", "restart", "--state", str(tmp_path)]
        assert subprocess.run(restart, cwd=ROOT, check=False).returncode == 0
        assert "all servers were restarted" in process.stdout.readline()
        started |= descendants(process.pid)
    process.send_signal(ending)
    assert process.wait(timeout=30) == (0 if ending is signal.SIGINT else -signal.SIGKILL)
    deadline = time.monotonic() + 15
    while left := {pid for pid in started if Path(f"/proc/{pid}").exists()}:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
