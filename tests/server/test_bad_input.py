"""Bad and odd requests through a real server: each is refused with a sentence or served by a documented rule.

Nothing a request says may touch its neighbours in a batch or the server itself.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from mtgr.bundle import load_bundle
from mtgr.client import AsyncMTGRClient, MTGRClient, Recommendation
from mtgr.client.failures import translated
from mtgr.client.settings import Settings
from mtgr.client.wire import decode
from mtgr.errors import InvalidRequestError
from mtgr.serving.server import TritonServer
from tests.server.test_door import REQUEST_TIME, assert_same, mixed_requests

Request = dict[str, npt.NDArray[Any]]

DAY = 86_400
NOW = int(time.time())
# Growth of the server's shared memory that a burst of bad requests may cause: buffers of requests in flight.
SHARED_MEMORY_BOUND = 64 << 20


def text(*values: bytes) -> npt.NDArray[np.object_]:
    return np.array([list(values)], dtype=np.object_)


def int64(*values: int) -> npt.NDArray[np.int64]:
    return np.array([list(values)], dtype=np.int64)


def int32(*values: int) -> npt.NDArray[np.int32]:
    return np.array([list(values)], dtype=np.int32)


def request(**changes: npt.NDArray[Any] | None) -> Request:
    """A good request with some tensors replaced; None leaves a tensor out."""
    good: dict[str, npt.NDArray[Any] | None] = {
        "user_id": text(b"196"),
        "candidates": int64(1, 2, 3),
        "request_time": int64(REQUEST_TIME),
    }
    return {name: array for name, array in (good | changes).items() if array is not None}


def history(items: list[int], actions: list[int], times: list[int]) -> Request:
    return {"history_items": int64(*items), "history_actions": int32(*actions), "history_times": int64(*times)}


def long_history(events: int) -> Request:
    return history([1] * events, [1] * events, [REQUEST_TIME - events + index for index in range(events)])


def profile(value: bytes) -> Request:
    return request(profile=text(value))


@dataclass(frozen=True)
class Refused:
    """A request that must be refused, and what the sentence must contain: the tensor and what is allowed."""

    name: str
    request: Request
    words: tuple[str, ...]


T = REQUEST_TIME
REFUSED = (
    # user_id
    Refused("user_id missing", request(user_id=None), ("user_id is missing",)),
    Refused("user_id empty", request(user_id=text(b"")), ("user_id has 0 bytes", "1 to 256")),
    Refused("user_id too long", request(user_id=text(b"u" * 257)), ("user_id has 257 bytes", "1 to 256")),
    Refused("user_id long in bytes", request(user_id=text("ü".encode() * 129)), ("user_id has 258 bytes", "1 to 256")),
    Refused("user_id with NUL", request(user_id=text(b"a\0b")), ("user_id contains a NUL",)),
    Refused("user_id not UTF-8", request(user_id=text(b"\xff\xfe")), ("user_id", "UTF-8")),
    Refused("user_id twice", request(user_id=text(b"1", b"2")), ("'user_id'", "[-1,1]", "[1,2]")),
    Refused("user_id a number", request(user_id=int64(196)), ("'user_id'", "'BYTES'")),
    # candidates
    Refused("candidates negative", request(candidates=int64(1, -5)), ("candidates", "-5 at index 1", "at least 0")),
    Refused("candidates empty", request(candidates=int64()), ("candidates is empty", "at least one")),
    Refused("candidates 16,385", request(candidates=np.arange(16_385)[None]), ("candidates", "16385", "16384")),
    Refused("candidates 10^6", request(candidates=np.arange(10**6)[None]), ("candidates", "1000000", "16384")),
    Refused(
        "candidates 16,385 of one item",
        request(candidates=np.ones((1, 16_385), dtype=np.int64)),
        ("candidates", "16385", "16384"),
    ),
    Refused("candidates FP32", request(candidates=np.ones((1, 3), np.float32)), ("'candidates'", "FP32", "INT64")),
    Refused("candidates INT32", request(candidates=int32(1, 2)), ("'candidates'", "INT32", "INT64")),
    Refused("candidates text", request(candidates=text(b"1")), ("'candidates'", "BYTES", "INT64")),
    Refused("candidates of rank 3", request(candidates=int64(1, 2)[..., None]), ("'candidates'", "[-1,-1]", "[1,2,1]")),
    Refused("candidates of rank 1", request(candidates=int64(1, 2)[0]), ("batch size does not match",)),
    # leading dimension
    Refused("two users", {k: np.repeat(v, 2, axis=0) for k, v in request().items()}, ("user_id", "[2, 1]", "[1, n]")),
    Refused("more users than a batch", {k: np.repeat(v, 65, axis=0) for k, v in request().items()}, ("<= 64",)),
    Refused("one tensor of two rows", request(candidates=np.ones((2, 3), np.int64)), ("batch size does not match",)),
    # history
    Refused("history items alone", request(history_items=int64(1)), ("history_actions is missing", "together")),
    Refused(
        "history without items",
        request(history_actions=int32(1), history_times=int64(T)),
        ("history_items is missing", "together"),
    ),
    Refused(
        "history without times", request(**history([1], [1], [T]) | {"history_times": None}), ("history_times is",)
    ),
    Refused("history lengths", request(**history([1, 2], [1], [T])), ("history_items", "2, 1, 1", "equal")),
    Refused("history lengths, one empty", request(**history([], [1], [T])), ("history_items", "0, 1, 1", "equal")),
    Refused(
        "history item negative", request(**history([-1], [1], [T])), ("history_items", "-1 at index 0", "at least")
    ),
    Refused(
        "history action negative",
        request(**history([1], [-7], [T])),
        ("history_actions", "-7 at index 0", "between 0 and"),
    ),
    Refused("history time negative", request(**history([1], [1], [-1])), ("history_times", "-1", "between 0 and")),
    Refused("history of the future", request(**history([1, 2], [1, 1], [T, T + 1])), ("history_times", f"and {T}")),
    Refused("history in milliseconds", request(**history([1], [1], [T * 1000])), ("history_times", f"and {T}")),
    Refused("history too long", request(**long_history(16_385)), ("history_items", "16385", "16384")),
    Refused(
        "history actions INT64",
        request(**history([1], [1], [T]) | {"history_actions": int64(1)}),
        ("'history_actions'", "INT64", "INT32"),
    ),
    # request_time
    Refused("time in milliseconds", request(request_time=int64(T * 1000)), ("request_time", "milliseconds", "seconds")),
    Refused("time negative", request(request_time=int64(-1)), ("request_time is -1", "between 0 and")),
    Refused("time the lowest", request(request_time=int64(-(2**63))), ("request_time is", "between 0 and")),
    Refused("time the highest", request(request_time=int64(2**63 - 1)), ("request_time is", "between 0 and")),
    Refused("time far ahead", request(request_time=int64(NOW + 30 * DAY)), ("request_time", "one day ahead")),
    Refused("time without value", request(request_time=int64()), ("'request_time'", "[-1,1]", "[1,0]")),
    # profile
    Refused("profile NaN", profile(b'{"age": NaN}'), ("profile", "'age'", "finite")),
    Refused("profile Infinity", profile(b'{"age": -Infinity}'), ("profile", "'age'", "finite")),
    Refused("profile beyond floats", profile(b'{"age": 1e999}'), ("profile", "'age'", "finite")),
    Refused("profile of 400 digits", profile(b'{"age": ' + b"1" * 400 + b"}"), ("profile", "'age'", "finite")),
    Refused("profile of 5,000 digits", profile(b'{"age": ' + b"1" * 5000 + b"}"), ("profile", "JSON")),
    Refused("profile malformed", profile(b'{"age": '), ("profile", "valid JSON")),
    Refused("profile empty", profile(b""), ("profile", "valid JSON")),
    Refused("profile array", profile(b"[30]"), ("profile", "not a JSON object")),
    Refused("profile null", profile(b"null"), ("profile", "not a JSON object")),
    Refused("profile deep", profile(b'{"age":' * 2000 + b"1" + b"}" * 2000), ("profile", "JSON")),
    Refused("profile deep arrays", profile(b"[" * 16_000), ("profile", "JSON")),
    Refused("profile huge", profile(b'{"age": "' + b"x" * 20_000 + b'"}'), ("profile", "longer than 16384")),
    Refused("profile unknown field", profile(b'{"shoe": 44}'), ("profile", "'shoe'", "age, gender, occupation")),
    Refused("profile surrogate", profile(b'{"\\ud800": 1}'), ("profile", "unknown field", "age")),
    Refused("profile boolean", profile(b'{"age": true}'), ("profile", "'age'", "text or a finite number")),
    Refused("profile nested", profile(b'{"age": {"years": 3}}'), ("profile", "'age'", "text or a finite number")),
    Refused("profile field null", profile(b'{"age": null}'), ("profile", "'age'", "text or a finite number")),
    Refused("profile not UTF-8", profile(b'{"age": "\xff"}'), ("profile", "UTF-8")),
    # strategy and top_k
    Refused("strategy unknown", request(strategy=text(b"gpt")), ("strategy is 'gpt'", "auto, baseline, onnx")),
    Refused("strategy empty", request(strategy=text(b"")), ("strategy is ''", "auto, baseline, onnx")),
    Refused("strategy in capitals", request(strategy=text(b"ONNX")), ("strategy is 'ONNX'", "onnx")),
    Refused("strategy of other letters", request(strategy=text("größte日本".encode())), ("größte日本", "auto")),
    Refused("strategy not UTF-8", request(strategy=text(b"\xff")), ("strategy", "UTF-8")),
    Refused("strategy long", request(strategy=text(b"x" * 100_000)), ("strategy is", "auto, baseline, onnx")),
    Refused("top_k 0", request(top_k=int32(0)), ("top_k is 0", "between 1 and 16384")),
    Refused("top_k -1", request(top_k=int32(-1)), ("top_k is -1", "between 1 and 16384")),
    Refused("top_k too large", request(top_k=int32(16_385)), ("top_k is 16385", "between 1 and 16384")),
    Refused("top_k twice", request(top_k=int32(1, 2)), ("'top_k'", "[-1,1]", "[1,2]")),
    Refused("top_k INT64", request(top_k=int64(3)), ("'top_k'", "INT64", "INT32")),
    # tensors
    Refused("unknown tensor", request(user_name=text(b"Ann")), ("'user_name'", "unexpected")),
    Refused("tensor of the inside", request(context_rows=int32(1)), ("'context_rows'", "unexpected")),
    Refused("no tensor", {}, ("0 inputs",)),
)


def to_triton(values: Request, infer_input: Callable[..., Any]) -> list[Any]:
    """Inputs as they are: unlike the typed client, with any type and any shape."""
    inputs = []
    for name, array in values.items():
        tensor = infer_input(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def settings(server: TritonServer, protocol: str) -> Settings:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    return Settings.checked(url, protocol, 30.0, 0, None, "mtgr")  # type: ignore[arg-type]


@dataclass
class Door:
    """Sends whatever it is given; errors come as the product's client would raise them."""

    server: TritonServer
    protocol: str
    client: Any = field(init=False)

    def __post_init__(self) -> None:
        if self.protocol == "grpc":
            self.client = tritonclient.grpc.InferenceServerClient(self.server.grpc_url)
        else:
            self.client = tritonclient.http.InferenceServerClient(self.server.http_url, network_timeout=90)

    def send(self, values: Request, seconds: int = 0) -> Recommendation:
        """What comes back within the server's own time limit, or ``seconds`` if given."""
        infer_input = (tritonclient.grpc if self.protocol == "grpc" else tritonclient.http).InferInput
        inputs = to_triton(values, infer_input)
        with translated(settings(self.server, self.protocol)):
            return decode(self.client.infer("mtgr", inputs, timeout=seconds * 1_000_000 or None), 0.0)


@pytest.fixture(params=["grpc", "http"])
def door(server: TritonServer, request: pytest.FixtureRequest) -> Door:
    return Door(server, request.param)


def assert_sentence(message: str) -> None:
    """One line a caller can read: no traceback, no path, no name of a Python exception."""
    assert 10 < len(message) < 700, message
    assert not re.search(r"Traceback|\bAt:|\.py\b|Error:|site-packages|deadlock|\n", message), message


@pytest.mark.parametrize("case", REFUSED, ids=[case.name for case in REFUSED])
def test_refused_with_a_sentence(door: Door, case: Refused) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        door.send(case.request)
    cause = caught.value.__cause__
    assert isinstance(cause, InferenceServerException)
    assert cause.status() == ("StatusCode.INVALID_ARGUMENT" if door.protocol == "grpc" else "400")
    message = str(caught.value)
    assert_sentence(message)
    for word in case.words:
        assert word in message


EVENTS = [(50, 4, T - 9), (181, 0, T - 300), (100, 2, T - 40)]

# Odd requests, and plain ones that must be answered in the very same way.
ALIKE = {
    "duplicates are ranked once": (request(candidates=int64(3, 1, 3, 1, 2)), request()),
    "the order of candidates": (request(candidates=int64(3, 2, 1)), request()),
    "an unsorted history": (
        request(**history(*map(list, zip(*EVENTS, strict=True)))),
        request(**history(*map(list, zip(*sorted(EVENTS, key=lambda event: event[2]), strict=True)))),
    ),
    "unknown actions are one reserved action": (
        request(**history([50, 181], [99, 4], [T - 9, T - 5])),
        request(**history([50, 181], [2**31 - 1, 4], [T - 9, T - 5])),
    ),
    "unknown items of a history are one reserved item": (
        request(**history([10**12, 50], [4, 4], [T - 9, T - 5])),
        request(**history([2**62, 50], [4, 4], [T - 9, T - 5])),
    ),
    "an empty history is that of a new user": (
        request(profile=text(b'{"age": 30, "gender": "F", "occupation": "writer"}'), **history([], [], [])),
        request(user_id=text(b"new"), profile=text(b'{"age": 30, "gender": "F", "occupation": "writer"}')),
    ),
    "numbers may come as text": (profile(b'{"age": "30"}'), profile(b'{"age": 30}')),
    "text where a number belongs is unknown": (profile(b'{"age": "old"}'), profile(b'{"age": "nan"}')),
    "values the schema does not know are unknown": (profile(b'{"gender": 7}'), profile(b'{"gender": "\\ud800"}')),
    "the last of equal profile fields counts": (profile(b'{"age": 9, "age": 30}'), profile(b'{"age": 30}')),
    "an empty profile changes nothing": (profile(b"{}"), request()),
    "more than all candidates": (request(top_k=int32(16_384)), request()),
    "auto is the default": (request(strategy=text(b"auto")), request()),
}


@pytest.mark.parametrize("name", ALIKE)
def test_odd_requests_are_served_by_a_rule(door: Door, name: str) -> None:
    odd, plain = ALIKE[name]
    found, expected = door.send(odd), door.send(plain)
    assert found.items.tolist() == expected.items.tolist()
    assert sorted(found.items.tolist()) == [1, 2, 3]
    # `auto` may take another engine for the second one.
    np.testing.assert_allclose(found.task_scores, expected.task_scores, rtol=0, atol=1e-5)
    assert found.labels == expected.labels


def test_the_rules_are_not_blind(door: Door) -> None:
    """What the rules above call equal must be told apart where it matters."""
    plain = door.send(request())
    for other in (
        request(**history([50, 181], [4, 0], [T - 9, T - 5])),
        request(**history([], [], [])),
        profile(b'{"age": 7}'),
        request(request_time=int64(0)),
    ):
        answer = door.send(other)
        order = np.argsort(answer.items), np.argsort(plain.items)
        assert np.abs(answer.task_scores[order[0]] - plain.task_scores[order[1]]).max() > 1e-5


def test_unknown_items_are_ranked_too(door: Door) -> None:
    answer = door.send(request(candidates=int64(10**12, 1, 2**63 - 1, 999_999)))
    assert sorted(answer.items.tolist()) == [1, 999_999, 10**12, 2**63 - 1]
    unknown = answer.items != 1
    assert len(np.unique(answer.scores[unknown])) == 1
    assert answer.items[unknown].tolist() == [999_999, 10**12, 2**63 - 1]
    alone = door.send(request(candidates=int64(1)))
    np.testing.assert_allclose(answer.task_scores[~unknown], alone.task_scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "values",
    [
        request(**history([], [], [])),
        request(request_time=int64(0)),
        request(user_id=text(b"u" * 256)),
        request(user_id=text("日本 🎬 '; DROP TABLE users".encode())),
    ],
    ids=["empty history", "before the first event", "longest user_id", "odd user_id"],
)
def test_users_without_events_are_labelled(door: Door, values: Request) -> None:
    answer = door.send(values)
    assert "cold_start" in answer.labels
    assert sorted(answer.items.tolist()) == [1, 2, 3]


def test_the_largest_requests_are_served(door: Door) -> None:
    everything = np.arange(16_384)[None]
    # Sixteen engine calls, on a machine that may have other things to do.
    answer = door.send(request(candidates=everything, **long_history(16_384)), seconds=60)
    assert sorted(answer.items.tolist()) == everything[0].tolist()
    assert (np.diff(answer.scores) <= 0).all()
    assert np.isfinite(answer.task_scores).all()
    assert len(door.send(request(candidates=everything, top_k=int32(5)), seconds=60)) == 5


def test_clocks_may_differ_by_less_than_a_day(door: Door) -> None:
    assert len(door.send(request(request_time=int64(NOW + DAY // 2)))) == 3


def test_a_history_without_candidates_is_not_recommended_again(door: Door) -> None:
    answer = door.send(request(candidates=None, top_k=int32(300), **history([50, 181], [4, 4], [T - 9, T - 5])))
    assert len(answer) == 300
    assert not np.isin(answer.items, [50, 181]).any()


MALFORMED_BODIES = {
    "no body": b"",
    "no JSON": b'{"inputs": [',
    "an array": b"[]",
    "no inputs": b"{}",
    "inputs not a list": b'{"inputs": {}}',
}
JSON_TENSORS = {
    "fractions": {"datatype": "INT64", "shape": [1, 1], "data": [1.5]},
    "text for integers": {"datatype": "INT64", "shape": [1, 1], "data": ["1"]},
    "null": {"datatype": "INT64", "shape": [1, 1], "data": [None]},
    "integers beyond INT64": {"datatype": "INT64", "shape": [1, 1], "data": [2**70]},
    "fewer values than the shape": {"datatype": "INT64", "shape": [1, 3], "data": [1, 2]},
    "negative shape": {"datatype": "INT64", "shape": [1, -1], "data": [1]},
    "unknown type": {"datatype": "INT65", "shape": [1, 1], "data": [1]},
}


@pytest.mark.parametrize("name", [*MALFORMED_BODIES, *JSON_TENSORS])
def test_bodies_that_triton_cannot_parse_are_answered_with_an_error(server: TritonServer, name: str) -> None:
    """Triton itself answers these, some of them with status 500; what counts is that it answers and goes on."""
    user = {"name": "user_id", "datatype": "BYTES", "shape": [1, 1], "data": ["196"]}
    body = MALFORMED_BODIES.get(name)
    if body is None:
        body = json.dumps({"inputs": [user, {"name": "candidates", **JSON_TENSORS[name]}]}).encode()
    post = urllib.request.Request(f"http://{server.http_url}/v2/models/mtgr/infer", data=body, method="POST")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(post, timeout=30)
    assert caught.value.code in (400, 500)
    assert_sentence(json.loads(caught.value.read())["error"])


def stubs(server: TritonServer) -> set[int]:
    """Process ids of the server's Python stubs that are alive."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == server.pid and state != "Z":
            found.add(int(path.parent.name))
    return found


def shared_memory(server: TritonServer) -> int:
    """Bytes of the shared memory that the server has mapped."""
    lines = Path(f"/proc/{server.pid}/maps").read_text().splitlines()
    segments = {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line and "(deleted)" not in line}
    return sum(Path(segment).stat().st_size for segment in segments)


async def send_all(server: TritonServer, requests: list[Request], at_once: int) -> list[str]:
    """Sends requests that must fail over one channel; statuses and messages."""
    free = asyncio.Semaphore(at_once)

    async with tritonclient.grpc.aio.InferenceServerClient(server.grpc_url) as client:

        async def send(values: Request) -> str:
            async with free:
                try:
                    await client.infer("mtgr", to_triton(values, tritonclient.grpc.InferInput), client_timeout=60)
                except InferenceServerException as error:
                    return f"{error.status()} {error.message()}"
                return "served"

        return list(await asyncio.gather(*(send(values) for values in requests)))


def test_good_requests_among_bad_ones_are_answered_as_alone(server: TritonServer, model_repository: Path) -> None:
    good = mixed_requests(model_repository, np.random.default_rng(7), "onnx")
    bad = [case.request for case in itertools.islice(itertools.cycle(REFUSED), 32 * 3)]
    with MTGRClient(server.grpc_url) as client:
        alone = [client.infer(values) for values in good]

    async def burst(wrong: list[Request]) -> tuple[list[Recommendation], list[str]]:
        async with AsyncMTGRClient(server.grpc_url, timeout=60, retries=0) as client:
            answers, refusals = await asyncio.gather(
                asyncio.gather(*(client.infer(values) for values in good)),
                send_all(server, wrong, at_once=len(wrong)),
            )
        return list(answers), refusals

    for first in range(0, len(bad), 32):
        answers, refusals = asyncio.run(burst(bad[first : first + 32]))
        for single, answer in zip(alone, answers, strict=True):
            assert_same(single, answer, tolerance=2e-5)
            assert single.labels == answer.labels
        assert len(refusals) == 32
        assert [line for line in refusals if not line.startswith("StatusCode.INVALID_ARGUMENT ")] == []


def test_a_thousand_bad_requests_leave_the_server_as_it_was(server: TritonServer, model_repository: Path) -> None:
    users = load_bundle(model_repository).store().user_ids()[:8]
    # A request of 8 MB is one of a kind: shared memory keeps the size of the largest burst.
    cases = [case for case in REFUSED if sum(array.nbytes for array in case.request.values()) < 1 << 20]
    order = np.random.default_rng(11).integers(0, len(cases), 1000)
    with MTGRClient(server.grpc_url) as client:
        before = [client.recommend(user, request_time=REQUEST_TIME) for user in users]
        processes, memory = stubs(server), shared_memory(server)
        assert len(processes) >= 2
        assert memory > 0
        assert server.log_path is not None
        log_size = server.log_path.stat().st_size

        refusals = asyncio.run(send_all(server, [cases[index].request for index in order], at_once=64))

        for index, refusal in zip(order, refusals, strict=True):
            case = cases[index]
            assert refusal.startswith("StatusCode.INVALID_ARGUMENT "), (case.name, refusal)
            assert all(word in refusal for word in case.words), (case.name, refusal)
        assert client.is_ready()
        for user, expected in zip(users, before, strict=True):
            assert_same(client.recommend(user, request_time=REQUEST_TIME), expected)
    assert stubs(server) == processes
    assert shared_memory(server) - memory <= SHARED_MEMORY_BOUND
    # What a client sends wrong is the client's matter: a log that grows with it could fill the disk.
    assert server.log_path.stat().st_size - log_size < 100_000


def test_requests_with_other_tensors_do_not_hold_each_other_up(server: TritonServer) -> None:
    """Triton 2.51's dynamic batcher sleeps half a second where a queued request does not fit the batch before it."""
    kinds = [
        request(top_k=int32(0)),
        request(top_k=int32(0), candidates=None),
        request(strategy=text(b"gpt")),
        request(**history([1], [1], [-1])),
        profile(b"[]"),
        request(request_time=None, top_k=int32(0)),
    ]
    burst = [kinds[index % len(kinds)] for index in range(48)]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        refusals = asyncio.run(send_all(server, burst, at_once=len(burst)))
        seconds.append(time.perf_counter() - start)
        assert all(refusal.startswith("StatusCode.INVALID_ARGUMENT ") for refusal in refusals)
    # Two hundredths of a second on an idle machine.
    assert min(seconds) < 0.4, seconds
