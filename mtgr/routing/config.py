"""What the router may do with a request, and how many engines' calls it makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mtgr.errors import ConfigurationError
from mtgr.routing.buckets import CANDIDATE_BUCKETS, CONTEXT_BUCKETS

USUAL_WEIGHTS = {"engagement": 1.0, "retention": 0.1, "monetization": 0.5}


@dataclass(frozen=True)
class RoutingConfig:
    """Settings of ranking and of calls to engines.

    Attributes:
        task_weights: Weight of each task in the final score; tasks without one count 0. Empty: ``weights_of`` decides.
        default_top_k: Items recommended to a request that does not say how many.
        rank_limit: Retrieved items that are ranked, at least ``top_k``.
        remove_seen: Whether items the user already had an event with are never recommended.
        max_batch: Most requests merged into one call of a dense engine.
        max_running: Calls that each process of the router gives a dense engine at a time: one more than that has
            instances, so that it finds the next batch at hand when it has done one; one less while calls take long.
        max_tokens: Most tokens, padding included, in one call of a dense engine; bounds its memory.
        context_buckets: Lengths that dense engines' contexts are padded to, longer ones to sixteenths of the last.
            Finer ones pad less and merge less.
        candidate_buckets: Likewise for candidates; more than the last are split over calls.
        engine_timeout: Seconds for one call of an engine.
    """

    task_weights: Mapping[str, float] = field(default_factory=dict)
    default_top_k: int = 10
    rank_limit: int = 256
    remove_seen: bool = True
    max_batch: int = 32
    max_running: int = 2
    max_tokens: int = 16_384
    context_buckets: tuple[int, ...] = CONTEXT_BUCKETS
    candidate_buckets: tuple[int, ...] = CANDIDATE_BUCKETS
    engine_timeout: float = 8.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        for name in ("default_top_k", "rank_limit", "max_batch", "max_running", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"routing: {name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("context_buckets", "candidate_buckets"):
            buckets = getattr(self, name)
            if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
                raise ConfigurationError(f"routing: {name} is {list(buckets)}; it must be positive and ascending.")
        if not self.engine_timeout > 0:
            raise ConfigurationError(f"routing: engine_timeout is {self.engine_timeout}; it must be positive.")
        if not all(math.isfinite(weight) for weight in self.task_weights.values()):
            raise ConfigurationError("routing: task weights must be finite numbers.")

    def weights_of(self, tasks: Sequence[str]) -> list[float]:
        """Weight of each of a model's tasks.

        Without any in the settings: ``USUAL_WEIGHTS`` for a model with these tasks, and 1 each for any other model.

        Raises:
            ConfigurationError: If there is a weight for a task that the model does not have.
        """
        weights = self.task_weights
        if not weights:
            weights = USUAL_WEIGHTS if set(USUAL_WEIGHTS) <= set(tasks) else dict.fromkeys(tasks, 1.0)
        unknown = sorted(set(weights) - set(tasks))
        if unknown:
            raise ConfigurationError(
                f"routing: there is a weight for {unknown[0]!r}, but the tasks are {', '.join(tasks)}."
            )
        return [weights.get(task, 0.0) for task in tasks]
