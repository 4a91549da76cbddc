"""A user's record with random events, and whether two are equal."""

from __future__ import annotations

import numpy as np

from mtgr.features.store import UserRecord


def record(events: int, seed: int = 0) -> UserRecord:
    generator = np.random.default_rng(seed)
    return UserRecord(
        {"age": 30, "score": 1.5, "gender": "Ü"},
        generator.integers(-(2**62), 2**62, events),
        generator.integers(0, 5, events).astype(np.int32),
        np.sort(generator.integers(0, 2**34, events)),
    )


def assert_equal(found: UserRecord | None, expected: UserRecord) -> None:
    assert found is not None
    assert found.profile == expected.profile
    for name, dtype in (("items", np.int64), ("actions", np.int32), ("times", np.int64)):
        array = getattr(found, name)
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, getattr(expected, name))
