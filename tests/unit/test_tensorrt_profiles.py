"""Optimization profiles of plans: exactly one for each shape that the router pads to, or one for all batches."""

from __future__ import annotations

from typing import Any

import pytest

from export.tensorrt_profiles import MAX_BATCH, MIN_LONGEST, bucket_profiles
from mtgr.errors import ConfigurationError
from mtgr.routing.buckets import CANDIDATE_BUCKETS, CONTEXT_BUCKETS, bucket
from tests.unit.fake_tensorrt import in_profile

RANK = {"context": (-1, -1, 12), "candidates": (-1, -1, 12)}


@pytest.mark.parametrize("max_context", [20, 512, 1003, 2048, 5000])
def test_every_padded_shape_has_exactly_one_profile(max_context: int) -> None:
    profiles = bucket_profiles(RANK, max_context)
    longest = bucket(max_context, CONTEXT_BUCKETS)
    contexts = [size for size in CONTEXT_BUCKETS if size <= longest] + [longest]
    for batch in range(1, MAX_BATCH + 1):
        for context in contexts:
            for candidates in CANDIDATE_BUCKETS:
                shapes = {"context": (batch, context, 12), "candidates": (batch, candidates, 12)}
                assert [in_profile(profile, shapes) for profile in profiles] == [batch == 1, batch > 1]
    for profile in profiles:
        for name, (low, best, high) in profile.shapes.items():
            assert in_profile(profile, {**{key: value[0] for key, value in profile.shapes.items()}, name: best})
            assert low <= best <= high
    assert not in_profile(profiles[1], {"context": (33, 64, 12), "candidates": (33, 16, 12)})


def test_fixed_axes_stay_fixed() -> None:
    one = bucket_profiles({"context": (-1, 512, 12), "candidates": (-1, 64, 12)}, 2048)
    assert [profile.shapes["context"] for profile in one] == [
        ((1, 512, 12), (1, 512, 12), (1, 512, 12)),
        ((2, 512, 12), (8, 512, 12), (32, 512, 12)),
    ]
    assert bucket_profiles({"context": (1, 512, 12)}, 2048) == ()
    lengths = bucket_profiles({"context": (4, -1, 12)}, 64)  # a fixed batch: one profile
    assert [profile.shapes["context"] for profile in lengths] == [((4, 64, 12), (4, 512, 12), (4, MIN_LONGEST, 12))]
    assert len(bucket_profiles(RANK, 512, max_batch=1)) == 1
    assert bucket_profiles(RANK, 512, max_batch=4)[1].shapes["context"][1][0] == 4


@pytest.mark.parametrize("inputs", [{"tokens": (-1, -1, 12)}, {"context": (-1, 12)}, {"context": (-1, -1, -1)}])
def test_other_graphs_are_refused(inputs: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="is not rows of tokens; export it with"):
        bucket_profiles(inputs, 512)


def test_one_profile_for_all_batches() -> None:
    (only,) = bucket_profiles(RANK, 512, split=False)
    assert only.shapes["context"] == ((1, 64, 12), (8, 512, 12), (MAX_BATCH, 1024, 12))
    assert bucket_profiles(RANK, 512, max_batch=1, split=False) == bucket_profiles(RANK, 512, max_batch=1)
    assert bucket_profiles(RANK, 512, max_batch=2)[1].shapes["context"][1][0] == 2
