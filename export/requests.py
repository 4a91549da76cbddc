"""Requests of real users to calibrate and to check artifacts with, where the checkpoint's dataset is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mtgr.checkpoint import Checkpoint
from mtgr.data.registry import DATASETS
from mtgr.errors import MTGRError
from mtgr.features.candidates import candidate_rows
from mtgr.features.context import context_rows
from mtgr.features.state import build_candidate_state
from mtgr.training.prepare import PreparedData, prepare

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_CALIBRATION_SHARE = 8  # of a user's known events the last eighth are what a calibration request asks for


@dataclass(frozen=True)
class LabelledRequest:
    """A user as a server would meet them at some moment, and what they did from then on.

    Attributes:
        context: INT32 [1, n, W].
        candidates: INT32 [1, k, W]: what the user did afterwards.
        labels: INT8 [k, T].
    """

    context: Int32Array
    candidates: Int32Array
    labels: npt.NDArray[np.int8]


@dataclass(frozen=True)
class RealRequests:
    """Requests of a dataset's users.

    Attributes:
        calibration: Whose candidates are the last of a user's known events (the validation part): no held-out event is
            in them, so that no figure is taken on what an artifact was calibrated with.
        held_out: Whose candidates are the held-out events.
    """

    calibration: Sequence[LabelledRequest] = ()
    held_out: Sequence[LabelledRequest] = ()


def real_requests(checkpoint: Checkpoint, count: int = 200, seed: int = 0, at_least: int = 8) -> RealRequests:
    """Requests of random users of the checkpoint's dataset.

    Args:
        checkpoint: Trained on the dataset that its record names.
        count: Most users that are checked; a quarter as many others calibrate.
        seed: Of the choice of users.
        at_least: Fewest candidates of a held-out request: with few, one swap decides a rank correlation.

    Returns:
        None of either if the dataset is not known, not at hand, or not the one that the checkpoint was trained on.
    """
    schema, name = checkpoint.schema, checkpoint.record.get("dataset")
    if name not in DATASETS:
        return RealRequests()
    try:
        data = _prepared(name, schema.max_history, schema.realtime_step)
    except (MTGRError, OSError):
        return RealRequests()
    if data.catalog.hash != checkpoint.catalog.hash or data.schema.task_names != schema.task_names:
        return RealRequests()
    held_out = np.bincount(data.interactions.user[~data.known], minlength=len(data.users))
    users = np.random.default_rng(seed).permutation(np.flatnonzero(held_out >= at_least)).tolist()
    chosen, others = users[:count], users[count : count + max(1, count // 4)]
    return RealRequests(
        [_request(checkpoint, data, user, *_last_known(data, user)) for user in others],
        [_request(checkpoint, data, user, *_held_out(data, user)) for user in chosen],
    )


@lru_cache(maxsize=1)  # one export checks several artifacts
def _prepared(name: str, max_history: int, realtime_step: int) -> PreparedData:
    entry = DATASETS[name]
    return prepare(entry.factory(), entry.liked_action, max_history=max_history, realtime_step=realtime_step)


def _held_out(data: PreparedData, user: int) -> tuple[Int64Array, Int64Array]:
    mine = _events(data, user)
    return mine[data.known[mine]], mine[~data.known[mine]]


def _last_known(data: PreparedData, user: int) -> tuple[Int64Array, Int64Array]:
    known, _ = _held_out(data, user)
    times = data.interactions.time[known]
    cut = int(np.searchsorted(times, times[-max(1, len(known) // _CALIBRATION_SHARE)]))
    return known[:cut], known[cut:]


def _events(data: PreparedData, user: int) -> Int64Array:
    start, end = data.interactions.offsets(len(data.users))[user : user + 2]
    return np.arange(start, end)


def _request(
    checkpoint: Checkpoint, data: PreparedData, user: int, before: Int64Array, after: Int64Array
) -> LabelledRequest:
    schema, catalog, log = checkpoint.schema, checkpoint.catalog, data.interactions
    items = catalog.to_internal(log.item[before])
    context = context_rows(schema, data.users[user].profile, items, log.action[before], log.time[before])
    state = build_candidate_state(
        schema, catalog, items, log.action[before], log.time[before], int(log.time[after[0]]), len(context)
    )
    candidates = candidate_rows(schema, catalog, state, catalog.to_internal(log.item[after]))
    labels = np.stack([data.labels[task][after] for task in schema.task_names], axis=-1)
    return LabelledRequest(context[None], candidates[None], labels)
