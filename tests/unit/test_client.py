"""The client against real servers on loopback: gRPC with Triton's own service, HTTP written from its protocol."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import importlib
import json
import random
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from mtgr.client import AsyncMTGRClient, History, MTGRClient, Recommendation, RecommendationRequest
from mtgr.client.failures import sentence
from mtgr.client.retry import Attempts, RetryPolicy
from mtgr.client.wire import AFFINITY_HEADER, encode
from mtgr.data.dataset import Item
from mtgr.errors import (
    ConfigurationError,
    InvalidRequestError,
    MTGRError,
    RequestTimeoutError,
    ServerError,
    UnavailableError,
)

STRATEGY_OUTPUT = "served_strategy"
NUMPY = {"INT64": "<i8", "INT32": "<i4", "FP32": "<f4"}
# Triton's own table from its error codes to HTTP (server/src/http_server.cc).
HTTP_STATUS = {"INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "UNAVAILABLE": 503, "INTERNAL": 500}


@dataclass(frozen=True)
class Tensor:
    datatype: str
    shape: tuple[int, ...]
    values: list[Any]


@dataclass(frozen=True)
class Refusal:
    code: str
    message: str


@dataclass(frozen=True)
class Raw:
    """An HTTP answer that is not Triton's; ``length`` is what Content-Length claims."""

    status: int
    body: bytes
    length: int | None = None


def unpack(datatype: str, raw: bytes) -> list[Any]:
    if datatype != "BYTES":
        return list(np.frombuffer(raw, NUMPY[datatype]).tolist())
    values: list[Any] = []
    offset = 0
    while offset < len(raw):
        (length,) = struct.unpack_from("<I", raw, offset)
        values.append(raw[offset + 4 : offset + 4 + length])
        offset += 4 + length
    return values


def pack(tensor: Tensor) -> bytes:
    if tensor.datatype != "BYTES":
        return np.array(tensor.values, NUMPY[tensor.datatype]).tobytes()
    return b"".join(struct.pack("<I", len(value)) + value for value in tensor.values)


def answer(items: list[int], arm: str = "control") -> dict[str, Tensor]:
    m = len(items)
    return {
        "items": Tensor("INT64", (1, m), items),
        "scores": Tensor("FP32", (1, m), [1.0 / (place + 1) for place in range(m)]),
        "task_scores": Tensor("FP32", (1, m, 3), [cell / 64 for cell in range(3 * m)]),
        STRATEGY_OUTPUT: Tensor("BYTES", (1, 1), [b"onnx"]),
        "arm": Tensor("BYTES", (1, 1), [arm.encode()]),
    }


@dataclass
class Door:
    """What both servers do: note the request, then play the next step of the script (at its end: the last step)."""

    script: Sequence[dict[str, Tensor] | Refusal | Raw] = field(default_factory=lambda: [answer([50, 2**40, 1])])
    delay: float = 0.0
    ready: bool = True
    requests: list[dict[str, Tensor]] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def play(self, model: str, inputs: dict[str, Tensor], peer: str) -> dict[str, Tensor] | Refusal | Raw:
        self.requests.append(inputs)
        self.peers.append(peer)
        step = self.script[min(len(self.requests), len(self.script)) - 1]
        if self.delay:
            self.stopping.wait(self.delay)
        return step if model == "mtgr" else Refusal("NOT_FOUND", f"Request for unknown model: '{model}'")


class GrpcService(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, door: Door) -> None:
        self.door = door

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=self.door.ready and request.name == "mtgr")

    def ModelInfer(self, request: Any, context: Any) -> Any:
        inputs = {
            tensor.name: Tensor(tensor.datatype, tuple(tensor.shape), unpack(tensor.datatype, raw))
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        self.door.headers.append(dict(context.invocation_metadata()))
        step = self.door.play(request.model_name, inputs, context.peer())
        assert not isinstance(step, Raw)
        if isinstance(step, Refusal):
            context.abort(grpc.StatusCode[step.code], step.message)
            raise AssertionError("abort raises")
        response = service_pb2.ModelInferResponse(model_name="mtgr", model_version="1")
        for name, tensor in step.items():
            response.outputs.add(name=name, datatype=tensor.datatype, shape=tensor.shape)
            response.raw_output_contents.append(pack(tensor))
        return response


class HttpHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    door: Door

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        ready = self.door.ready and self.path == "/v2/models/mtgr/ready"
        self.reply(200 if ready else 400, b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.door.headers.append(dict(self.headers.items()))
        if encoding := self.headers["Content-Encoding"]:
            body = gzip.decompress(body) if encoding == "gzip" else zlib.decompress(body)
        split = int(self.headers["Inference-Header-Content-Length"])
        inputs, offset = {}, split
        for tensor in json.loads(body[:split])["inputs"]:
            size = tensor["parameters"]["binary_data_size"]
            raw = body[offset : offset + size]
            offset += size
            datatype = tensor["datatype"]
            inputs[tensor["name"]] = Tensor(datatype, tuple(tensor["shape"]), unpack(datatype, raw))
        step = self.door.play(self.path.split("/")[3], inputs, str(self.client_address))
        if isinstance(step, Raw):
            self.reply(step.status, step.body, length=step.length)
        elif isinstance(step, Refusal):
            self.reply(HTTP_STATUS[step.code], json.dumps({"error": step.message}).encode())
        else:
            raws = {name: pack(tensor) for name, tensor in step.items()}
            outputs = [
                {
                    "name": name,
                    "datatype": tensor.datatype,
                    "shape": tensor.shape,
                    "parameters": {"binary_data_size": len(raws[name])},
                }
                for name, tensor in step.items()
            ]
            head = json.dumps({"model_name": "mtgr", "outputs": outputs}).encode()
            body = head + b"".join(raws.values())
            extra = {"Inference-Header-Content-Length": str(len(head))}
            encoding = self.headers["Accept-Encoding"]
            if encoding in ("gzip", "deflate"):  # aiohttp by itself sends a list of what it accepts
                body = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
                extra["Content-Encoding"] = encoding
            self.reply(200, body, extra)

    def reply(self, status: int, body: bytes, extra: dict[str, str] | None = None, length: int | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in (extra or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client's deadline passed
        if length is not None:
            self.close_connection = True


class WebServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # the default of 5 makes simultaneous connections wait a second


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Servers:
    """Starts servers on loopback and stops them all at the end."""

    def __init__(self) -> None:
        self.doors: list[Door] = []
        self.stops: list[Callable[[], object]] = []

    def start(self, protocol: str, door: Door, port: int = 0) -> str:
        self.doors.append(door)
        if protocol == "grpc":
            server = grpc.server(ThreadPoolExecutor(8))
            service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(GrpcService(door), server)
            port = server.add_insecure_port(f"127.0.0.1:{port}")
            server.start()
            self.stops.append(lambda: server.stop(None).wait(5))
        else:
            handler = type("Handler", (HttpHandler,), {"door": door})
            web = WebServer(("127.0.0.1", port), handler)
            port = web.server_port
            threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
            self.stops += [web.shutdown, web.server_close]
        return f"127.0.0.1:{port}"

    def stop(self) -> None:
        for door in self.doors:
            door.stopping.set()
        for stop in self.stops:
            stop()


@pytest.fixture
def servers() -> Iterator[Servers]:
    running = Servers()
    yield running
    running.stop()


Call = tuple[str, tuple[Any, ...], dict[str, Any]] | Callable[[], None]


class Way:
    """One of the four transports."""

    def __init__(self, protocol: str, mode: str) -> None:
        self.protocol, self.mode = protocol, mode

    def use(self, url: str, *calls: Call, **options: Any) -> list[Any]:
        """Make calls (method, args, kwargs) on one client; functions among them just run.

        Returns:
            The calls' results in order; an MTGRError counts as one.
        """
        if self.mode == "sync":
            results: list[Any] = []
            with MTGRClient(url, protocol=self.protocol, **options) as client:  # type: ignore[arg-type]
                for call in calls:
                    if callable(call):
                        call()
                        continue
                    method, args, kwargs = call
                    try:
                        results.append(getattr(client, method)(*args, **kwargs))
                    except MTGRError as error:
                        results.append(error)
            return results

        async def main() -> list[Any]:
            results: list[Any] = []
            async with AsyncMTGRClient(url, protocol=self.protocol, **options) as client:  # type: ignore[arg-type]
                for call in calls:
                    if callable(call):
                        call()
                        continue
                    method, args, kwargs = call
                    try:
                        results.append(await getattr(client, method)(*args, **kwargs))
                    except MTGRError as error:
                        results.append(error)
            return results

        return asyncio.run(main())

    def recommend(self, url: str, **options: Any) -> Recommendation:
        """One call, which raises what the client raises."""
        (result,) = self.use(url, ("recommend", ("196",), {}), **options)
        if isinstance(result, MTGRError):
            raise result
        assert isinstance(result, Recommendation)
        return result


@pytest.fixture(params=["grpc-sync", "grpc-async", "http-sync", "http-async"])
def way(request: pytest.FixtureRequest) -> Way:
    return Way(*request.param.split("-"))


def test_every_optional_input_reaches_the_server_in_its_type(way: Way, servers: Servers) -> None:
    door = Door()
    request = RecommendationRequest(
        user_id="zoë",
        history=History([1, 2**40], np.array([4, 0], np.int64), (880_000_000, 880_000_001)),
        candidates=np.array([7, 8, 9], np.uint16),
        request_time=893_286_638,
        profile={"occupation": "écrivain", "age": 49},
        strategy="tensorrt",
        top_k=2,
    )
    way.use(servers.start(way.protocol, door), ("infer", (request,), {}))
    (sent,) = door.requests
    profile = sent.pop("profile")
    assert (profile.datatype, profile.shape) == ("BYTES", (1, 1))
    assert json.loads(profile.values[0]) == {"age": 49, "occupation": "écrivain"}
    assert sent == {
        "user_id": Tensor("BYTES", (1, 1), ["zoë".encode()]),
        "history_items": Tensor("INT64", (1, 2), [1, 2**40]),
        "history_actions": Tensor("INT32", (1, 2), [4, 0]),
        "history_times": Tensor("INT64", (1, 2), [880_000_000, 880_000_001]),
        "candidates": Tensor("INT64", (1, 3), [7, 8, 9]),
        "request_time": Tensor("INT64", (1, 1), [893_286_638]),
        "strategy": Tensor("BYTES", (1, 1), [b"tensorrt"]),
        "top_k": Tensor("INT32", (1, 1), [2]),
    }


def test_a_user_is_known_to_the_gateway_by_one_header_that_does_not_name_them(way: Way, servers: Servers) -> None:
    door = Door()
    calls = [("recommend", (user,), {}) for user in ("zoë", "zoë", "adam")]
    way.use(servers.start(way.protocol, door), *calls)
    first, second, other = (
        {name.lower(): value for name, value in headers.items()}[AFFINITY_HEADER] for headers in door.headers
    )
    assert first == second != other
    # The same in every release: a gateway's ring must not turn when clients are updated.
    assert first == "5233365385ab6de2"
    assert not [value for headers in door.headers for value in headers.values() if "zo" in value]


def test_what_is_none_is_not_sent(way: Way, servers: Servers) -> None:
    door = Door()
    way.use(
        servers.start(way.protocol, door),
        ("infer", (RecommendationRequest("1"),), {}),
        ("rank", ("1", []), {}),
        ("recommend", ("1",), {"strategy": "vllm"}),
    )
    assert [set(sent) for sent in door.requests] == [
        {"user_id"},
        {"user_id", "candidates"},
        {"user_id", "top_k", "strategy"},
    ]
    assert door.requests[1]["candidates"] == Tensor("INT64", (1, 0), [])
    assert door.requests[2]["top_k"].values == [10]


def test_answers_lose_the_leading_dimension_and_are_read_only(way: Way, servers: Servers) -> None:
    url = servers.start(way.protocol, Door([answer([50, 2**40, 1], arm="größer"), answer([])]))
    full, empty = way.use(url, ("recommend", ("196",), {}), ("recommend", ("196",), {}))
    assert full.items.tolist() == [50, 2**40, 1]
    assert full.items.dtype == np.int64
    np.testing.assert_array_equal(full.scores, np.array([1, 1 / 2, 1 / 3], np.float32))
    assert full.scores.dtype == full.task_scores.dtype == np.float32
    assert full.task_scores.tolist() == [[0, 1 / 64, 2 / 64], [3 / 64, 4 / 64, 5 / 64], [6 / 64, 7 / 64, 8 / 64]]
    assert (full.strategy, full.arm, len(full)) == ("onnx", "größer", 3)
    assert 0 < full.latency_ms < 10_000
    for array in (full.items, full.scores, full.task_scores):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert len(empty) == 0
    assert empty.task_scores.shape == (0, 3)


def test_labels_are_a_tuple_and_may_be_missing(way: Way, servers: Servers) -> None:
    texts = [b"", b"cold_start", b"fallback,fewer_than_top_k"]
    steps = [answer([1]) | {"labels": Tensor("BYTES", (1, 1), [text])} for text in texts]
    url = servers.start(way.protocol, Door([answer([1]), *steps]))
    results = way.use(url, *[("recommend", ("196",), {})] * 4)
    expected = [(), (), ("cold_start",), ("fallback", "fewer_than_top_k")]
    assert [result.labels for result in results] == expected


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_http_answers_in_json_are_decoded_alike(servers: Servers, mode: str) -> None:
    outputs = [
        {"name": name, "datatype": kind, "shape": shape, "data": data}
        for name, kind, shape, data in (
            ("items", "INT64", [1, 2], [2**40, 7]),
            ("scores", "FP32", [1, 2], [0.5, 0.25]),
            ("task_scores", "FP32", [1, 2, 1], [0.75, 0.125]),
            (STRATEGY_OUTPUT, "BYTES", [1, 1], ["vllm"]),
            ("arm", "BYTES", [1, 1], ["größer"]),
        )
    ]
    url = servers.start("http", Door([Raw(200, json.dumps({"outputs": outputs}).encode())]))
    result = Way("http", mode).recommend(url)
    assert (result.items.tolist(), result.scores.tolist()) == ([2**40, 7], [0.5, 0.25])
    assert result.task_scores.tolist() == [[0.75], [0.125]]
    assert (result.strategy, result.arm) == ("vllm", "größer")
    assert not any(array.flags.writeable for array in (result.items, result.scores, result.task_scores))


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compression_both_ways(way: Way, servers: Servers, compression: str) -> None:
    door = Door()
    result = way.recommend(servers.start(way.protocol, door), compression=compression)
    assert result.items.tolist() == [50, 2**40, 1]
    assert door.requests[0]["user_id"].values == [b"196"]
    if way.protocol == "http":
        assert door.headers[0]["Content-Encoding"] == door.headers[0]["Accept-Encoding"] == compression


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"user_id": 196}, "user_id is 196"),
        ({"user_id": "\ud800"}, "UTF-8"),
        ({"candidates": [1, 2.5]}, "candidates holds float64"),
        ({"candidates": np.array([1.0])}, "candidates holds float64"),
        ({"candidates": ["1"]}, "candidates holds str"),
        ({"candidates": [True]}, "candidates holds bool"),
        ({"candidates": [[1, 2]]}, "candidates has 2 dimensions"),
        ({"candidates": [[1], [1, 2]]}, "candidates is not a flat list"),
        ({"candidates": [1, None]}, "candidates holds object"),
        ({"candidates": [2**63]}, "candidates has an integer that does not fit INT64"),
        ({"candidates": [2**70]}, "candidates has an integer that does not fit INT64"),
        ({"candidates": np.array([2**64 - 1], np.uint64)}, "does not fit INT64"),
        ({"history": History([1], [2**31], [3])}, "history_actions has an integer that does not fit INT32"),
        ({"request_time": 1.5}, "request_time holds float64"),
        ({"top_k": [1]}, "top_k is \\[1\\]"),
        ({"top_k": -(2**31) - 1}, "top_k has an integer that does not fit INT32"),
        ({"strategy": 3}, "strategy is 3"),
        ({"profile": {"a": float("nan")}}, "profile has no JSON form"),
        ({"profile": {"a": {1, 2}}}, "profile has no JSON form"),
        ({"profile": [1]}, "profile is \\[1\\]"),
    ],
)
def test_values_without_an_encoding_are_refused_before_they_are_sent(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        encode(RecommendationRequest(**({"user_id": "1"} | values)))


def test_what_can_be_encoded_is_left_to_the_server() -> None:
    request = RecommendationRequest("", History([1, 2], [-1], []), candidates=[-5], strategy="nonsense", top_k=-1)
    tensors = {tensor.name: tensor.data.tolist() for tensor in encode(request)}
    assert tensors == {
        "user_id": [[b""]],
        "history_items": [[1, 2]],
        "history_actions": [[-1]],
        "history_times": [[]],
        "candidates": [[-5]],
        "strategy": [[b"nonsense"]],
        "top_k": [[-1]],
    }


@pytest.mark.parametrize(
    ("code", "kind", "tries"),
    [
        ("INVALID_ARGUMENT", InvalidRequestError, 1),
        ("UNAVAILABLE", UnavailableError, 3),
        ("INTERNAL", ServerError, 1),
        ("NOT_FOUND", ServerError, 1),
    ],
)
def test_server_errors_keep_their_sentence_and_only_unavailable_is_retried(
    way: Way, servers: Servers, code: str, kind: type[MTGRError], tries: int
) -> None:
    door = Door([Refusal(code, "in ensemble 'mtgr', top_k is -1; it must be 1 to 100.")])
    with pytest.raises(MTGRError) as caught:
        way.recommend(servers.start(way.protocol, door))
    assert type(caught.value) is kind
    assert str(caught.value) == "top_k is -1; it must be 1 to 100."
    assert len(door.requests) == tries


def test_a_model_that_is_not_there_is_a_server_error(way: Way, servers: Servers) -> None:
    with pytest.raises(ServerError, match="unknown model: 'other'"):
        way.recommend(servers.start(way.protocol, Door()), model="other")


@pytest.mark.parametrize(
    "message",
    [
        "in ensemble 'mtgr', [request id: <id_unknown>] user_id is missing; send it.",
        "[request id: 7] in ensemble 'mtgr', user_id is missing; send it.",
        "in ensemble 'mtgr', Failed to process the request(s) for model instance 'mtgr_features_0', "
        "message: TritonModelException: user_id is missing; send it.",
        "in ensemble 'mtgr', in ensemble 'inner', Failed to process the request(s) for model 'x', message: "
        "user_id is missing; send it.\n",
        "in ensemble 'mtgr', Failed to process the request(s) for model 'mtgr_router_0_0', message: "
        "user_id is missing;\n send it.\n\nAt:\n  model.py(10): execute\n",
        "user_id is missing; send it.",
    ],
)
def test_triton_prefixes_are_stripped(message: str) -> None:
    assert sentence(message) == "user_id is missing; send it."


def test_prefixes_are_stripped_only_in_front() -> None:
    text = "user_id is \"in ensemble 'mtgr', x\"; send another."
    assert sentence(text) == text


def test_retries_until_the_server_can_serve(way: Way, servers: Servers) -> None:
    door = Door([Refusal("UNAVAILABLE", "busy")] * 2 + [answer([3])])
    assert way.recommend(servers.start(way.protocol, door), retries=2).items.tolist() == [3]
    assert len(door.requests) == 3


def test_a_model_that_is_being_reloaded_is_retried(way: Way, servers: Servers) -> None:
    unloaded = Refusal("NOT_FOUND", "Request for unknown model: 'mtgr' has no available versions")
    door = Door([unloaded, answer([3])])
    assert way.recommend(servers.start(way.protocol, door)).items.tolist() == [3]


def test_no_retry_when_none_is_allowed(way: Way, servers: Servers) -> None:
    door = Door([Refusal("UNAVAILABLE", "busy"), answer([3])])
    with pytest.raises(UnavailableError, match="busy"):
        way.recommend(servers.start(way.protocol, door), retries=0)
    assert len(door.requests) == 1


def test_a_refused_connection_says_what_to_do(way: Way) -> None:
    url = f"127.0.0.1:{free_port()}"
    with pytest.raises(UnavailableError, match=f"no connection to {url} .*mtgr.serving") as caught:
        way.recommend(url, retries=1)
    assert "\n" not in str(caught.value)
    assert way.use(url, ("is_ready", (), {}), timeout=2.0) == [False]


class LongWaits(random.Random):
    """Draws the upper bound, so that the waits of a test do not depend on luck."""

    def uniform(self, a: float, b: float) -> float:
        return b


def test_a_retry_reaches_a_server_that_comes_back(way: Way, servers: Servers) -> None:
    port = free_port()
    late = threading.Timer(0.15, lambda: servers.start(way.protocol, Door(), port))
    late.start()
    # Tries at 0, 0.05, 0.15, 0.35 and 0.75 s: all within the first second, a gRPC channel's default backoff.
    result = way.recommend(f"127.0.0.1:{port}", retries=4, rng=LongWaits())
    late.join()
    assert len(result) == 3


def test_silence_becomes_a_timeout_and_the_client_stays_usable(way: Way, servers: Servers) -> None:
    door = Door(delay=30.0)
    url = servers.start(way.protocol, door)
    threading.Timer(0.45, lambda: setattr(door, "delay", 0.0)).start()
    started = time.monotonic()
    first, second, third = way.use(url, *[("recommend", ("196",), {})] * 3, timeout=0.3)
    assert time.monotonic() - started < 2.0
    assert [type(first), type(second)] == [RequestTimeoutError] * 2
    assert f"no answer came from {url} within 0.3 s" in str(first)
    assert third.items.tolist() == [50, 2**40, 1]
    assert len(door.requests) == 3  # a timeout is not retried


def test_a_request_cut_short_while_sending_leaves_the_client_usable(way: Way, servers: Servers) -> None:
    large = np.zeros(2_000_000, np.int64)  # 16 MB, more than the sockets hold
    deaf = socket.create_server(("127.0.0.1", 0))
    port = deaf.getsockname()[1]

    def replace_server() -> None:
        deaf.close()
        servers.start(way.protocol, Door(), port)

    calls: list[Call] = [("rank", ("196", large), {}), replace_server, ("recommend", ("196",), {})]
    late, recovered = way.use(f"127.0.0.1:{port}", *calls, timeout=0.5, retries=20)
    assert type(late) is RequestTimeoutError
    assert recovered.items.tolist() == [50, 2**40, 1]


def test_one_deadline_holds_for_all_tries(way: Way, servers: Servers) -> None:
    door = Door([Refusal("UNAVAILABLE", "busy")], delay=0.12)
    started = time.monotonic()
    with pytest.raises((UnavailableError, RequestTimeoutError)):
        way.recommend(servers.start(way.protocol, door), timeout=0.5, retries=1000)
    assert time.monotonic() - started < 0.9
    assert 2 <= len(door.requests) <= 5


def test_one_connection_is_kept(way: Way, servers: Servers) -> None:
    door = Door([answer([1]), Refusal("INVALID_ARGUMENT", "no"), answer([2])])
    way.use(servers.start(way.protocol, door), *[("recommend", ("196",), {})] * 3)
    assert len(door.peers) == 3
    assert len(set(door.peers)) == 1


def test_readiness_is_the_models(way: Way, servers: Servers) -> None:
    url = servers.start(way.protocol, Door())
    assert way.use(url, ("is_ready", (), {})) == [True]
    assert way.use(url, ("is_ready", (), {}), model="other") == [False]
    assert way.use(servers.start(way.protocol, Door(ready=False)), ("is_ready", (), {})) == [False]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("scores", None),
        ("items", Tensor("INT32", (1, 3), [1, 2, 3])),
        ("items", Tensor("INT64", (3,), [1, 2, 3])),
        ("items", Tensor("INT64", (1, 2), [1, 2])),
        ("task_scores", Tensor("FP32", (1, 3), [0.1, 0.2, 0.3])),
        ("arm", Tensor("BYTES", (1, 2), [b"a", b"b"])),
    ],
)
def test_an_answer_of_another_shape_is_a_server_error(
    way: Way, servers: Servers, name: str, tensor: Tensor | None
) -> None:
    outputs = answer([1, 2, 3])
    outputs.pop(name)
    if tensor is not None:
        outputs[name] = tensor
    with pytest.raises(ServerError, match=name.replace("items", "items|scores")):
        way.recommend(servers.start(way.protocol, Door([outputs])))


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (Raw(200, b"<html>hello</html>"), ServerError),
        (Raw(200, b"{}"), ServerError),
        (Raw(200, b"{", length=100), ServerError),
        (Raw(400, b"<html>no</html>"), ServerError),
        (Raw(500, b""), ServerError),
        (Raw(502, b"<html>bad gateway</html>"), UnavailableError),
        (Raw(503, b""), UnavailableError),
        (Raw(504, b"<html>late</html>"), RequestTimeoutError),
    ],
)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_http_answers_that_are_not_tritons(servers: Servers, mode: str, step: Raw, kind: type[MTGRError]) -> None:
    with pytest.raises(MTGRError) as caught:
        Way("http", mode).recommend(servers.start("http", Door([step])), retries=0)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_connection_that_drops_before_the_answer_is_retried(servers: Servers, mode: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted = []

        def drop() -> None:
            for _ in range(3):
                connection, peer = listener.accept()
                connection.recv(65536)
                accepted.append(peer)
                connection.close()

        thread = threading.Thread(target=drop, daemon=True)
        thread.start()
        with pytest.raises(UnavailableError, match="no connection"):
            Way("http", mode).recommend(f"127.0.0.1:{listener.getsockname()[1]}", retries=2)
        thread.join(5)
    assert len(accepted) == 3


def test_full_jitter_stays_within_doubling_bounds() -> None:
    policy = RetryPolicy(retries=9, timeout=1.0, rng=random.Random(3))
    for attempt, bound in enumerate([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]):
        draws = [policy.delay(attempt) for _ in range(400)]
        assert min(draws) >= 0
        assert max(draws) <= bound
        assert min(draws) < 0.05 * bound  # full jitter: down to zero, not around the bound
        assert max(draws) > 0.95 * bound
    again = RetryPolicy(retries=9, timeout=1.0, rng=random.Random(3))
    assert again.delay(0) == RetryPolicy(9, 1.0, random.Random(3)).delay(0)
    assert 0 <= policy.delay(10_000) <= 1.0


def test_attempts_end_with_the_tries_or_the_time() -> None:
    now = [100.0]
    busy = UnavailableError("busy")
    attempts = Attempts(RetryPolicy(2, 1.0, LongWaits()), clock=lambda: now[0])
    assert attempts.remaining() == pytest.approx(1.0)
    assert attempts.backoff(busy) == 0.05
    now[0] += 0.6
    assert attempts.remaining() == pytest.approx(0.4)
    assert attempts.backoff(busy) == 0.1
    with pytest.raises(UnavailableError, match="busy"):
        attempts.backoff(busy)
    now[0] += 0.4
    with pytest.raises(RequestTimeoutError, match="within 1 s"):
        attempts.remaining()
    short = Attempts(RetryPolicy(9, 0.04, LongWaits()), clock=lambda: now[0])
    with pytest.raises(UnavailableError, match="busy"):  # the wait would outlast the deadline
        short.backoff(busy)


def test_threads_share_a_grpc_client(servers: Servers) -> None:
    door = Door(delay=0.1)
    with MTGRClient(servers.start("grpc", door)) as client, ThreadPoolExecutor(8) as pool:
        started = time.monotonic()
        results = list(pool.map(client.recommend, [str(user) for user in range(8)]))
        assert time.monotonic() - started < 0.6
    assert all(len(result) == 3 for result in results)
    assert sorted(sent["user_id"].values[0] for sent in door.requests) == [b"%d" % user for user in range(8)]


def test_another_threads_use_of_an_http_client_is_refused(servers: Servers) -> None:
    with (
        MTGRClient(servers.start("http", Door()), protocol="http") as client,
        ThreadPoolExecutor(1) as pool,
    ):
        assert len(client.recommend("1")) == 3
        with pytest.raises(ConfigurationError, match="one per thread"):
            pool.submit(client.recommend, "1").result()
        with pytest.raises(ConfigurationError, match="one per thread"):
            pool.submit(client.is_ready).result()
        assert len(client.recommend("1")) == 3


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_async_calls_wait_together_and_can_be_cancelled(servers: Servers, protocol: Any) -> None:
    door = Door(delay=0.15)
    url = servers.start(protocol, door)

    async def main() -> None:
        async with AsyncMTGRClient(url, protocol=protocol) as client:
            started = time.monotonic()
            results = await asyncio.gather(*(client.recommend(str(user)) for user in range(8)))
            assert time.monotonic() - started < 0.9
            assert all(len(result) == 3 for result in results)
            door.delay = 30.0
            task = asyncio.create_task(client.recommend("1"))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())


def test_a_closed_client_says_so(way: Way) -> None:
    results = way.use("127.0.0.1:1", ("close", (), {}), ("recommend", ("1",), {}), ("is_ready", (), {}))
    assert [type(result) for result in results[1:]] == [ConfigurationError] * 2
    assert "closed" in str(results[1])


@pytest.mark.parametrize("client", [MTGRClient, AsyncMTGRClient])
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"protocol": "ftp"}, "protocol is 'ftp'"),
        ({"url": "http://127.0.0.1:8000"}, "without a scheme"),
        ({"url": ""}, "host:port"),
        ({"timeout": 0.0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"compression": "br"}, "compression"),
    ],
)
def test_settings_are_checked(client: Any, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        client(**options)


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "clients")
    for cached in ("_show", name):
        sys.modules.pop(cached, None)
    return importlib.import_module(name)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_example_recommend_prints_a_table(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    door = Door()
    arguments = ["--user", "196", "--top-k", "3", "--strategy", "onnx", "--time", "893286638", "--no-titles"]
    url = servers.start(protocol, door)
    code = example("recommend", monkeypatch).main([*arguments, "--url", url, "--protocol", protocol])
    out = capsys.readouterr().out.splitlines()
    assert code == 0
    assert out[0].split() == ["rank", "item", "score", "engagement", "retention", "monetization"]
    assert out[3].split() == ["2", str(2**40), "0.5000", "0.0469", "0.0625", "0.0781"]
    assert len({len(line) for line in out[:5]}) == 1
    assert out[-1].startswith("3 items, strategy onnx, arm control, ")
    sent = {name: tensor.values for name, tensor in door.requests[0].items()}
    assert sent == {"user_id": [b"196"], "strategy": [b"onnx"], "top_k": [3], "request_time": [893286638]}


def test_example_table_shows_titles(monkeypatch: pytest.MonkeyPatch) -> None:
    show = example("_show", monkeypatch)
    catalogue = {
        1: Item(1, "Toy Story", ("Animation", "Comedy"), 1995),
        2: Item(2, "The Incredible Adventures of a Title That Is Too Long to Show", (), None),
    }
    answer_ = Recommendation(
        np.array([2, 1, 9]), np.zeros(3, np.float32), np.zeros((3, 3), np.float32), "vllm", "", 1.25, ("a", "b")
    )
    lines = show.render(answer_, catalogue).splitlines()
    assert "title" in lines[0]
    assert "genres" in lines[0]
    assert "Toy Story" in lines[3]
    assert "1995  Animation, Comedy" in lines[3]
    assert "The Incredible" in lines[2]
    assert "Show" not in lines[2]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[-1] == "3 items, strategy vllm, arm -, 1.2 ms (a, b)"


def test_examples_end_with_code_2_and_one_sentence(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = Refusal("INVALID_ARGUMENT", "in ensemble 'mtgr', candidates has item 0; ids start at 1.")
    door = Door([refusal])
    rank = example("rank", monkeypatch)
    arguments = ["--user", "196", "--candidates", "1, 2,50"]
    code = rank.main([*arguments, "--url", servers.start("grpc", door)])
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err == "error: candidates has item 0; ids start at 1.\n"
    assert door.requests[0]["candidates"] == Tensor("INT64", (1, 3), [1, 2, 50])
    with pytest.raises(SystemExit) as left:
        rank.main(["--user", "196", "--candidates", "1,x"])
    assert left.value.code == 2
