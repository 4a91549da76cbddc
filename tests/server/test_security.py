"""What ``docs/security.md`` promises of a running server: management asks for a key, and no size brings it down."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

from mtgr.client import MTGRClient
from mtgr.errors import InvalidRequestError
from mtgr.serving import TritonServer
from mtgr.serving.management import GRPC_HEADER, HTTP_HEADER, RestrictedServer
from tests.conftest import ROOT, copy_door
from tests.server.launcher_repository import add_doors, add_identity
from tests.server.test_bad_input import Door, int64, request
from tests.server.test_door import REQUEST_TIME, assert_same
from tests.server.test_launcher import processes_of

KEY = "a-key-that-nobody-knows_" + secrets.token_hex(8)
SPARE = "spare"  # a model that the tests may unload
MiB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("MTGR_PROFILE", "MTGR_POLICY", "MTGR_ADMIN_KEY", "MTGR_ADMIN_KEY_FILE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = add_doors(tmp_path_factory.mktemp("repository"))
    add_identity(models, SPARE)
    return models


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A repository whose processes are those of one test."""
    return add_doors(tmp_path / "models")


@pytest.fixture(scope="module")
def restricted(repository: Path) -> Iterator[TritonServer]:
    # Explicit control, so that a load would happen if it were allowed.
    control = ["--model-control-mode=explicit", "--load-model=*"]
    with RestrictedServer(repository, key=KEY, extra_args=control) as running:
        yield running


def ask(
    address: str, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@contextlib.contextmanager
def region(size: int = 64) -> Iterator[str]:
    """A POSIX shared-memory region, as another process on the machine might own it."""
    name = f"/mtgr-test-{secrets.token_hex(4)}"
    handle = shm.create_shared_memory_region(name, name, size)
    try:
        yield name
    finally:
        shm.destroy_shared_memory_region(handle)


# --- who may manage --------------------------------------------------------------------------------------------------

HTTP_MANAGEMENT = {
    "index": ("POST", "/v2/repository/index", b""),
    "load": ("POST", f"/v2/repository/models/{SPARE}/load", b"{}"),
    "load of a config sent along": (
        "POST",
        f"/v2/repository/models/{SPARE}/load",
        json.dumps({"parameters": {"config": '{"backend": "python"}', "file:1/model.py": "aW1wb3J0IG9z"}}).encode(),
    ),
    "unload": ("POST", f"/v2/repository/models/{SPARE}/unload", b"{}"),
    "shared memory": ("GET", "/v2/systemsharedmemory/status", b""),
    "shared memory, register": (
        "POST",
        "/v2/systemsharedmemory/region/r/register",
        b'{"key": "/r", "offset": 0, "byte_size": 8}',
    ),
    "shared memory, unregister": ("POST", "/v2/systemsharedmemory/unregister", b""),
    "GPU memory": ("GET", "/v2/cudasharedmemory/status", b""),
    "GPU memory, register": ("POST", "/v2/cudasharedmemory/region/r/register", b"{}"),
    "GPU memory, unregister": ("POST", "/v2/cudasharedmemory/unregister", b""),
    "trace": ("GET", "/v2/trace/setting", b""),
    "trace, set": ("POST", "/v2/trace/setting", b'{"trace_rate": "7"}'),
    "trace of a model": ("GET", "/v2/models/mtgr/trace/setting", b""),
    "trace of a model, set": ("POST", "/v2/models/mtgr/trace/setting", b'{"trace_rate": "7"}'),
    "log": ("GET", "/v2/logging", b""),
    "log, set": ("POST", "/v2/logging", b'{"log_verbose_level": 1}'),
}
GRPC_MANAGEMENT: dict[str, tuple[str, tuple[Any, ...]]] = {
    "index": ("get_model_repository_index", ()),
    "load": ("load_model", (SPARE,)),
    "unload": ("unload_model", (SPARE,)),
    "shared memory": ("get_system_shared_memory_status", ()),
    "shared memory, register": ("register_system_shared_memory", ("r", "/r", 8)),
    "shared memory, unregister": ("unregister_system_shared_memory", ()),
    "GPU memory": ("get_cuda_shared_memory_status", ()),
    "GPU memory, register": ("register_cuda_shared_memory", ("r", b"", 0, 8)),
    "GPU memory, unregister": ("unregister_cuda_shared_memory", ()),
    "trace": ("get_trace_settings", ()),
    "trace, set": ("update_trace_settings", ("mtgr", {"trace_rate": "7"})),
    "log": ("get_log_settings", ()),
    "log, set": ("update_log_settings", ({"log_verbose_level": 1},)),
}
# What callers without the key may send in its header; None for no header.
GUESSES = (None, "", KEY[:-1], KEY + "x", KEY.upper())


def header(name: str, guess: str | None) -> dict[str, str]:
    return {} if guess is None else {name: guess}


@pytest.mark.parametrize("name", HTTP_MANAGEMENT)
def test_management_over_http_asks_for_the_key(restricted: TritonServer, name: str) -> None:
    method, path, body = HTTP_MANAGEMENT[name]
    for guess in GUESSES:
        status, text = ask(restricted.http_url, method, path, body, header(HTTP_HEADER, guess))
        assert (status, "restricted" in text) == (403, True), (guess, status, text)
    assert all(status.ready for status in restricted.models())  # nothing was unloaded, the launcher has the key


@pytest.mark.parametrize("name", GRPC_MANAGEMENT)
def test_management_over_grpc_asks_for_the_key(restricted: TritonServer, name: str) -> None:
    call, arguments = GRPC_MANAGEMENT[name]
    with grpcclient.InferenceServerClient(restricted.grpc_url) as client:
        for guess in GUESSES:
            with pytest.raises(InferenceServerException, match="restricted"):
                getattr(client, call)(*arguments, headers=header(GRPC_HEADER, guess))
        # A key without Triton's prefix is a header like any other.
        with pytest.raises(InferenceServerException, match="restricted"):
            getattr(client, call)(*arguments, headers={HTTP_HEADER: KEY})
    assert all(status.ready for status in restricted.models())


def test_the_key_opens_management(restricted: TritonServer) -> None:
    """Otherwise the tests above might only see a server that refuses everybody."""

    def spare() -> bool:
        return any(status.ready for status in restricted.models() if status.name == SPARE)

    for call in ("unload", "load"):
        method, path, body = HTTP_MANAGEMENT[call]
        assert ask(restricted.http_url, method, path, body, {HTTP_HEADER: KEY})[0] == 200
        assert spare() == (call == "load")
    with grpcclient.InferenceServerClient(restricted.grpc_url) as client:
        headers = {GRPC_HEADER: KEY}
        client.unload_model(SPARE, headers=headers)
        assert not spare()
        client.load_model(SPARE, headers=headers)
        assert spare()
        with region() as name:
            client.register_system_shared_memory("r", name, 64, headers=headers)
            assert "r" in client.get_system_shared_memory_status(headers=headers, as_json=True)["regions"]
            client.unregister_system_shared_memory("r", headers=headers)


def test_what_clients_probes_and_load_generators_ask_stays_open(restricted: TritonServer) -> None:
    for path in ("", "/health/live", "/health/ready", "/models/mtgr", "/models/mtgr/ready", "/models/mtgr/config"):
        assert ask(restricted.http_url, "GET", f"/v2{path}")[0] == 200, path
    assert ask(restricted.http_url, "GET", "/v2/models/stats")[0] == 200
    assert ask(restricted.metrics_url.split("/")[2], "GET", "/metrics")[0] == 200
    with grpcclient.InferenceServerClient(restricted.grpc_url) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.get_server_metadata().version
        assert client.get_model_metadata("mtgr").name == "mtgr"
        assert client.get_model_config("mtgr").config.name == "mtgr"
        assert client.get_inference_statistics().model_stats
        tensor = grpcclient.InferInput("x", [1], "FP32")
        tensor.set_data_from_numpy(np.array([2.5], np.float32))
        assert client.infer("mtgr", [tensor]).as_numpy("y").tolist() == [2.5]
    with MTGRClient(restricted.grpc_url) as typed, MTGRClient(restricted.http_url, protocol="http") as typed_http:
        assert typed.is_ready()
        assert typed_http.is_ready()


def test_nobody_reads_a_region_that_was_not_registered(restricted: TritonServer) -> None:
    """A region of the machine, such as those of the server's own stubs, cannot be named in a request."""
    with region() as name, grpcclient.InferenceServerClient(restricted.grpc_url) as client:
        with pytest.raises(InferenceServerException, match="restricted"):
            client.register_system_shared_memory(name, name, 64)
        tensor = grpcclient.InferInput("x", [4], "FP32")
        tensor.set_shared_memory(name, 16)
        with pytest.raises(InferenceServerException, match="Unable to find shared memory region"):
            client.infer("mtgr", [tensor])


@pytest.mark.parametrize("name", ["index", "load", "shared memory, register", "log, set"])
def test_chunks_do_not_get_past_the_restriction(restricted: TritonServer, name: str) -> None:
    """A body in very many chunks overflows the stack of Triton 2.51 wherever one is read."""
    host, _, port = restricted.http_url.rpartition(":")
    head = f"POST {HTTP_MANAGEMENT[name][1]} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):  # it may hang up before it has heard all
            connection.sendall(head.encode() + b"1\r\nA\r\n" * 1_200_000 + b"0\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert connection.recv(64).split()[1] == b"403"
    assert all(status.ready for status in restricted.models())


def test_models_do_not_get_the_key(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTGR_ADMIN_KEY", KEY)
    with TritonServer(own):
        processes = processes_of(own)
        assert len(processes) == 4  # the server and a stub for each door
        for pid in processes:
            assert KEY.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


# --- the command line ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Started:
    """A server that ``python -m mtgr.serving`` started, with all that it printed up to its table."""

    output: str

    def address(self, protocol: str) -> str:
        found = re.search(rf"^{protocol}\s+(\S+)$", self.output, re.MULTILINE)
        assert found is not None
        return found[1]

    def index(self, key: str | None = None) -> int:
        headers = {} if key is None else {HTTP_HEADER: key}
        return ask(self.address("HTTP"), "POST", "/v2/repository/index", headers=headers)[0]

    def log(self) -> str:
        return Path(self.address("log")).read_text()


@contextlib.contextmanager
def serving(repository: Path, *options: str, **environment: str) -> Iterator[Started]:
    ports = ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mtgr.serving", "--model-repository", str(repository), *ports, *options],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("auto:"):
                break
        else:
            raise AssertionError(f"the server did not start: {process.communicate()[1]}")
        yield Started("".join(lines))
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def test_without_a_word_the_profile_is_prod_and_the_key_is_nowhere(own: Path) -> None:
    with serving(own, "--", "--log-verbose=2") as started:
        assert "profile  prod, management restricted" in started.output
        assert started.index() == 403
        (key,) = set(re.findall(r"--http-restricted-api=\S+=(\S+)", " ".join(processes_of(own).values())))
        assert len(key) == 64
        assert started.index(key) == 200
        # Even with the key nothing is loaded or unloaded, unless the server was started for that.
        for call in ("load", "unload"):
            method, path, body = HTTP_MANAGEMENT[call]
            status, text = ask(started.address("HTTP"), method, path, body, {HTTP_HEADER: key})
            assert (status, "not allowed" in text) == (503, True)
        assert key not in started.output
        assert key not in started.log()


def test_a_key_of_ones_own_is_shown_to_who_asks(own: Path, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    with serving(own, "--profile=test", "--show-admin-key", MTGR_ADMIN_KEY_FILE=str(file)) as started:
        assert f"profile  test, management restricted, header {HTTP_HEADER}: {KEY}\n" in started.output
        assert (started.index(), started.index(KEY)) == (403, 200)


@pytest.mark.parametrize(
    ("options", "environment", "profile"),
    [
        (["--profile=dev"], {}, "dev"),
        ([], {"MTGR_PROFILE": "dev"}, "dev"),
        (["--allow-management"], {"MTGR_ADMIN_KEY": KEY}, "prod"),
    ],
    ids=["option", "variable", "allowed"],
)
def test_dev_and_who_allows_it_have_open_management(
    own: Path, options: list[str], environment: dict[str, str], profile: str
) -> None:
    with serving(own, *options, **environment) as started:
        assert f"profile  {profile}, management open to every caller" in started.output
        assert started.index() == 200
        environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in processes_of(own)]
        chosen = [text for text in environments if f"MTGR_PROFILE={profile}".encode() in text.split(b"\0")]
        assert bool(chosen) == (profile == "dev")  # the models follow the option


# --- sizes -----------------------------------------------------------------------------------------------------------


def large(name: str) -> dict[str, np.ndarray[Any, Any]]:
    """64 MiB in one tensor."""
    numbers = np.ones((1, 8 * MiB), np.int64)
    return {
        "candidates": request(candidates=numbers),
        "history": request(history_items=numbers, history_actions=numbers.astype(np.int32), history_times=numbers),
        "user_id": request(user_id=np.array([[b"u" * (64 * MiB)]], np.object_)),
        "profile": request(profile=np.array([[b'{"age":"' + b"9" * (64 * MiB) + b'"}']], np.object_)),
        "strategy": request(strategy=np.array([[b"s" * (64 * MiB)]], np.object_)),
    }[name]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("name", ["candidates", "history", "user_id", "profile", "strategy"])
def test_a_request_far_too_large_is_refused_and_the_server_goes_on(
    server: TritonServer, name: str, protocol: str
) -> None:
    door = Door(server, protocol)
    processes = set(processes_of(server.model_repository))
    before = door.send(request())
    with pytest.raises(InvalidRequestError) as caught:
        door.send(large(name))
    assert name in str(caught.value)
    assert len(str(caught.value)) < 300  # not what was sent
    assert_same(door.send(request()), before)
    assert set(processes_of(server.model_repository)) == processes
    with MTGRClient(server.grpc_url) as client:
        assert client.is_ready()
        assert len(client.recommend("196", request_time=REQUEST_TIME)) == 10


def test_a_large_body_of_json_is_refused(server: TritonServer) -> None:
    body = {"inputs": [{"name": "candidates", "datatype": "INT64", "shape": [1, MiB], "data": [1] * MiB}]}
    user = {"name": "user_id", "datatype": "BYTES", "shape": [1, 1], "data": ["196"]}
    body["inputs"].append(user)
    status, text = ask(server.http_url, "POST", "/v2/models/mtgr/infer", json.dumps(body).encode())
    assert status == 400
    assert "candidates has 1048576 items; at most 16384 are allowed" in text
    assert Door(server, "http").send(request(candidates=int64(1))).items.tolist() == [1]


def test_a_timed_run_ends_by_itself(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("extends: test\ntimed_run_seconds: 1.0\n", encoding="utf-8")
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    done = subprocess.run(
        [sys.executable, "-m", "mtgr.serving", "--model-repository", str(copy_door(tmp_path / "doors")), *ports],
        cwd=ROOT,
        env={**os.environ, "MTGR_POLICY": str(policy)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "the server stops after 1 s" in done.stdout
