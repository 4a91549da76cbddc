"""What a user did with the neighbours of candidates: by way of the known ones, and by a loop over all."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mtgr.features.candidates import seen_sums, similar_sums
from mtgr.features.catalog import SIMILARITY
from mtgr.features.state import NEVER, CandidateState, build_candidate_state
from tests.unit.models import EPOCH, small_catalog, small_schema

SCHEMA = small_schema()
GENERATOR = np.random.default_rng(3)
PLAIN = small_catalog()
CATALOG = dataclasses.replace(
    PLAIN,
    neighbours=GENERATOR.integers(0, PLAIN.num_items, (PLAIN.num_items, 7)).astype(np.int32),
    similarity=GENERATOR.integers(0, SIMILARITY + 1, (PLAIN.num_items, 7)).astype(np.int32),
)


def state_after(events: int) -> CandidateState:
    items = GENERATOR.integers(1, CATALOG.num_items, events)
    actions = GENERATOR.integers(0, SCHEMA.num_actions, events).astype(np.int32)
    times = np.sort(GENERATOR.integers(EPOCH, EPOCH + 10**6, events))
    return build_candidate_state(SCHEMA, CATALOG, items, actions, times, EPOCH + 2 * 10**6, events)


@pytest.mark.parametrize("events", [0, 1, 40])
def test_known_neighbours_are_all_that_counts(events: int) -> None:
    state = state_after(events)
    items = GENERATOR.integers(0, CATALOG.num_items, 25)
    last_times, found_events, found_surprise = seen_sums(CATALOG, items, state)
    of_item = np.zeros(CATALOG.num_items, dtype=np.int64)
    of_item[state.seen_items] = state.seen_events
    surprise = np.zeros((CATALOG.num_items, 2), dtype=np.int64)
    surprise[state.seen_items] = state.seen_surprise
    wanted = similar_sums(CATALOG.similarity[items], CATALOG.neighbours[items], of_item, surprise)
    np.testing.assert_array_equal(found_events, wanted[0])
    np.testing.assert_array_equal(found_surprise, wanted[1])
    assert found_events.dtype == found_surprise.dtype == np.int64
    known = dict(zip(state.seen_items.tolist(), state.seen_times.tolist(), strict=True))
    assert last_times.tolist() == [known.get(item, NEVER) for item in items.tolist()]
