"""The client against real servers on loopback: gRPC with Triton's own service, HTTP written from its protocol."""

from __future__ import annotations

import asyncio
import importlib
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mtgr.client import AsyncMTGRClient, History, MTGRClient, Recommendation, RecommendationRequest
from mtgr.client.wire import AFFINITY_HEADER
from mtgr.data.dataset import Item
from mtgr.errors import (
    ConfigurationError,
    InvalidRequestError,
    MTGRError,
    RequestTimeoutError,
    ServerError,
    UnavailableError,
)
from mtgr.serving.ports import free_ports
from tests.unit.door import (
    STRATEGY_OUTPUT,
    Call,
    Door,
    LongWaits,
    Raw,
    Refusal,
    Servers,
    Tensor,
    Way,
    answer,
)


@pytest.fixture
def servers() -> Iterator[Servers]:
    running = Servers()
    yield running
    running.stop()


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
    (port,) = free_ports("127.0.0.1", 1)
    url = f"127.0.0.1:{port}"
    with pytest.raises(UnavailableError, match=f"no connection to {url} .*mtgr.serving") as caught:
        way.recommend(url, retries=1)
    assert "\n" not in str(caught.value)
    assert way.use(url, ("is_ready", (), {}), timeout=2.0) == [False]


def test_a_retry_reaches_a_server_that_comes_back(way: Way, servers: Servers) -> None:
    (port,) = free_ports("127.0.0.1", 1)
    late = threading.Timer(0.15, lambda: servers.start(way.protocol, Door(), port))
    late.start()
    # Tries at 0, 0.05, 0.15, 0.35 and 0.75 s: all within the first second, a gRPC channel's default backoff.
    result = way.recommend(f"127.0.0.1:{port}", retries=4, rng=LongWaits())
    late.join()
    assert len(result) == 3


def test_silence_becomes_a_timeout_and_the_client_stays_usable(way: Way, servers: Servers) -> None:
    door = Door(delay=30.0, delayed=2)
    url = servers.start(way.protocol, door)
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
    late, recovered = way.use(f"127.0.0.1:{port}", *calls, timeout=2.0, retries=20)
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
