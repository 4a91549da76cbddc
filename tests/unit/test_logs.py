"""Events in the log: one valid line each, whatever the fields hold, and never too many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtgr.logs import MAX_LINE_BYTES, MAX_TEXT, EventLog, Level
from mtgr.routing.reasons import Reason

MOMENT = 1_700_000_000.25

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None, exclude_categories=()), max_size=700)
    | st.binary(max_size=700),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.text(max_size=20) | st.sampled_from(("time", "level", "event", "request_id", "dropped"))


class Clock:
    def __init__(self) -> None:
        self.now = MOMENT

    def __call__(self) -> float:
        return self.now


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def lines_of(as_json: bool = True, **settings: Any) -> tuple[EventLog, list[bytes], Clock]:
    lines: list[bytes] = []
    clock = Clock()
    return EventLog(as_json=as_json, write=lines.append, clock=clock, **settings), lines, clock


def test_a_line_says_when_how_bad_and_what() -> None:
    log, lines, _ = lines_of()
    log.warning("engine_failed", request_id="r-1", strategy="onnx", reason=Reason.TIMED_OUT, seconds=0.25, tries=2)
    assert json.loads(lines[0]) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "event": "engine_failed",
        "request_id": "r-1",
        "strategy": "onnx",
        "reason": "timed_out",
        "seconds": 0.25,
        "tries": 2,
    }


def test_the_same_as_text() -> None:
    log, lines, _ = lines_of(as_json=False)
    log.error("engine_failed", request_id="r-1", error='no "CUDA"\nFAKE line', seconds=0.25, known=False)
    assert lines == [
        b'2023-11-14T22:13:20.250Z ERROR   engine_failed request_id=r-1 error="no \\"CUDA\\"\\nFAKE line" '
        b"seconds=0.25 known=false\n"
    ]


@settings(max_examples=300)
@given(st.text(max_size=700), st.dictionaries(names, values, max_size=40), st.booleans())
@example("e", {"a": "\x00" * MAX_TEXT, "b": "\u2028" * MAX_TEXT, "c": "\ud800" * MAX_TEXT, "d": "é" * MAX_TEXT}, True)
@example("e", {"n": float("nan"), "i": -float("inf"), "big": 10**5000, "bytes": b"\xff\n"}, True)
def test_every_event_is_one_valid_line(event: str, fields: dict[str, Any], as_json: bool) -> None:
    log, lines, _ = lines_of(as_json)
    log.log(Level.INFO, event, fields)
    (line,) = lines
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert b"\r" not in line
    assert len(line) <= MAX_LINE_BYTES
    text = line.decode("ascii")
    if as_json:
        value = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert value["level"] == "info"
        assert value["time"] == "2023-11-14T22:13:20.250Z"
        assert {type(one) for one in value.values()} <= {str, int, float, bool, type(None)}
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # no half characters
    else:
        assert text.startswith("2023-11-14T22:13:20.250Z INFO    ")


def test_users_features_are_described_and_not_spelled_out() -> None:
    log, lines, _ = lines_of()
    log.info(
        "request",
        user_id="u-17",
        context=np.full((2048, 8), 4711, dtype=np.int32),
        history=[4711, 4712],
        profile={"age": 4711},
        item=np.int64(3),
        score=np.float32(0.5),
        bad=np.float32("nan"),
        text="x" * 10_000,
        error=UnprintableError(),
        thing=object(),
    )
    value = json.loads(lines[0])
    assert "4711" not in lines[0].decode()
    assert value["user_id"] == "u-17"
    assert value["context"] == "ndarray int32 (2048, 8)"
    assert (value["history"], value["profile"]) == ("list of 2", "dict of 1")
    assert (value["item"], value["score"], value["bad"]) == (3, 0.5, "nan")
    assert len(value["text"]) == MAX_TEXT
    assert value["error"] == "UnprintableError without a text (RuntimeError)"
    assert value["thing"] == "object"


def test_a_field_cannot_take_the_place_of_the_events_own() -> None:
    log, lines, _ = lines_of()
    log.log(Level.ERROR, "real", {"event": "forged", "level": "info", "time": "never"})
    value = json.loads(lines[0])
    assert (value["event"], value["level"], value["event_"]) == ("real", "error", "forged")


def test_repeats_are_dropped_and_counted() -> None:
    log, lines, clock = lines_of(burst=3, seconds=1.0)
    for _ in range(10):
        log.warning("store_down")
        log.info("other")
    assert len(lines) == 6
    assert log.dropped == 14
    clock.now += 1.0
    log.warning("store_down")
    assert json.loads(lines[-1])["dropped"] == 7
    log.warning("store_down")
    assert "dropped" not in json.loads(lines[-1])
    log.flush()
    assert [json.loads(line) for line in lines[8:]] == [
        {"time": "2023-11-14T22:13:21.250Z", "level": "warning", "event": "events_dropped", "of": "other", "dropped": 7}
    ]
    log.flush()
    assert len(lines) == 9


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 0.6)), max_size=200))
def test_written_and_dropped_make_all(events: list[tuple[int, float]]) -> None:
    log, lines, clock = lines_of(burst=2, seconds=1.0)
    for event, pause in events:
        clock.now += pause
        log.info(f"event{event}")
    clock.now += 1.0
    log.flush()
    parsed = [json.loads(line) for line in lines]
    told = sum(line.get("dropped", 0) for line in parsed)
    written = sum(line["event"] != "events_dropped" for line in parsed)
    assert written + told == len(events)
    assert log.dropped == told


def test_many_kinds_of_events_do_not_grow_the_log() -> None:
    log, lines, _ = lines_of(burst=1)
    for index in range(2000):
        log.info(f"event {index}")
    assert len(lines) == 257
    assert log.dropped == 2000 - 257
    assert len(log._repeats) == 257


def test_debugging_is_not_limited_and_off_by_default() -> None:
    log, lines, _ = lines_of(level="debug", burst=2)
    for _ in range(50):
        log.debug("route")
    assert len(lines) == 50
    log, lines, _ = lines_of()
    log.debug("route")
    assert not lines
    assert not log.enabled(Level.DEBUG)


def test_a_log_that_nobody_reads_fails_no_request() -> None:
    def broken(line: bytes) -> None:
        raise BrokenPipeError

    EventLog(write=broken).error("engine_failed")


def test_threads_do_not_mix_lines_and_lose_none() -> None:
    read, write = os.pipe()
    log = EventLog(write=lambda line: os.write(write, line), burst=10**9)

    def work(name: int) -> None:
        for index in range(200):
            log.info("work", thread=name, index=index, text="x" * 100)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    received = bytearray()

    def collect() -> None:
        while chunk := os.read(read, 65536):
            received.extend(chunk)

    reader = threading.Thread(target=collect)
    reader.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(write)
    reader.join()
    os.close(read)
    found = {(value["thread"], value["index"]) for value in map(json.loads, received.splitlines())}
    assert found == {(name, index) for name in range(8) for index in range(200)}


def test_lines_go_to_standard_error() -> None:
    code = "from mtgr.logs import EventLog; EventLog().info('hello', who='world')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert done.stdout == b""
    assert json.loads(done.stderr)["who"] == "world"
