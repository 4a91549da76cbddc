"""Raw ids to internal ones: by a table where ids lie close, by a search where they do not, with one result."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from mtgr.features.catalog import ItemCatalog
from mtgr.schema import FIRST_ID, UNKNOWN
from tests.unit.models import small_catalog

CATALOG = small_catalog()
INT64 = st.integers(-(2**63), 2**63 - 1)


def with_ids(ids: list[int]) -> ItemCatalog:
    return dataclasses.replace(CATALOG, raw_ids=np.array(ids, dtype=np.int64))


@given(
    ids=st.sets(st.integers(0, 60), min_size=1) | st.sets(INT64, min_size=1, max_size=20),
    asked=st.lists(st.integers(-5, 70) | INT64, max_size=30),
)
@example(ids={0, 1, 2}, asked=[-(2**63), 2**63 - 1, -1, 0, 2, 3])
@example(ids={2**63 - 2, 2**63 - 1}, asked=[-(2**63), 2**63 - 1, 0, 2**63 - 3])
@example(ids={-(2**63), 1 - 2**63}, asked=[-(2**63), 2**63 - 1, 0])
def test_ids_are_found_however_they_lie(ids: set[int], asked: list[int]) -> None:
    ordered = sorted(ids)
    found = with_ids(ordered).to_internal(np.array(asked, dtype=np.int64))
    assert found.dtype == np.int64
    assert found.tolist() == [ordered.index(raw) + FIRST_ID if raw in ids else UNKNOWN for raw in asked]


def test_far_apart_ids_make_no_table() -> None:
    assert with_ids([0, 10**15])._table is None
    assert with_ids(list(range(0, 400, 4)))._table is not None
