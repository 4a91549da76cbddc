"""Traffic as a service sees it: some users come often, some come back with new events, ask twice, or are new.

Users are drawn by a Zipf law, lengths of histories and of candidate lists by log-normal ones. From one visit of a user
to the next a few real-time events are appended. A share of the requests may be wrong. All of it follows from a seed,
and no two requests are equal.

Users come from a model repository's feature store, where a visit is made at the moment of one of the user's own events
and sees those before it (``request_time``): histories grow as they did in the data, and a user whose events are all
told begins again. Or they are generated: then the request brings the history along.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mtgr.bundle import Bundle
from mtgr.client import History, RecommendationRequest
from mtgr.client.wire import Tensor, encode
from mtgr.errors import ConfigurationError
from mtgr.features.candidates import candidate_rows
from mtgr.features.extract import FeatureExtractor
from mtgr.features.state import CandidateState
from mtgr.features.store import FeatureStore, UserRecord
from mtgr.routing.buckets import CANDIDATE_BUCKETS, CONTEXT_BUCKETS, bucket, pad
from perf.results_format import Spread, WorkloadSummary

_RECENT = 32  # visits among which one is repeated
_MINUTE = 60


class Kind(enum.Enum):
    """What a visit is."""

    USUAL = "usual"
    NEW = "new"  # of a user whom nobody knows
    REPEAT = "repeat"  # of a user who was here a moment ago, for other candidates
    BAD = "bad"  # to be refused


@dataclass(frozen=True)
class WorkloadConfig:
    """What traffic to make.

    Attributes:
        zipf: Exponent of the users' popularity.
        history_median: Events of a user at the first visit, as far as the user has so many.
        history_sigma: Standard deviation of their logarithm.
        candidates_median: Candidates of a request.
        candidates_sigma: Standard deviation of their logarithm.
        max_candidates: Most candidates of a request.
        events_between_visits: Mean number of events from one visit of a user to the next, geometrically distributed.
        new_user_share: Part of the visits.
        repeat_share: Part of the visits.
        bad_share: Part of the visits; perf_analyzer stops at an error, so its files must have none.
        apart: Visits from one of a user to the next that is no repeat, at least, as far as there are users enough:
            nobody asks again before an answer can have been read. 0 leaves it to popularity.
        seed: Of everything.
    """

    zipf: float = 1.0
    history_median: float = 80.0
    history_sigma: float = 0.8
    candidates_median: float = 64.0
    candidates_sigma: float = 0.5
    max_candidates: int = 1024
    events_between_visits: float = 1.0
    new_user_share: float = 0.02
    repeat_share: float = 0.1
    bad_share: float = 0.0
    apart: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: If one is out of range.
        """
        for name in ("zipf", "history_sigma", "candidates_sigma", "events_between_visits", "apart"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must not be negative.")
        for name in ("history_median", "candidates_median", "max_candidates"):
            if not 1 <= getattr(self, name) < float("inf"):
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        shares = (self.new_user_share, self.repeat_share, self.bad_share)
        if min(shares) < 0 or sum(shares) > 1:
            raise ConfigurationError(
                f"new_user_share, repeat_share and bad_share are {', '.join(map(str, shares))}; "
                "none may be negative, nor their sum above 1."
            )


@dataclass(frozen=True, eq=False)
class Visit:
    """One request of the traffic.

    Attributes:
        request: The request; its strategy is left open.
        kind: What it is.
        events: Events of the user that count at its time.
        appended: How many of them are new since the user's last visit; 0 at the first.
    """

    request: RecommendationRequest
    kind: Kind
    events: int
    appended: int

    @property
    def num_candidates(self) -> int:
        """Items to rank."""
        return 0 if self.request.candidates is None else len(self.request.candidates)


class Users(Protocol):
    """Whose traffic it is."""

    @property
    def ids(self) -> Sequence[str]:
        """Who there is."""

    def capacity(self, user: str) -> int:
        """Most events that the user can have."""

    def request(self, user: str, events: int) -> tuple[RecommendationRequest, int]:
        """A request without candidates at the moment when the user has about so many events, and how many it has."""


class StoredUsers:
    """Users of a feature store, with their own events.

    Args:
        store: The store.
        ids: The users to take.
    """

    def __init__(self, store: FeatureStore, ids: Sequence[str]) -> None:
        if not ids:
            raise ConfigurationError("the feature store has no users; run `make train` and `make export`.")
        self.ids = ids
        self._store = store
        self._times: dict[str, npt.NDArray[np.int64]] = {}

    def capacity(self, user: str) -> int:
        """Events in the store."""
        return len(self._times_of(user))

    def request(self, user: str, events: int) -> tuple[RecommendationRequest, int]:
        """At the moment of the first event that is not to count."""
        times = self._times_of(user)
        last = int(times[-1]) if len(times) else 0
        moment = int(times[events]) if events < len(times) else last + _MINUTE
        return RecommendationRequest(user, request_time=moment), int(np.searchsorted(times, moment, side="left"))

    def _times_of(self, user: str) -> npt.NDArray[np.int64]:
        if user not in self._times:
            self._times[user] = (self._store.get(user) or UserRecord()).times
        return self._times[user]


class GeneratedUsers:
    """Users who bring their history along: no store is asked for it.

    Args:
        bundle: Its items and actions are what users do things with.
        count: Number of users.
        max_events: Most events of a user.
        seed: Of their events.
    """

    def __init__(self, bundle: Bundle, count: int, max_events: int = 1000, seed: int = 0) -> None:
        if count < 1 or max_events < 1:
            raise ConfigurationError(f"{count} users with up to {max_events} events; there must be at least one each.")
        self.ids = [f"generated-{index}" for index in range(count)]
        self._items = bundle.catalog.raw_ids
        self._schema = bundle.schema
        self._max_events = max_events
        self._seed = seed

    def capacity(self, user: str) -> int:
        """The same for all."""
        return self._max_events

    def request(self, user: str, events: int) -> tuple[RecommendationRequest, int]:
        """With the first events of a sequence that is the user's own and always the same."""
        generator = np.random.default_rng([self._seed, int(user.rsplit("-", 1)[1])])
        # Popular items are met often.
        ranks = np.minimum(generator.zipf(1.2, self._max_events), len(self._items)) - 1
        gaps = generator.lognormal(6.0, 2.0, self._max_events).astype(np.int64) + 1
        times = self._schema.epoch + _MINUTE + np.cumsum(np.minimum(gaps, 86_400))
        actions = generator.integers(0, self._schema.num_actions, self._max_events).astype(np.int32)
        history = History(self._items[ranks][:events], actions[:events], times[:events])
        moment = int(times[events - 1]) + 1 if events else self._schema.epoch + _MINUTE
        return RecommendationRequest(user, history, request_time=moment), events


@dataclass
class Traffic:
    """An endless, seeded stream of visits.

    Args:
        users: Who visits.
        items: INT64 [I], raw ids of the items that may be candidates.
        config: What the traffic is like.
    """

    users: Users
    items: npt.NDArray[np.int64]
    config: WorkloadConfig = field(default_factory=WorkloadConfig)

    def __post_init__(self) -> None:
        self._generator = np.random.default_rng(self.config.seed)
        popularity = 1.0 / np.arange(1, len(self.users.ids) + 1) ** self.config.zipf
        self._cumulated = np.cumsum(popularity / popularity.sum())
        self._by_rank = self._generator.permutation(len(self.users.ids))
        self._wanted: dict[str, int] = {}
        self._told: dict[str, int] = {}
        self._recent: deque[tuple[RecommendationRequest, int]] = deque(maxlen=_RECENT)
        self._newcomers = 0
        self._turn = 0
        self._last_turn: dict[str, int] = {}
        self._seen: set[bytes] = set()

    def take(self, count: int) -> list[Visit]:
        """The next visits."""
        return [self._visit() for _ in range(count)]

    def _visit(self) -> Visit:
        visit = self._drawn()
        # With few items, or few candidates of them, chance may repeat a request.
        while (payload := digest(visit.request)) in self._seen:
            visit = replace(visit, request=self._with_candidates(visit.request))
        self._seen.add(payload)
        return visit

    def _drawn(self) -> Visit:
        config, draw = self.config, self._generator.random()
        if draw < config.bad_share:
            user = self._user()
            return Visit(self._spoilt(self.users.request(user, self._wanted.get(user, 0))[0]), Kind.BAD, 0, 0)
        draw -= config.bad_share
        if draw < config.new_user_share:
            return self._newcomer()
        draw -= config.new_user_share
        if draw < config.repeat_share and self._recent:
            user = self._recent[int(self._generator.integers(len(self._recent)))][0].user_id
            # The user's latest moment: nobody goes back in time.
            request, events = next(visit for visit in reversed(self._recent) if visit[0].user_id == user)
            return Visit(self._with_candidates(request), Kind.REPEAT, events, 0)
        return self._usual()

    def _usual(self) -> Visit:
        user = self._next_user()
        before, capacity = self._wanted.get(user), self.users.capacity(user)
        starts = before is None or before >= capacity
        if before is None or starts:
            wanted = self._count(self.config.history_median, self.config.history_sigma, capacity)
        else:
            mean = self.config.events_between_visits
            wanted = min(before + int(self._generator.geometric(1 / (1 + mean))) - 1, capacity)
        # Of events of the same second a request sees all or none, so there may be fewer than wanted.
        request, events = self.users.request(user, wanted)
        appended = 0 if starts else events - self._told[user]
        self._wanted[user], self._told[user] = wanted, events
        self._recent.append((request, events))
        return Visit(self._with_candidates(request), Kind.USUAL, events, appended)

    def _newcomer(self) -> Visit:
        self._newcomers += 1
        moment = self.users.request(self._user(), 1)[0].request_time
        request = RecommendationRequest(f"newcomer-{self.config.seed}-{self._newcomers}", request_time=moment)
        return Visit(self._with_candidates(request), Kind.NEW, 0, 0)

    def _spoilt(self, request: RecommendationRequest) -> RecommendationRequest:
        request = self._with_candidates(request)
        wrong: tuple[dict[str, Any], ...] = (
            {"top_k": -1},
            {"strategy": "fastest"},
            {"request_time": 1_000 * (request.request_time or 1) + 10**12},  # milliseconds
        )
        return replace(request, **wrong[int(self._generator.integers(len(wrong)))])

    def _user(self) -> str:
        rank = int(np.searchsorted(self._cumulated, self._generator.random()))
        return self.users.ids[int(self._by_rank[min(rank, len(self._by_rank) - 1)])]

    def _next_user(self) -> str:
        """Whose turn it is, by popularity, among those who have not just been here."""
        self._turn += 1
        apart = min(self.config.apart, len(self.users.ids) // 2)
        user = self._user()
        while self._turn - self._last_turn.get(user, -apart) < apart:
            user = self._user()
        self._last_turn[user] = self._turn
        return user

    def _count(self, median: float, sigma: float, most: int) -> int:
        return int(np.clip(round(float(self._generator.lognormal(np.log(median), sigma))), min(1, most), most))

    def _with_candidates(self, request: RecommendationRequest) -> RecommendationRequest:
        most = min(self.config.max_candidates, len(self.items))
        count = self._count(self.config.candidates_median, self.config.candidates_sigma, most)
        return replace(request, candidates=self._generator.choice(self.items, count, replace=False))


def stored_traffic(bundle: Bundle, config: WorkloadConfig) -> Traffic:
    """Traffic of a model repository's users."""
    store = bundle.store()
    return Traffic(StoredUsers(store, store.user_ids()), bundle.catalog.raw_ids, config)


def generated_traffic(bundle: Bundle, config: WorkloadConfig, users: int, max_events: int = 1000) -> Traffic:
    """Traffic of users who bring their history along."""
    return Traffic(GeneratedUsers(bundle, users, max_events, config.seed), bundle.catalog.raw_ids, config)


def digest(request: RecommendationRequest) -> bytes:
    """Equal for equal payloads only, whatever strategy they ask for."""
    parts = hashlib.blake2b(digest_size=16)
    for tensor in encode(replace(request, strategy=None)):
        parts.update(f"{tensor.name}{tensor.data.shape}".encode())
        parts.update(tensor.data.item() if tensor.datatype == "BYTES" else tensor.data.tobytes())
    return parts.digest()


def summary(config: WorkloadConfig, visits: Iterable[Visit]) -> WorkloadSummary:
    """What the traffic turned out to be."""
    every = list(visits)
    total = max(len(every), 1)
    returning = [visit.appended for visit in every if visit.kind is Kind.USUAL]

    def share(kind: Kind) -> float:
        return round(sum(visit.kind is kind for visit in every) / total, 6)

    return WorkloadSummary(
        users=len({visit.request.user_id for visit in every}),
        zipf=config.zipf,
        requests_generated=len(every),
        unique_payloads=len({digest(visit.request) for visit in every}),
        history_lengths=Spread.of([visit.events for visit in every if visit.kind is not Kind.BAD]),
        candidates=Spread.of([visit.num_candidates for visit in every]),
        new_user_share=share(Kind.NEW),
        repeat_share=share(Kind.REPEAT),
        bad_share=share(Kind.BAD),
        events_between_visits=round(float(np.mean(returning)), 4) if returning else 0.0,
    )


def write_input(path: Path, steps: Iterable[Sequence[Tensor]]) -> Path:
    """Write perf_analyzer's input data: one step a request, so that each that is sent is another one.

    Args:
        path: The JSON file.
        steps: Tensors of each request, with their leading dimension of 1, which the file leaves out.
    """
    data = [
        {
            tensor.name: {
                "content": [value.decode() for value in tensor.data.ravel()]
                if tensor.datatype == "BYTES"
                else tensor.data.ravel().tolist(),
                "shape": list(tensor.data.shape[1:]),
            }
            for tensor in step
        }
        for step in steps
    ]
    path.write_text(json.dumps({"data": data}), encoding="utf-8")
    return path


def door_steps(visits: Iterable[Visit], strategy: str) -> Iterable[list[Tensor]]:
    """Requests to the door for a strategy; those that are bad stay as they are."""
    for visit in visits:
        bad = visit.kind is Kind.BAD
        yield encode(visit.request if bad else replace(visit.request, strategy=strategy))


def row_steps(visits: Iterable[Visit], bundle: Bundle) -> Iterable[list[Tensor]]:
    """Rows as the router gives them to a dense engine, of requests that are not bad."""
    with_store = FeatureExtractor(bundle.schema, bundle.catalog, bundle.store())
    for visit in visits:
        if visit.kind is Kind.BAD:
            raise ConfigurationError("a bad request has no rows; make the traffic with bad_share 0.")
        features = with_store.extract({tensor.name: tensor.data for tensor in encode(visit.request)})
        state = CandidateState.from_array(features.candidate_state, bundle.schema.epoch)
        items = bundle.catalog.to_internal(features.candidates)
        rows = candidate_rows(bundle.schema, bundle.catalog, state, items)
        context = pad(features.context, bucket(len(features.context), CONTEXT_BUCKETS))
        yield [
            Tensor("context", "INT32", context),
            Tensor("candidates", "INT32", pad(rows, bucket(len(rows), CANDIDATE_BUCKETS))),
        ]
