"""Servers on loopback that answer as a door's: gRPC with Triton's own service, HTTP written from its protocol."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import json
import random
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from mtgr.client import AsyncMTGRClient, MTGRClient, Recommendation
from mtgr.errors import MTGRError

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
    delayed: int = 1_000_000  # so many requests, the first ones
    ready: bool = True
    requests: list[dict[str, Tensor]] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def play(self, model: str, inputs: dict[str, Tensor], peer: str) -> dict[str, Tensor] | Refusal | Raw:
        self.requests.append(inputs)
        self.peers.append(peer)
        step = self.script[min(len(self.requests), len(self.script)) - 1]
        if self.delay and len(self.requests) <= self.delayed:
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


class LongWaits(random.Random):
    """Draws the upper bound, so that the waits of a test do not depend on luck."""

    def uniform(self, a: float, b: float) -> float:
        return b
