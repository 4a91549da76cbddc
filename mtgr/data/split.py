"""Where training ends and evaluation begins, user by user.

The cut is per user, not at one date for all. Half of MovieLens-100K's users are active for less than an hour and
most never return: of 943 users only 109 have ratings on both sides of a global cut after 80 % of the events, and they
make 15 % of the events behind it. Evaluation would be on strangers without a history. The price is that one user's
training events may be later than another's test events; no user's own future is ever in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mtgr.data.dataset import BoolArray, Int64Array, Interactions
from mtgr.errors import ConfigurationError

Protocol = Literal["chronological", "leave-one-out", "temporal"]


@dataclass(frozen=True)
class Split:
    """Which events belong to which part; every event belongs to exactly one.

    Attributes:
        train: BOOL [E].
        validation: BOOL [E], after the user's training events.
        test: BOOL [E], after the user's validation events.
    """

    train: BoolArray
    validation: BoolArray
    test: BoolArray


def chronological_split(
    interactions: Interactions, num_users: int, validation_fraction: float = 0.1, test_fraction: float = 0.1
) -> Split:
    """Cut every user's events, in their order, into train, validation, and test.

    Nothing simultaneous with a held-out event stays on the earlier side: a cut that falls among events of one
    second moves back to the first of them, so times rise strictly over every cut and held-out parts can be
    larger than their fraction. A user with n events holds out floor(n x fraction) events or more for each
    part, none where that is 0. A cut never moves back so far that an earlier part becomes empty while the
    user's seconds suffice: of three or more distinct seconds each part gets one, of two the first is train
    and the second test, and a user whose events are all of one second is train.

    Raises:
        ConfigurationError: Fractions are negative or sum to 1 or more, or the events are not sorted by (user,
            time).
    """
    if min(validation_fraction, test_fraction) < 0 or validation_fraction + test_fraction >= 1:
        raise ConfigurationError("Give a validation and a test fraction of 0 or more that sum to less than 1.")
    check_sorted(interactions)
    num_events = len(interactions)
    offsets = interactions.offsets(num_users)
    first, past = offsets[:-1], offsets[1:]
    count = past - first
    # The small term keeps 0.29 x 100, which is 28.999..., at 29.
    num_validation = np.floor(count * validation_fraction + 1e-9).astype(np.int64)
    num_test = np.floor(count * test_fraction + 1e-9).astype(np.int64)

    # A second is a run of events of one user and time.
    is_second = _starts_a_second(interactions)
    seconds = np.flatnonzero(is_second)
    second_of_event = np.cumsum(is_second) - 1
    first_second = np.searchsorted(seconds, first)
    num_seconds = np.searchsorted(seconds, past) - first_second
    starts = np.append(seconds, num_events)

    def cut(end: Int64Array, held_out: Int64Array, least_seconds: Int64Array) -> Int64Array:
        """The start of the second of event ``end - held_out``, but ``least_seconds`` seconds stay before."""
        nominal = np.minimum(np.maximum(end - held_out, first), max(num_events - 1, 0))
        second = second_of_event[nominal] if num_events else nominal
        moved = starts[np.maximum(second, np.minimum(first_second + least_seconds, len(seconds)))]
        return np.where(held_out > 0, moved, end)

    wants_validation = (num_validation > 0) & (num_seconds >= 3)
    test_start = cut(past, num_test, np.where(wants_validation, 2, 1))
    num_validation = np.where((num_test > 0) & ~wants_validation, 0, num_validation)
    validation_start = cut(test_start, num_validation, np.ones_like(count))

    index = np.arange(num_events)
    in_validation = index >= validation_start[interactions.user]
    in_test = index >= test_start[interactions.user]
    return Split(~in_validation, in_validation & ~in_test, in_test)


def split_by(
    protocol: Protocol, interactions: Interactions, num_users: int, validation_fraction: float, test_fraction: float
) -> Split:
    """The split that ``protocol`` asks for: one of the functions of this file.

    Raises:
        ConfigurationError: If the protocol is unknown, or as the function says.
    """
    if protocol == "chronological":
        return chronological_split(interactions, num_users, validation_fraction, test_fraction)
    if protocol == "leave-one-out":
        return leave_one_out_split(interactions, num_users)
    if protocol == "temporal":
        return temporal_split(interactions, validation_fraction, test_fraction)
    raise ConfigurationError(f"there is no protocol {protocol!r}; use chronological, leave-one-out or temporal.")


def leave_one_out_split(interactions: Interactions, num_users: int) -> Split:
    """Each user's last event is test, the one before it validation, all earlier ones train.

    This is the protocol of the published tables (SASRec, HSTU): Meta's generative-recommenders trains on all but the
    last event, and so does a model that is fitted on train and validation. The order is the table's, events of one
    second included, as there. A user's only event is train, of two the second is test.

    Raises:
        ConfigurationError: The events are not sorted by (user, time).
    """
    check_sorted(interactions)
    past = interactions.offsets(num_users)[1:][interactions.user]
    left = past - np.arange(len(interactions))  # 1 for a user's last event
    count = np.bincount(interactions.user, minlength=num_users)[interactions.user]
    test = (left == 1) & (count >= 2)
    validation = (left == 2) & (count >= 3)
    return Split(~test & ~validation, validation, test)


def temporal_split(interactions: Interactions, validation_fraction: float = 0.1, test_fraction: float = 0.1) -> Split:
    """Cut the whole log at two moments that are the same for all users.

    Everything that trains is earlier than everything that is scored, as in production; users who come only after a
    cut are scored on no history. A cut that falls among events of one second moves back to the first of them.

    Raises:
        ConfigurationError: Fractions are negative or sum to 1 or more, or the events are not sorted by (user,
            time).
    """
    if min(validation_fraction, test_fraction) < 0 or validation_fraction + test_fraction >= 1:
        raise ConfigurationError("Give a validation and a test fraction of 0 or more that sum to less than 1.")
    check_sorted(interactions)
    times = np.sort(interactions.time)

    def moment(held_out: float) -> float:
        """The time from which on at least a share ``held_out`` of the events lies."""
        count = int(np.floor(len(times) * held_out + 1e-9))
        return float(times[len(times) - count]) if count else np.inf

    validation_start, test_start = moment(validation_fraction + test_fraction), moment(test_fraction)
    test = interactions.time >= test_start
    validation = ~test & (interactions.time >= validation_start)
    return Split(~test & ~validation, validation, test)


def leave_last_out(interactions: Interactions, num_users: int, by_order: bool = False) -> Int64Array:
    """The index of each user's last event, for users who have an event strictly before it: INT64 [N], ascending.

    Of several events in a user's last second it is the last in the table's order; the others are neither
    history nor target. With ``by_order`` they are history, and any user with two events has a last one.
    """
    check_sorted(interactions)
    offsets = interactions.offsets(num_users)
    last = (offsets[1:] - 1)[offsets[1:] > offsets[:-1]]
    if by_order:
        followed: Int64Array = last[last > offsets[interactions.user[last]]]
        return followed
    start, end = history_bounds(interactions, interactions.user[last], interactions.time[last])
    return last[end > start]


def history_bounds(interactions: Interactions, user: Int64Array, before: Int64Array) -> tuple[Int64Array, Int64Array]:
    """What is known of users at given times: their events strictly before them.

    Args:
        interactions: Events sorted by (user, time).
        user: INT64 [N], user indices.
        before: INT64 [N], unix seconds.

    Returns:
        INT64 [N] starts and ends: the history of query i is the events ``start[i]:end[i]``, empty for an
        unknown user.
    """
    if len(interactions) == 0:
        empty = np.zeros(len(user), dtype=np.int64)
        return empty, empty.copy()
    start = np.searchsorted(interactions.user, user).astype(np.int64)
    # One sortable key per (user, time): times are shifted to 0.. and clipped to the log's span.
    epoch = int(interactions.time.min())
    span = int(interactions.time.max()) - epoch + 2
    keys = interactions.user * span + (interactions.time - epoch)
    end = np.searchsorted(keys, user * span + np.clip(before - epoch, 0, span - 1)).astype(np.int64)
    return start, end


def check_sorted(interactions: Interactions) -> None:
    """Raise ConfigurationError unless the events are sorted by (user, time)."""
    user, time = interactions.user, interactions.time
    if np.any(user[1:] < user[:-1]) or np.any((user[1:] == user[:-1]) & (time[1:] < time[:-1])):
        raise ConfigurationError("Interactions must be sorted by user and time: sort them first.")


def _starts_a_second(interactions: Interactions) -> BoolArray:
    """BOOL [E]: the event is the first of its user and time."""
    changed = (interactions.user[1:] != interactions.user[:-1]) | (interactions.time[1:] != interactions.time[:-1])
    return np.concatenate([np.ones(min(len(interactions), 1), dtype=np.bool_), changed])
