"""Features as one tensor: what ``mtgr_features`` gives ``mtgr_router``.

Each tensor costs either side a piece of shared memory, two copies and some bookkeeping, a tenth of a millisecond for
four of them, which one spares.
"""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt

from mtgr.features.extract import Features

Int32Array = npt.NDArray[np.int32]

_VERSION = 1
_HEADER = 6  # version, rows and columns of the context, length of the state, candidates, bytes of the plan


def pack(features: Features) -> Int32Array:
    """All of ``features`` in one INT32 [n]."""
    values = (
        features.strategy,
        features.top_k,
        features.arm,
        features.labels,
        features.deadline_ms,
        features.request_id,
        features.trace,
    )
    plan = json.dumps(values).encode()
    rows, width = features.context.shape
    state, candidates = len(features.candidate_state), len(features.candidates)
    padded = plan + b" " * (-len(plan) % 4)
    header = (_VERSION, rows, width, state, candidates, len(padded))
    # Candidates, of eight bytes, come right after the header, where they are aligned.
    return np.concatenate(
        [
            np.array(header, dtype=np.int32),
            features.candidates.view(np.int32),
            features.context.reshape(-1),
            features.candidate_state,
            np.frombuffer(padded, dtype=np.int32),
        ]
    )


def unpack(packed: Int32Array) -> Features:
    """The features that ``pack`` was given; their arrays are views.

    Raises:
        ValueError: If the array was not made by ``pack``.
    """
    if packed.ndim != 1 or len(packed) < _HEADER or packed[0] != _VERSION:
        raise ValueError("these are no packed features.")
    rows, width, state, candidates, plan = packed[1:_HEADER].tolist()
    first_row = _HEADER + 2 * candidates
    state_at = first_row + rows * width
    plan_at = state_at + state
    if min(rows, width, state, candidates, plan) < 0 or plan_at + plan // 4 != len(packed):
        raise ValueError("packed features have a wrong length.")
    strategy, top_k, arm, labels, *rest = json.loads(packed[plan_at:].tobytes())
    return Features(
        packed[first_row:state_at].reshape(rows, width),
        packed[state_at:plan_at],
        packed[_HEADER:first_row].view(np.int64),
        strategy,
        top_k,
        arm,
        tuple(labels),
        *rest,
    )
