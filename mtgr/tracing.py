"""Trace context as W3C's header ``traceparent`` carries it, and the name a request has in logs."""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

TRACEPARENT = "traceparent"

_FORMAT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_MAX_LENGTH = 256
_SAMPLED = 1
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}", re.ASCII)


@dataclass(frozen=True)
class TraceContext:
    """Where a request stands in a trace.

    Attributes:
        trace_id: 32 hexadecimal digits, the same in every process that the request passes.
        span_id: 16 hexadecimal digits: the operation that called.
        sampled: Whether the caller records the trace.
    """

    trace_id: str
    span_id: str
    sampled: bool = False

    @classmethod
    def parse(cls, header: object) -> Self | None:
        """The context that a header carries; None where it carries none (W3C Trace Context, 3.2.2).

        A later version than 00 may say more behind the flags; what this one knows is read all the same.
        """
        if not isinstance(header, str) or len(header) > _MAX_LENGTH:
            return None
        found = _FORMAT.fullmatch(header.strip(" \t"))
        if found is None:
            return None
        version, trace_id, span_id, flags, rest = found.groups()
        if version == "ff" or (version == "00" and rest) or not (int(trace_id, 16) and int(span_id, 16)):
            return None
        return cls(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))

    @classmethod
    def new(cls, sampled: bool = False) -> Self:
        """The beginning of a trace."""
        return cls(_random_hex(16), _random_hex(8), sampled)

    def child(self) -> Self:
        """The same trace with an operation of its own, to be handed on to whoever is called."""
        return type(self)(self.trace_id, _random_hex(8), self.sampled)

    def header(self) -> str:
        """As a value of ``traceparent``."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


def trace_of(parameters: Mapping[str, Any], span: str | None = None) -> TraceContext | None:
    """The trace context of a request, if there is one.

    Args:
        parameters: The request's parameters, among which Triton puts headers that it was told to forward.
        span: What the server's own tracing says about this step, JSON (``request.trace().get_context()``); it comes
            first, because its span is the one that called.
    """
    try:
        values = json.loads(span) if span else {}
    except ValueError:
        values = {}
    context = TraceContext.parse(values.get(TRACEPARENT)) if isinstance(values, dict) else None
    if context is not None:
        return context
    found = next((value for name, value in parameters.items() if name.lower() == TRACEPARENT), None)
    return TraceContext.parse(found)


def request_name(request_id: str) -> str:
    """What a request is called in logs: its id, or a new one where that is empty, too long or not plain ASCII."""
    if request_id and _REQUEST_ID.fullmatch(request_id):
        return request_id
    return f"{_PROCESS}{next(_NUMBERS) & 0xFFFFFFFF:08x}"


def _random_hex(size: int) -> str:
    while not int(value := secrets.token_hex(size), 16):
        pass
    return value


# Names of requests that came without one: of this process, and of the moment of its start, and in a row.
_PROCESS = secrets.token_hex(4)
_NUMBERS = itertools.count()
