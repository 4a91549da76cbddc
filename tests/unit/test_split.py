"""The split keeps every event once, in order, and nothing simultaneous on both sides of a cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtgr.data.dataset import Interactions
from mtgr.data.split import chronological_split, history_bounds, leave_last_out
from mtgr.errors import ConfigurationError

# Few distinct times make ties common.
rows_strategy = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), max_size=120).map(sorted)
fractions = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.45])


def table(rows: list[tuple[int, int]]) -> Interactions:
    array = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return Interactions(array[:, 0].copy(), np.arange(len(rows)), np.zeros(len(rows), np.int32), array[:, 1].copy())


def times(*seconds: int) -> Interactions:
    return table([(0, second) for second in seconds])


def parts(events: Interactions, validation: float = 0.1, test: float = 0.1) -> str:
    """One letter an event: r train, v validation, t test."""
    split = chronological_split(events, int(events.user.max()) + 1, validation, test)
    return "".join(
        "r" if r else "v" if v else "t" for r, v, _ in zip(split.train, split.validation, split.test, strict=True)
    )


@given(rows_strategy, fractions, fractions)
def test_partition_order_and_ties(rows: list[tuple[int, int]], validation: float, test: float) -> None:
    events = table(rows)
    split = chronological_split(events, 5, validation, test)
    assert np.array_equal(split.train.astype(int) + split.validation + split.test, np.ones(len(rows)))
    for user in range(4):
        mine = events.user == user
        n, seconds = int(mine.sum()), len(set(events.time[mine].tolist()))
        by_part = [events.time[mine & mask] for mask in (split.train, split.validation, split.test)]
        filled = [part for part in by_part if len(part)]
        for earlier, later in itertools.pairwise(filled):
            assert earlier.max() < later.min()
        assert n == 0 or len(by_part[0]) > 0
        held_out = [int(n * validation + 1e-9), int(n * test + 1e-9)]
        if seconds == 1:
            assert len(by_part[0]) == n
        elif seconds >= 3:
            assert [len(part) > 0 for part in by_part[1:]] == [count > 0 for count in held_out]
        elif held_out[1] > 0:
            assert (len(by_part[1]), len(by_part[2]) > 0) == (0, True)


@given(st.integers(1, 80), fractions, fractions)
def test_sizes_are_exact_without_ties(n: int, validation: float, test: float) -> None:
    split = chronological_split(times(*range(n)), 1, validation, test)
    assert split.test.sum() == int(n * test + 1e-9)
    if n >= 3:
        assert split.validation.sum() == int(n * validation + 1e-9)


def test_cuts_move_back_to_the_first_event_of_their_second() -> None:
    assert parts(times(0, 1, 2, 3, 4, 5, 6, 7, 8, 9)) == "rrrrrrrrvt"
    assert parts(times(0, 1, 2, 3, 4, 5, 6, 7, 7, 7)) == "rrrrrrvttt"
    assert parts(times(0, 1, 2, 3, 4, 5, 6, 6, 6, 7)) == "rrrrrrvvvt"


def test_a_cut_never_empties_an_earlier_part() -> None:
    assert parts(times(0, 1, 2, 2, 2, 2, 2, 2, 2, 2)) == "rvtttttttt"
    assert parts(times(0, *[1] * 18, 2)) == "r" + "v" * 18 + "t"
    assert parts(times(0, 0, 0, 0, 0, 0, 0, 0, 1, 2)) == "rrrrrrrrvt"
    assert parts(times(0, 0, 0, 0, 0, 0, 0, 1, 1, 1)) == "rrrrrrrttt"
    assert parts(times(4, 4, 4, 4, 4, 4, 4, 4, 4, 4)) == "rrrrrrrrrr"
    assert parts(times(0, 0, 0, 0, 0, 0, 0, 0, 0, 1), test=0.0) == "rrrrrrrrrv"


def test_users_are_cut_one_by_one() -> None:
    events = table([(0, t) for t in range(10)] + [(2, t) for t in range(1000, 1004)] + [(3, t) for t in range(20)])
    assert parts(events) == "rrrrrrrrvt" + "rrrr" + "r" * 16 + "vvtt"


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.1), (0.1, -0.1), (0.5, 0.5)])
def test_bad_fractions(validation: float, test: float) -> None:
    with pytest.raises(ConfigurationError, match="fraction"):
        chronological_split(times(0, 1), 1, validation, test)


def test_unsorted_events_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="sorted"):
        chronological_split(times(1, 0), 1)


@given(rows_strategy)
def test_leave_last_out_equals_a_loop(rows: list[tuple[int, int]]) -> None:
    events = table(rows)
    expected = []
    for user in range(4):
        mine = np.flatnonzero(events.user == user)
        if len(mine) and events.time[mine[0]] < events.time[mine[-1]]:
            expected.append(int(mine[-1]))
    assert leave_last_out(events, 5).tolist() == expected


@given(rows_strategy, st.lists(st.tuples(st.integers(0, 6), st.integers(-5, 40)), max_size=10))
def test_history_is_strictly_earlier(rows: list[tuple[int, int]], queries: list[tuple[int, int]]) -> None:
    events = table(rows)
    wanted = np.array(queries, dtype=np.int64).reshape(-1, 2)
    start, end = history_bounds(events, wanted[:, 0], wanted[:, 1])
    for (user, time), a, b in zip(queries, start, end, strict=True):
        expected = np.flatnonzero((events.user == user) & (events.time < time))
        assert np.arange(a, b).tolist() == expected.tolist()
