"""Features in one tensor: what goes in comes out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mtgr.features.extract import Features
from mtgr.features.packing import pack, unpack

TEXTS = st.text(max_size=20)
INT32 = st.integers(-(2**31), 2**31 - 1)
FEATURES = st.builds(
    Features,
    context=hnp.arrays(np.int32, st.tuples(st.integers(0, 9), st.integers(1, 5)), elements=INT32),
    candidate_state=hnp.arrays(np.int32, st.integers(0, 9), elements=INT32),
    candidates=hnp.arrays(np.int64, st.integers(0, 9), elements=st.integers(-(2**63), 2**63 - 1)),
    strategy=TEXTS,
    top_k=st.integers(0, 2**31 - 1),
    arm=TEXTS,
    labels=st.lists(TEXTS, max_size=3).map(tuple),
    deadline_ms=st.integers(0, 2**53),
    request_id=TEXTS,
    trace=TEXTS,
)


@given(features=FEATURES)
def test_features_come_out_as_they_went_in(features: Features) -> None:
    packed = pack(features)
    assert packed.dtype == np.int32
    found = unpack(packed)
    for field in dataclasses.fields(Features):
        one, other = getattr(features, field.name), getattr(found, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other
    assert found.candidates.flags.aligned


@given(features=FEATURES, cut=st.integers(1, 40))
def test_what_was_not_packed_is_refused(features: Features, cut: int) -> None:
    packed = pack(features)
    with pytest.raises(ValueError, match="packed features"):
        unpack(packed[: max(0, len(packed) - cut)])
    with pytest.raises(ValueError, match="packed features"):
        unpack(np.append(packed, np.int32(0)))
    packed[0] += 1
    with pytest.raises(ValueError, match="packed features"):
        unpack(packed)
