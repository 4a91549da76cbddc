"""Everything a transport can raise, as the exceptions a caller can act on.

What was seen of tritonclient 2.73: a gRPC status reads ``StatusCode.NAME``, and refused connections and
passed deadlines come that way too. An HTTP status is the number as text; refused, reset and unresolved
connections are OSError (aiohttp also has its own), an answer cut short is http.client.HTTPException, and one
that is no Triton answer fails in the decoder. Triton's HTTP has no status of its own for UNKNOWN, CANCELLED and
ALREADY_EXISTS: they come as 400, as INVALID_ARG does.
"""

from __future__ import annotations

import http.client
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import BadGzipFile

from tritonclient.utils import InferenceServerException

from mtgr.client.settings import Settings
from mtgr.errors import (
    InvalidRequestError,
    MTGRError,
    RequestTimeoutError,
    ServerError,
    UnavailableError,
)

_KINDS: dict[str, type[MTGRError]] = {
    "StatusCode.INVALID_ARGUMENT": InvalidRequestError,
    "StatusCode.UNAVAILABLE": UnavailableError,
    "StatusCode.DEADLINE_EXCEEDED": RequestTimeoutError,
    "400": InvalidRequestError,
    "503": UnavailableError,
    # From gateways: the server behind them is away or late.
    "502": UnavailableError,
    "504": RequestTimeoutError,
}

# What Triton puts before the sentence that a model wrote, once per layer that an error passes.
_PREFIX = re.compile(
    r"^(?:\s*(?:\[request id: [^\]]*\]|in ensemble '[^']*',"
    r"|Failed to process the request\(s\) for model(?: instance)? '[^']*', message:"
    r"|TritonModelException:))+\s*"
)

# How gRPC's core words an UNAVAILABLE of its own, as opposed to one that a server sent.
_NO_CONNECTION = re.compile(
    r"^(?:failed to connect to all addresses|errors resolving |DNS resolution failed|Socket closed"
    r"|Connection reset|Connection refused|recvmsg:|sendmsg:|GOAWAY)",
    re.IGNORECASE,
)


# What gRPC says of calls that were open when its server stopped: nothing but the status.
_HUNG_UP = ("StatusCode.CANCELLED", "CANCELLED")

# How Triton 2.51 refuses while it drains or reloads a model, with NOT_FOUND: another try may meet one that is up.
_UNLOADED = re.compile(r"^Request for unknown model: '[^']*' has no available versions")


def sentence(message: str) -> str:
    """The message on one line, without what Triton adds: prefixes of ensembles and backends, Python's traceback."""
    return " ".join(_PREFIX.sub("", message).partition("\n\nAt:\n")[0].split())


@contextmanager
def translated(settings: Settings) -> Iterator[None]:
    """Turn what a transport raises in the block into an MTGRError, with the original as its cause."""
    try:
        yield
    except InferenceServerException as error:
        raise _from_triton(error, settings) from error
    except TimeoutError as error:
        raise _timed_out(settings) from error
    except (
        ValueError,
        KeyError,
        EOFError,
        zlib.error,
        struct.error,
        BadGzipFile,
        http.client.HTTPException,
    ) as error:
        raise ServerError(
            f"the answer from {settings.url} is not Triton's ({error}); check that the url is that of "
            f"a Triton server's {settings.protocol} port."
        ) from error
    except OSError as error:
        raise _no_connection(settings, error.strerror or str(error)) from error


def _from_triton(error: InferenceServerException, settings: Settings) -> MTGRError:
    status = str(error.status())
    message = sentence(str(error.message() or ""))
    kind = UnavailableError if _UNLOADED.match(message) else _KINDS.get(status, ServerError)
    if kind is RequestTimeoutError:
        return _timed_out(settings)
    if (status, message) == _HUNG_UP:
        return UnavailableError(f"{settings.url} stopped before it answered; try again later.")
    if kind is UnavailableError and _NO_CONNECTION.match(message):
        return _no_connection(settings, message.rsplit(": ", 1)[-1])
    if status.isdigit() and error.debug_details() is not None:
        # tritonclient keeps the body here only when it is not Triton's JSON.
        return (ServerError if kind is InvalidRequestError else kind)(
            f"{settings.url} answered HTTP {status} without a reason; check that the url is that of a Triton "
            "server's HTTP port."
        )
    return kind(message or f"{settings.url} answered {status} without a reason; see the server's log.")


def _timed_out(settings: Settings) -> RequestTimeoutError:
    return RequestTimeoutError(f"no answer came from {settings.url} within {settings.timeout:g} s; raise the timeout.")


def _no_connection(settings: Settings, reason: str) -> UnavailableError:
    return UnavailableError(
        f"no connection to {settings.url} ({reason.rstrip('.]')}); start the server with "
        "`python -m mtgr.serving` or give another url."
    )
