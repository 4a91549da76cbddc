"""The three targets: engagement, retention, and monetization.

Labels are computed on the interactions a viewer may know of. Training passes only the training part of the
log, so that no label peeks past a user's cut; evaluation passes the whole log and then takes the labels of
the events it scores. The two differ for retention alone, whose label lies in the future of its event: the
last training session of a user who came back after the cut is 0 in training and 1 in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mtgr.data.dataset import Int8Array, Interactions, Task
from mtgr.data.split import check_sorted

SESSION_GAP_SECONDS = 3600


def engagement(min_action: int, definition: str | None = None) -> Task:
    """The user liked the item: label 1 if the event's action is at least ``min_action``."""

    def label(interactions: Interactions) -> Int8Array:
        return (interactions.action >= min_action).astype(np.int8)

    return Task("engagement", definition or f"the action is {min_action} or higher", label)


def retention(gap_seconds: int = SESSION_GAP_SECONDS) -> Task:
    """The user comes back: label 1 if the user is active again in a later session.

    A session ends where the user's next event is more than ``gap_seconds`` away, so the label is 1 for every
    event outside the user's last session in the table given. Events must be sorted by (user, time);
    ConfigurationError otherwise.
    """

    def label(interactions: Interactions) -> Int8Array:
        check_sorted(interactions)
        user, time = interactions.user, interactions.time
        other_user = user[1:] != user[:-1]
        starts_session = np.append(False, ~other_user & (time[1:] - time[:-1] > gap_seconds))[: len(user)]
        # Users are numbered by their order in the table: it may hold a single user with a large index.
        ordinal = np.cumsum(np.append(0, other_user))[: len(user)]
        session_start = np.flatnonzero(starts_session)
        last_start = np.full(len(user), -1, dtype=np.int64)
        np.maximum.at(last_start, ordinal[session_start], session_start)
        labels: Int8Array = (np.arange(len(user)) < last_start[ordinal]).astype(np.int8)
        return labels

    return Task("retention", f"the user is active again after a pause of more than {gap_seconds} s", label, True)


def monetization(min_action: int, definition: str | None = None) -> Task:
    """The user would pay: label 1 if the event's action is at least ``min_action``.

    A data set without purchases has to state a proxy; its ``definition`` should say so.
    """

    def label(interactions: Interactions) -> Int8Array:
        return (interactions.action >= min_action).astype(np.int8)

    return Task("monetization", definition or f"proxy: the action is {min_action} or higher", label)


def label_all(tasks: Iterable[Task], interactions: Interactions) -> dict[str, Int8Array]:
    """INT8 [E] labels of every task by its name, on the interactions the viewer may know of."""
    return {task.name: task.label(interactions) for task in tasks}
