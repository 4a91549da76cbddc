"""``auto``: which engine serves a request.

1. Engines that are not ready, or whose breaker is open, are left out.
2. Without ``adaptive``, the first in ``order`` serves.
3. With it, the one that was quickest of late with requests of this size. What a request costs depends on the tokens of
   its context, its candidates, and, for vllm, on whether the context is cached there, so these make the size. Averages
   are of answers as callers saw them, waiting included, divided by the requests that the engine had then and multiplied
   by those that all engines have now: what was measured under another load is not taken for what it was, and an idle
   engine is asked what it would take for all, not for one, lest requests that could share a batch be spread. What an
   engine takes for few while others are busy says nothing of that, except that it takes no more. Engines within a
   tenth of the quickest count as equal, and the earlier in ``order`` wins, so that noise does not shift users back and
   forth.
   One that fails part of its calls costs their callers another call: its average counts as much higher. What was
   measured last holds until something newer is: a quiet hour does not make a slow engine attractive.
4. The part ``explore`` of the requests goes to the engine whose average rests on least, so that one that was slow once
   is not left out for ever: as many in a row as engines have at the time, 32 at most, for what it takes for one says
   little of what it takes for many. Where an engine has never been measured at this size, a tenth of the requests does:
   else the first in ``order`` would serve hundreds of requests before it is known to be the slowest.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtgr.errors import ConfigurationError
from mtgr.routing.latency import LatencyTracker, MovingAverage
from mtgr.routing.strategies import AUTO_ORDER, STRATEGIES

Clock = Callable[[], float]
Size = tuple[int, int, bool]

_CONTEXT_CLASSES = (64, 256, 1024)
_CANDIDATE_CLASSES = (0, 64, 256, 1024)
_EQUAL = 1.1
_FIRST_LOOKS = 0.1  # part of the requests that look for what is not measured yet
_MOST_IN_A_ROW = 32  # more in a batch cost hardly less each
_MOST_FAILURES = 0.99
_ROUNDING = 1e-6
_SEEN_CONTEXTS = 100_000


@dataclass(frozen=True)
class AutoConfig:
    """Settings of ``auto``.

    Attributes:
        order: Strategies that may serve, the preferred one first.
        adaptive: Whether measured latencies decide, and not the order alone.
        explore: Part of the requests that refresh old averages; 0 never tries what is not the quickest.
        half_life: Seconds after which a measurement counts half.
        cached_seconds: How long a context is believed to be cached at vllm.
    """

    order: tuple[str, ...] = AUTO_ORDER
    adaptive: bool = True
    explore: float = 0.01
    half_life: float = 10.0
    cached_seconds: float = 600.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: If one is out of range.
        """
        unknown = [name for name in self.order if name not in STRATEGIES]
        if unknown or not self.order or len(set(self.order)) < len(self.order):
            raise ConfigurationError(
                f"auto: order is {list(self.order)}; it must hold some of {', '.join(STRATEGIES)}, each once."
            )
        if not 0 <= self.explore <= 0.5:
            raise ConfigurationError(f"auto: explore is {self.explore}; it must be between 0 and 0.5.")
        if not (self.half_life > 0 and self.cached_seconds >= 0):
            raise ConfigurationError("auto: half_life must be positive, and cached_seconds not negative.")


@dataclass(frozen=True)
class Load:
    """Requests at engines as one is given to ``strategy``, that one included: there, and at all of them."""

    strategy: str
    own: int = 1
    all: int = 1

    @property
    def is_telling(self) -> bool:
        """Whether the engine has so many that what it takes for each says what it would take if it had all."""
        return 2 * self.own >= min(self.all, _MOST_IN_A_ROW)


@dataclass
class _Exploration:
    """Requests in a row for an engine."""

    strategy: str
    left: int


@dataclass(frozen=True)
class Choice:
    """Strategies in the order in which they are to be tried.

    Attributes:
        order: Best first.
        reason: Why, in a phrase.
    """

    order: tuple[str, ...]
    reason: str


class AutoChoice:
    """Chooses, and learns from what came of it; for one event loop.

    Args:
        config: Settings.
        clock: Gives seconds.
    """

    def __init__(self, config: AutoConfig | None = None, clock: Clock = time.monotonic) -> None:
        self.config = config or AutoConfig()
        self._clock = clock
        self._latencies = LatencyTracker(self.config.half_life, 256, clock)
        self._seconds: dict[tuple[str, Size], float] = {}  # the last averages
        self._told: set[tuple[str, Size]] = set()  # those that are more than a bound
        self._failures = {name: MovingAverage(self.config.half_life, clock) for name in STRATEGIES}
        self._running: Counter[str] = Counter()
        self._unexplored = 0.0  # requests that may be spent on exploring
        self._exploration: _Exploration | None = None
        self._contexts: OrderedDict[int, float] = OrderedDict()

    def choose(self, ready: Sequence[str], size: Size) -> Choice:
        """Order the engines that are ready.

        Args:
            ready: Those of ``config.order`` that can be called.
            size: From ``size``.
        """
        names = [name for name in self.config.order if name in ready]
        if not self.config.adaptive or len(names) < 2:
            return Choice(tuple(names), "the first of the order that is ready")
        expected = {name: self._expected(name, size) for name in names}
        known = {name: seconds for name, seconds in expected.items() if not math.isnan(seconds)}
        explored = self._explored(names, size)
        if explored is not None:
            return self._first(explored, names, expected, "its average rests on least")
        if not known:
            return Choice(tuple(names), "nothing is measured yet")
        quickest = min(known.values())
        best = next(name for name in names if known.get(name, math.inf) <= _EQUAL * quickest)
        return self._first(best, names, expected, "quickest of late")

    def started(self, strategy: str) -> Load:
        """Say that an engine is given a request."""
        self._running[strategy] += 1
        return Load(strategy, self._running[strategy], self._running.total())

    def ended(self, strategy: str) -> None:
        """Say that one is done with, answered or not."""
        self._running[strategy] -= 1

    def answered(self, load: Load, size: Size, seconds: float) -> None:
        """Say how long an answer took; ``load`` is what ``started`` gave."""
        key, each = (load.strategy, size), seconds / load.own
        self._failures[load.strategy].add(0.0)
        if load.is_telling:
            self._latencies.record(key, each)
            self._seconds[key] = self._latencies.mean(key) or each
            self._told.add(key)
        else:
            self._seconds[key] = min(each, self._seconds.get(key, math.inf))

    def failed(self, strategy: str) -> None:
        """Say that an engine gave no answer; when it is to be left alone is its breaker's business."""
        self._failures[strategy].add(1.0)

    def size(self, context_tokens: int, candidates: int, context: int) -> Size:
        """Class of a request's cost.

        Args:
            context_tokens: Tokens of the context.
            candidates: Items to rank; 0 to retrieve.
            context: A hash of the context's first rows.
        """
        moment = self._contexts.get(context)
        cached = moment is not None and self._clock() - moment < self.config.cached_seconds
        return _class(context_tokens, _CONTEXT_CLASSES), _class(candidates, _CANDIDATE_CLASSES), cached

    def remember(self, context: int) -> None:
        """Say that vllm has seen a context."""
        self._contexts[context] = self._clock()
        self._contexts.move_to_end(context)
        if len(self._contexts) > _SEEN_CONTEXTS:
            self._contexts.popitem(last=False)

    def _explored(self, names: Sequence[str], size: Size) -> str | None:
        """Whose turn it is to be looked at; None if it is nobody's."""
        if not self.config.explore:
            return None
        is_told = all((name, size) in self._told for name in names)
        self._unexplored += self.config.explore if is_told else max(self.config.explore, _FIRST_LOOKS)
        if self._exploration is None:
            row = min(1 + self._running.total(), _MOST_IN_A_ROW)
            if self._unexplored < row - _ROUNDING:
                return None
            self._unexplored -= row
            oldest = min(names, key=lambda name: ((name, size) in self._told, self._latencies.weight((name, size))))
            self._exploration = _Exploration(oldest, row)
        self._exploration.left -= 1
        strategy = self._exploration.strategy
        if not self._exploration.left:
            self._exploration = None
        return strategy if strategy in names else None

    def _expected(self, name: str, size: Size) -> float:
        """Seconds until an answer, were failed calls repeated; NaN where nothing was measured."""
        failures = min(self._failures[name].mean or 0.0, _MOST_FAILURES)
        return self._seconds.get((name, size), math.nan) * (1 + self._running.total()) / (1 - failures)

    @staticmethod
    def _first(name: str, names: list[str], expected: dict[str, float], why: str) -> Choice:
        rest = sorted(
            (other for other in names if other != name),
            key=lambda other: math.inf if math.isnan(expected[other]) else expected[other],
        )
        figures = ", ".join(
            f"{other} {'?' if math.isnan(seconds) else f'{seconds * 1e3:.1f} ms'}"
            for other, seconds in expected.items()
        )
        return Choice((name, *rest), f"{why} ({figures})")


def _class(value: int, bounds: Sequence[int]) -> int:
    """Index of the first bound that is not below the value."""
    return next((index for index, bound in enumerate(bounds) if value <= bound), len(bounds))
