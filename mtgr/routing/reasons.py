"""Why a request, or an engine's call, ended without an answer: a fixed set, fit for a metric's label."""

from __future__ import annotations

import asyncio
from enum import StrEnum

from mtgr.errors import InvalidRequestError, RequestTimeoutError, UnavailableError
from mtgr.metrics import MetricSpec


class Reason(StrEnum):
    """What went wrong, in one word."""

    NOT_READY = "not_ready"
    BREAKER_OPEN = "breaker_open"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    INVALID = "invalid"
    INTERNAL = "internal"


class RefusedError(UnavailableError):
    """Unavailable for a reason that is known.

    Attributes:
        reason: The reason.
    """

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason


class EngineLostError(UnavailableError):
    """The engine's process is gone, and no later call will find it."""


def unanswered(asked: str, arm: str, reason: Reason) -> MetricSpec:
    """The counter of requests that got no answer; one family over all processes.

    Args:
        asked: The strategy that was asked for.
        arm: Side of the experiment.
        reason: Why.
    """
    labels = (("asked", asked), ("arm", arm), ("reason", reason.value))
    return MetricSpec("mtgr_errors_total", "Requests without an answer", labels=labels)


def reason_of(error: BaseException) -> Reason:
    """The reason behind an exception, never its text."""
    if isinstance(error, RefusedError):
        return error.reason
    for kind, reason in (
        (UnavailableError, Reason.FAILED),
        (RequestTimeoutError, Reason.DEADLINE),
        (TimeoutError, Reason.TIMED_OUT),
        (asyncio.CancelledError, Reason.CANCELLED),
        (InvalidRequestError, Reason.INVALID),
    ):
        if isinstance(error, kind):
            return reason
    return Reason.INTERNAL
