"""The client without a server: how it encodes, what it says of errors, when it tries again, which settings it takes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from mtgr.client import AsyncMTGRClient, History, MTGRClient, RecommendationRequest
from mtgr.client.failures import sentence, translated
from mtgr.client.retry import Attempts, RetryPolicy
from mtgr.client.settings import Settings
from mtgr.client.wire import encode
from mtgr.errors import ConfigurationError, InvalidRequestError, RequestTimeoutError, ServerError, UnavailableError
from tests.unit.door import LongWaits


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


def test_a_server_that_stopped_and_hung_up_may_be_asked_again() -> None:
    """gRPC's own CANCELLED has no sentence; what a model says of a request that was cancelled stays what it is."""
    settings = Settings.checked("127.0.0.1:8001", "grpc", 1.0, 0, None, "mtgr")
    with pytest.raises(UnavailableError, match="stopped before it answered; try again later"), translated(settings):
        raise InferenceServerException("CANCELLED", "StatusCode.CANCELLED")
    with pytest.raises(ServerError, match="the request was cancelled") as caught, translated(settings):
        raise InferenceServerException("the request was cancelled.", "StatusCode.CANCELLED")
    assert not isinstance(caught.value, UnavailableError)
