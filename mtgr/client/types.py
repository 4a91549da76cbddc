"""What a caller gives and gets: plain values, without the wire's leading dimension of 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = Sequence[int] | npt.NDArray[np.integer[Any]]


# eq=False below: arrays have no single truth value, so generated equality would raise.
@dataclass(frozen=True, eq=False)
class History:
    """A user's events, oldest first, in columns of equal length n; sent instead of the feature store's.

    Attributes:
        items: Item ids, int64 [n].
        actions: What the user did, int32 [n], from 0 (MovieLens: rating - 1).
        times: Unix seconds, int64 [n].
    """

    items: Integers
    actions: Integers
    times: Integers


@dataclass(frozen=True, eq=False)
class RecommendationRequest:
    """One request; a field that is None is not sent, and the server's default holds.

    Attributes:
        user_id: The user's id in the feature store.
        history: The user's events; None takes the feature store's.
        candidates: Item ids to rank, int64 [k]; None lets the server retrieve them.
        request_time: Unix seconds at which the request counts as made; None is now.
        profile: Profile features that replace the feature store's, as a JSON object.
        strategy: baseline, onnx, tensorrt, vllm or auto.
        top_k: Most items to answer with.
    """

    user_id: str
    history: History | None = None
    candidates: Integers | None = None
    request_time: int | None = None
    profile: Mapping[str, Any] | None = None
    strategy: str | None = None
    top_k: int | None = None


@dataclass(frozen=True, eq=False)
class Recommendation:
    """Items from best to worst; the arrays are read-only.

    Attributes:
        items: Item ids, int64 [m].
        scores: What the order is by: the weighted sum of the task scores, float32 [m].
        task_scores: Probability of each task, float32 [m, T].
        strategy: The strategy that served.
        arm: The experiment arm the user is in.
        latency_ms: Milliseconds from the call to the answer, retries included, on the caller's clock.
        labels: What the caller should know about the answer, such as ``cold_start`` or ``fallback``.
    """

    items: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    task_scores: npt.NDArray[np.float32]
    strategy: str
    arm: str
    latency_ms: float
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of items, m."""
        return len(self.items)
