"""Trace context: the specification's examples, headers that are none, and where a request's comes from."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtgr.tracing import TraceContext, request_name, trace_of

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
EXAMPLE = f"00-{TRACE}-{SPAN}-01"  # W3C Trace Context, 3.2.1


def test_the_specifications_example() -> None:
    context = TraceContext.parse(EXAMPLE)
    assert context == TraceContext(TRACE, SPAN, sampled=True)
    assert context is not None
    assert context.header() == EXAMPLE


@pytest.mark.parametrize(
    ("header", "sampled"),
    [
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-ff", True),  # flags of which only the first is known
        (f"00-{TRACE}-{SPAN}-02", False),
        (f" 00-{TRACE}-{SPAN}-01\t", True),
        (f"cc-{TRACE}-{SPAN}-01", True),  # a later version
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", True),
    ],
)
def test_what_is_read(header: str, sampled: bool) -> None:
    assert TraceContext.parse(header) == TraceContext(TRACE, SPAN, sampled)


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"00-" + TRACE.encode() + b"-" + SPAN.encode() + b"-01",
        17,
        "",
        "00",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0G",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01-extra",
        f"00-{TRACE}-{SPAN}-01.",
        f"cc-{TRACE}-{SPAN}-01.later",
        f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}a-{SPAN}-01",
        f"00-{TRACE[:-1]}٣-{SPAN}-01",  # a digit, but not one of these
        f"00_{TRACE}_{SPAN}_01",
        f"{EXAMPLE}\n",
        f"{EXAMPLE},{EXAMPLE}",
        f"cc-{TRACE}-{SPAN}-01-{'x' * 1000}",
    ],
)
def test_what_is_not(header: object) -> None:
    assert TraceContext.parse(header) is None


@given(st.text(max_size=80))
def test_no_text_makes_it_fail(header: str) -> None:
    context = TraceContext.parse(header)
    assert context is None or TraceContext.parse(context.header()) == context


@given(st.booleans())
def test_children_stay_in_the_trace_with_a_span_of_their_own(sampled: bool) -> None:
    parent = TraceContext.new(sampled)
    child = parent.child()
    assert TraceContext.parse(child.header()) == child
    assert (child.trace_id, child.sampled) == (parent.trace_id, sampled)
    assert child.span_id != parent.span_id
    assert TraceContext.new().trace_id != parent.trace_id


def test_where_a_request_has_it_from() -> None:
    servers = f"00-{TRACE}-{'1' * 16}-01"
    assert trace_of({}) is None
    assert trace_of({"traceparent": EXAMPLE}) == TraceContext(TRACE, SPAN, sampled=True)
    assert trace_of({"Traceparent": EXAMPLE}) == TraceContext(TRACE, SPAN, sampled=True)  # as HTTP clients write it
    both = trace_of({"traceparent": EXAMPLE}, json.dumps({"traceparent": servers}))
    assert both == TraceContext(TRACE, "1" * 16, sampled=True)
    for broken in ("", "{", "[]", "null", '{"traceparent": 3}', '{"traceparent": "x"}'):
        assert trace_of({"traceparent": EXAMPLE}, broken) == TraceContext(TRACE, SPAN, sampled=True)
    assert trace_of({"traceparent": "x"}) is None


def test_a_request_is_called_by_its_id_or_gets_a_name() -> None:
    assert request_name("order-66/b") == "order-66/b"
    made = {request_name(bad) for bad in ("", " ", "a b", "a\nb", "é", "x" * 129, '\x00"')}
    assert len(made) == 7
    assert all(len(name) == 16 and int(name, 16) for name in made)
