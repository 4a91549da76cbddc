"""The feature store as an interface: who a user is and what the user did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from mtgr.errors import InvalidRequestError, UnavailableError
from mtgr.features.context import boundary
from mtgr.schema import Schema

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Listener = Callable[[str | None], None]

_INT32_MAX = np.iinfo(np.int32).max
# Times from here on are taken for milliseconds, as in requests.
_MIN_MILLISECONDS = 100_000_000_000


class DamagedRecordError(UnavailableError):
    """The store answers, but what it holds of this one user cannot be read."""


@dataclass(frozen=True)
class UserRecord:
    """What is stored of one user.

    Attributes:
        profile: Profile values by field name.
        items: INT64 [E], raw item ids, ascending in time.
        actions: INT32 [E], actions from 0.
        times: INT64 [E], unix seconds.
        stale: Whether this is an earlier answer, given because the store could not be asked.
    """

    profile: Mapping[str, str | float] = field(default_factory=dict)
    items: Int64Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    actions: Int32Array = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    times: Int64Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    stale: bool = False


@dataclass(frozen=True)
class HistoryLimit:
    """How many events of a user are kept: S at its longest and a full R, ``max_history + realtime_step - 1``.

    Attributes:
        max_history: Longest segment S, in events.
        realtime_step: R_max, in events.
    """

    max_history: int
    realtime_step: int

    @classmethod
    def of(cls, schema: Schema) -> HistoryLimit:
        """The limit that loses nothing of a context's rows."""
        return cls(schema.max_history, schema.realtime_step)

    @property
    def max_events(self) -> int:
        """Most events that are kept."""
        return self.max_history + self.realtime_step - 1

    def dropped(self, num_events: int) -> int:
        """Oldest events to drop out of ``num_events``: a multiple of ``realtime_step``.

        By such a multiple S and R still meet where they would have met without trimming, so rows stay the same.
        """
        return max(0, boundary(num_events, self.realtime_step) - self.max_history)


class UserSource(Protocol):
    """Where feature extraction gets users from."""

    def get(self, user_id: str) -> UserRecord | None:
        """The record of a user, or None if the user is not known.

        Raises:
            UnavailableError: If the store cannot answer now.
        """


class FeatureStore(UserSource, Protocol):
    """Users by id. All methods may be called from several threads, and raise UnavailableError like ``get``."""

    def get_many(self, user_ids: Sequence[str]) -> list[UserRecord | None]:
        """Records in the order of ``user_ids``, None for users that are not known."""

    def put_user(self, user_id: str, record: UserRecord) -> None:
        """Replace all that is stored of a user, or add the user."""

    def put_many(self, records: Iterable[tuple[str, UserRecord]]) -> None:
        """``put_user`` for each record, all in one exchange."""

    def append_events(self, user_id: str, items: npt.ArrayLike, actions: npt.ArrayLike, times: npt.ArrayLike) -> None:
        """Add events of a user, known or new, all of them or none; drop the oldest beyond the limit.

        They may come in any order: records are ordered by (time, arrival).

        Args:
            user_id: The user.
            items: Integers [E], raw item ids.
            actions: Integers [E], actions from 0.
            times: Integers [E], unix seconds.

        Raises:
            InvalidRequestError: If the lengths differ or a value is out of range.
        """

    def user_ids(self) -> list[str]:
        """All known users."""

    def subscribe(self, listener: Listener) -> None:
        """Call ``listener(user_id)`` from another thread after every change, by whatever process.

        ``listener(None)`` says that any user may have changed, for example after changes were missed.
        """

    def close(self) -> None:
        """Let go of files and connections, and end calls of listeners."""


def checked_events(items: npt.ArrayLike, actions: npt.ArrayLike, times: npt.ArrayLike) -> UserRecord:
    """Events to append, as a record without a profile.

    Raises:
        InvalidRequestError: If they are no integers, the lengths differ, or a value is out of range.
    """
    arrays = [np.atleast_1d(np.asarray(values)) for values in (items, actions, times)]
    if any(array.ndim != 1 or (array.size and array.dtype.kind not in "iu") for array in arrays):
        raise InvalidRequestError("items, actions, and times must each be a list of integers.")
    if len({len(array) for array in arrays}) != 1:
        lengths = ", ".join(str(len(array)) for array in arrays)
        raise InvalidRequestError(f"items, actions, times have lengths {lengths}; they must be equal.")
    limits = (
        ("items", np.iinfo(np.int64).max, "item ids"),
        ("actions", _INT32_MAX, "actions"),
        ("times", _MIN_MILLISECONDS - 1, "unix seconds, not milliseconds,"),
    )
    for (name, high, what), array in zip(limits, arrays, strict=True):
        wrong = (array < 0) | (array > high)
        if wrong.any():
            index = int(wrong.argmax())
            raise InvalidRequestError(
                f"{name} holds {array[index]} at index {index}; {what} must be between 0 and {high}."
            )
    return UserRecord({}, arrays[0].astype(np.int64), arrays[1].astype(np.int32), arrays[2].astype(np.int64))


def merged(records: Sequence[UserRecord], limit: HistoryLimit | None) -> UserRecord:
    """One record out of several, the first one's profile; ordered by (time, arrival) and trimmed.

    Args:
        records: One or more, in the order of their arrival.
        limit: Events to keep; None keeps all.
    """
    first = records[0]
    if len(records) > 1:
        items, actions, times = (
            np.concatenate([getattr(record, name) for record in records]) for name in ("items", "actions", "times")
        )
    else:
        items, actions, times = first.items, first.actions, first.times
    if (times[1:] < times[:-1]).any():
        order = np.argsort(times, kind="stable")
        items, actions, times = items[order], actions[order], times[order]
    start = 0 if limit is None else limit.dropped(len(times))
    return UserRecord(first.profile, items[start:], actions[start:], times[start:])


def redacted(url: str) -> str:
    """A URL without user, password, and options, for messages."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
