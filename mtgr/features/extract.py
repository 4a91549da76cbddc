"""Feature extraction: from a request to the rows and the state that engines and router need."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtgr.errors import UnavailableError
from mtgr.features.catalog import ItemCatalog
from mtgr.features.context import context_rows
from mtgr.features.request import Request, Tensors, parse_request
from mtgr.features.state import build_candidate_state
from mtgr.features.store import UserRecord, UserSource
from mtgr.routing.experiment import DEFAULT_ARM
from mtgr.routing.strategies import AUTO
from mtgr.schema import Schema

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

COLD_START = "cold_start"
STALE_FEATURES = "stale_features"
FEATURES_UNAVAILABLE = "features_unavailable"


@dataclass(frozen=True)
class Features:
    """What one request looks like after extraction.

    Attributes:
        context: INT32 [n, W].
        candidate_state: INT32 [s], the user's state for candidate rows.
        candidates: INT64 [k] raw item ids; empty to retrieve.
        strategy: What the request asks for.
        top_k: Items to return; 0 for the default.
        arm: Side of the experiment.
        labels: What the caller should know about the answer: ``cold_start`` (the user has no events),
            ``stale_features`` (the store is down, these are features of an earlier moment), or
            ``features_unavailable`` (it is down, and the features are what the request brought along).
        deadline_ms: Unix milliseconds until which the answer is of use; 0 for ever.
        request_id: The caller's name of the request, for logs; may be empty.
        trace: The caller's trace context (W3C traceparent); may be empty.
    """

    context: Int32Array
    candidate_state: Int32Array
    candidates: Int64Array
    strategy: str
    top_k: int
    arm: str = DEFAULT_ARM
    labels: tuple[str, ...] = ()
    deadline_ms: int = 0
    request_id: str = ""
    trace: str = ""


class FeatureExtractor:
    """Validates requests and builds rows.

    Args:
        schema: The schema.
        catalog: The items.
        store: Where users come from.
        clock: Gives unix seconds.

    Attributes:
        arm: Gives the arm of a user whose request leaves the strategy open; it may be exchanged while serving.
    """

    def __init__(
        self,
        schema: Schema,
        catalog: ItemCatalog,
        store: UserSource,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.schema = schema
        self.catalog = catalog
        self.store = store
        self.clock = clock
        self.arm: Callable[[str], str] = lambda user_id: DEFAULT_ARM
        self._profile_names = frozenset(field.name for field in schema.profile)

    def extract(self, tensors: Tensors, deadline_ms: int = 0, request_id: str = "", trace: str = "") -> Features:
        """Features of one request.

        Args:
            tensors: The door's inputs by name, each with a leading dimension of 1.
            deadline_ms: As in ``Features``, to go along; so are the others.
            request_id: Likewise.
            trace: Likewise.

        Raises:
            InvalidRequestError: If the request is wrong.
        """
        request = parse_request(tensors, self.schema, int(self.clock()))
        record, labels = self._record(request)
        items = self.catalog.to_internal(record.items)
        rows = context_rows(self.schema, record.profile, items, record.actions, record.times)
        state = build_candidate_state(
            self.schema, self.catalog, items, record.actions, record.times, request.request_time, len(rows)
        )
        return Features(
            context=rows,
            candidate_state=state.to_array(self.schema.epoch),
            candidates=np.empty(0, dtype=np.int64) if request.candidates is None else request.candidates,
            strategy=request.strategy,
            top_k=request.top_k or 0,
            # Who asks for an engine by name takes part in no experiment.
            arm=self.arm(request.user_id) if request.strategy == AUTO else DEFAULT_ARM,
            labels=labels if len(items) else (*labels, COLD_START),
            deadline_ms=deadline_ms,
            request_id=request_id,
            trace=trace,
        )

    def _record(self, request: Request) -> tuple[UserRecord, tuple[str, ...]]:
        """The user's profile and events as of the request, the store's or what it brings along, and labels."""
        history = request.history
        if history is not None and request.profile.keys() >= self._profile_names:
            return UserRecord(request.profile, history.items, history.actions, history.times), ()
        labels: tuple[str, ...] = ()
        stored = UserRecord()
        try:
            stored = self.store.get(request.user_id) or stored
            labels = (STALE_FEATURES,) if stored.stale else ()
        except UnavailableError:
            labels = (FEATURES_UNAVAILABLE,)
        profile = {**stored.profile, **request.profile}
        if history is not None:
            return UserRecord(profile, history.items, history.actions, history.times), labels
        end = int(np.searchsorted(stored.times, request.request_time, side="left"))
        return UserRecord(profile, stored.items[:end], stored.actions[:end], stored.times[:end]), labels
