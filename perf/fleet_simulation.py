"""A fleet of replicas with prefix caches, request by request: who serves whom, what is cached, how long it takes.

Arrivals are Poisson, users Zipf-distributed. A replica serves so many requests at a time, first come first served, and
keeps the contexts of its latest users (LRU, as vLLM's free pages). A request whose user it knows costs ``warm``, else
``cold``. The network, batching and the rest of the door are left out.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Balance = Literal["ring_hash", "bounded_ring_hash", "least_request", "random"]
BALANCES: tuple[Balance, ...] = get_args(Balance)

# As in deploy/gateway/envoy.yaml.
RING_SIZE = 8192
BOUND = 3.0

_BINS_PER_DECADE = 200


@dataclass(frozen=True)
class Costs:
    """What a request costs a replica.

    Attributes:
        cold: Seconds of one of its slots for a context that it does not know.
        warm: The same where it does.
        slots: Requests that it serves at a time, each at that speed.
        cached_users: Contexts that its cache holds.
    """

    cold: float
    warm: float
    slots: int
    cached_users: int

    def mean(self, hit_ratio: float) -> float:
        """Seconds of a slot, on average."""
        return hit_ratio * self.warm + (1 - hit_ratio) * self.cold

    def capacity(self, hit_ratio: float) -> float:
        """Requests a second that keep all slots busy."""
        return self.slots / self.mean(hit_ratio)


@dataclass(frozen=True)
class Crowd:
    """Users by rank: the weight of rank r is (r + offset) ** -exponent.

    Attributes:
        users: How many.
        exponent: 1.0 is Zipf's law; 0 makes all alike.
        offset: Flattens the head: no human being asks for a tenth of all recommendations.
    """

    users: int
    exponent: float = 1.0
    offset: float = 0.0

    def draw(self, count: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Users [count] from 0, independent."""
        weights = (np.arange(1, self.users + 1) + self.offset) ** -self.exponent
        cumulative = np.cumsum(weights)
        return np.searchsorted(cumulative, generator.random(count) * cumulative[-1]).astype(np.int64)

    def bins(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Users of nearly equal weight together: how many [b], and the share of the requests of each of them [b]."""
        edges = np.unique(
            np.round(np.logspace(0, math.log10(self.users + 1), int(_BINS_PER_DECADE * math.log10(self.users + 1)) + 2))
        )
        counts = np.diff(edges)
        ranks = (edges[:-1] + edges[1:] - 1) / 2
        weights = (ranks + self.offset) ** -self.exponent
        return counts, weights / (counts * weights).sum()


def lru_hit_ratio(crowd: Crowd, cached_users: int) -> float:
    """Hit ratio of an LRU cache after a long time, by Che's approximation (Che, Tung and Wang 2002).

    A user is cached if they came within the last T requests, where T is such that the expected number of cached users
    is the cache's size.
    """
    if cached_users >= crowd.users:
        return 1.0
    counts, shares = crowd.bins()
    low, high = 0.0, 1.0
    while (counts * -np.expm1(-shares * high)).sum() < cached_users:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if (counts * -np.expm1(-shares * middle)).sum() < cached_users:
            low = middle
        else:
            high = middle
    return float((counts * shares * -np.expm1(-shares * high)).sum())


@dataclass(frozen=True)
class Change:
    """A replica comes or goes.

    Attributes:
        time: When, in seconds.
        replica: Which; a new one has a number that was not there before.
        up: Whether it comes. Requests of one that goes are tried again at another.
    """

    time: float
    replica: int
    up: bool


@dataclass
class Served:
    """What became of each request, in order of arrival.

    Attributes:
        arrival: Seconds [n].
        latency: Seconds [n], retries included.
        hit: Whether the context was cached [n].
        replica: Who served [n].
        retried: Requests that were at a replica when it went.
    """

    arrival: npt.NDArray[np.float64]
    latency: npt.NDArray[np.float64]
    hit: npt.NDArray[np.bool_]
    replica: npt.NDArray[np.int64]
    retried: int = 0

    def between(self, start: float, end: float = math.inf) -> Served:
        """Requests that arrived in [start, end)."""
        chosen = (self.arrival >= start) & (self.arrival < end)
        return Served(self.arrival[chosen], self.latency[chosen], self.hit[chosen], self.replica[chosen], self.retried)

    @property
    def hit_ratio(self) -> float:
        """Part of the requests whose context was cached."""
        return float(self.hit.mean())

    @property
    def p99(self) -> float:
        """99th percentile of the latency in seconds."""
        return float(np.percentile(self.latency, 99))

    @property
    def imbalance(self) -> float:
        """Requests of the busiest replica over the mean."""
        counts = np.unique(self.replica, return_counts=True)[1]
        return float(counts.max() / counts.mean())


@dataclass
class _Replica:
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    free: list[float] = field(default_factory=list)  # heap: when each slot is free
    running: list[tuple[float, int]] = field(default_factory=list)  # heap: end and request

    def settle(self, now: float) -> None:
        while self.running and self.running[0][0] <= now:
            heapq.heappop(self.running)


class Ring:
    """Consistent hashing with many points a replica, as Envoy's.

    Args:
        replicas: Their numbers.
        size: Points of all together.
    """

    def __init__(self, replicas: Iterable[int], size: int = RING_SIZE) -> None:
        members = sorted(replicas)
        per_replica = max(1, math.ceil(size / len(members)))
        points = [(_hash(f"{member}_{point}"), member) for member in members for point in range(per_replica)]
        points.sort()
        self._points = np.array([point for point, _ in points], dtype=np.uint64)
        self._owners = np.array([owner for _, owner in points], dtype=np.int64)

    def owners(self, users: int) -> npt.NDArray[np.int64]:
        """The point of each user [users], as an index for :meth:`walk`."""
        hashes = np.array([_hash(f"user-{user}") for user in range(users)], dtype=np.uint64)
        return np.searchsorted(self._points, hashes).astype(np.int64) % len(self._points)

    def owner(self, point: int) -> int:
        """Whose a point is."""
        return int(self._owners[point])

    def walk(self, point: int) -> Iterable[int]:
        """Replicas along the ring from a point on, each once."""
        seen: set[int] = set()
        for offset in range(len(self._owners)):
            owner = int(self._owners[(point + offset) % len(self._owners)])
            if owner not in seen:
                seen.add(owner)
                yield owner


def simulate(
    balance: Balance,
    crowd: Crowd,
    costs: Costs,
    *,
    replicas: int,
    rate: float,
    seconds: float,
    seed: int,
    changes: Sequence[Change] = (),
) -> Served:
    """Serve a crowd.

    Args:
        balance: How a replica is chosen.
        crowd: Who asks.
        costs: What it costs.
        replicas: How many there are at the start, numbered from 0.
        rate: Requests a second.
        seconds: How long.
        seed: Of arrivals, users and choices; equal seeds give every balance the same requests.
        changes: Replicas that come and go, in order of time.
    """
    generator = np.random.default_rng(seed)
    arrivals = np.cumsum(generator.exponential(1 / rate, int(rate * seconds)))
    users = crowd.draw(len(arrivals), generator)
    choices = np.random.default_rng(seed + 1).random((len(arrivals), 2))
    fleet = _Fleet(balance, costs, replicas, crowd.users)
    latency = np.zeros(len(arrivals))
    hit = np.zeros(len(arrivals), dtype=np.bool_)
    served_by = np.zeros(len(arrivals), dtype=np.int64)
    waiting = deque(changes)
    retried = 0
    for index, (now, user) in enumerate(zip(arrivals.tolist(), users.tolist(), strict=True)):
        while waiting and waiting[0].time <= now:
            change = waiting.popleft()
            for lost in fleet.change(change):
                retried += 1
                replica, known, end = fleet.serve(change.time, int(users[lost]), choices[lost].tolist(), lost)
                latency[lost] = end - arrivals[lost]
                hit[lost], served_by[lost] = known, replica
        replica, known, end = fleet.serve(now, user, choices[index].tolist(), index)
        latency[index] = end - now
        hit[index], served_by[index] = known, replica
    return Served(arrivals, latency, hit, served_by, retried)


class _Fleet:
    def __init__(self, balance: Balance, costs: Costs, replicas: int, users: int) -> None:
        self._balance = balance
        self._costs = costs
        self._users = users
        self._replicas = {number: self._new() for number in range(replicas)}
        self._rebuild()

    def change(self, change: Change) -> list[int]:
        """Take a change over; requests that were at a replica that went."""
        lost: list[int] = []
        if change.up:
            self._replicas[change.replica] = self._new()
        else:
            gone = self._replicas.pop(change.replica)
            lost = sorted(request for end, request in gone.running if end > change.time)
        self._rebuild()
        return lost

    def serve(self, now: float, user: int, choices: list[float], request: int) -> tuple[int, bool, float]:
        """Who serves, whether they know the user, and when the answer is there."""
        number = self._choose(now, user, choices)
        replica = self._replicas[number]
        known = user in replica.cache
        if known:
            replica.cache.move_to_end(user)
        else:
            replica.cache[user] = None
            if len(replica.cache) > self._costs.cached_users:
                replica.cache.popitem(last=False)
        start = max(now, heapq.heappop(replica.free))
        end = start + (self._costs.warm if known else self._costs.cold)
        heapq.heappush(replica.free, end)
        heapq.heappush(replica.running, (end, request))
        return number, known, end

    def _new(self) -> _Replica:
        return _Replica(free=[0.0] * self._costs.slots)

    def _rebuild(self) -> None:
        self._numbers = sorted(self._replicas)
        if self._balance in ("ring_hash", "bounded_ring_hash"):
            self._ring = Ring(self._numbers)
            self._points = self._ring.owners(self._users).tolist()

    def _in_flight(self, number: int, now: float) -> int:
        replica = self._replicas[number]
        replica.settle(now)
        return len(replica.running)

    def _choose(self, now: float, user: int, choices: list[float]) -> int:
        if self._balance == "random":
            return self._numbers[int(choices[0] * len(self._numbers))]
        if self._balance == "least_request":  # the better of two
            pair = [self._numbers[int(choice * len(self._numbers))] for choice in choices]
            return min(pair, key=lambda number: self._in_flight(number, now))
        point = self._points[user]
        if self._balance == "ring_hash":
            return self._ring.owner(point)
        total = sum(self._in_flight(number, now) for number in self._numbers)
        bound = math.ceil(BOUND * (total + 1) / len(self._numbers))
        for number in self._ring.walk(point):
            if self._in_flight(number, now) < bound:
                return number
        return self._ring.owner(point)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
