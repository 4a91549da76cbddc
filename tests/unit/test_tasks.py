"""Labels of the three tasks, the vectorised retention against a loop over events."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtgr.data.dataset import Interactions
from mtgr.data.tasks import engagement, label_all, monetization, retention
from mtgr.errors import ConfigurationError


def table(rows: list[tuple[int, int]], actions: list[int] | None = None) -> Interactions:
    """Events from (user, time) rows."""
    user, time = (np.array(column, dtype=np.int64) for column in (zip(*rows, strict=True) if rows else ([], [])))
    action = np.array(actions if actions is not None else [0] * len(rows), dtype=np.int32)
    return Interactions(user, np.arange(len(rows)), action, time)


def test_engagement_and_monetization_are_thresholds() -> None:
    events = table([(0, t) for t in range(5)], [0, 1, 2, 3, 4])
    assert engagement(3).label(events).tolist() == [0, 0, 0, 1, 1]
    assert monetization(4).label(events).tolist() == [0, 0, 0, 0, 1]
    assert engagement(3).label(events).dtype == np.int8


def test_retention_needs_a_gap_longer_than_an_hour() -> None:
    events = table([(0, 0), (0, 3600), (1, 0), (1, 3601), (2, 0), (7, 10), (7, 5000), (7, 9000)])
    assert retention().label(events).tolist() == [0, 0, 1, 0, 0, 1, 1, 0]


def test_retention_of_a_part_is_censored_at_its_end() -> None:
    events = table([(0, 0), (0, 10_000)])
    assert retention().label(events).tolist() == [1, 0]
    assert retention().label(events.take(np.array([0]))).tolist() == [0]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), max_size=40))
def test_retention_equals_a_loop(rows: list[tuple[int, int]]) -> None:
    events = table(sorted(rows))
    expected = [
        any(
            events.user[j] == events.user[i] and events.time[j] - events.time[j - 1] > 5
            for j in range(i + 1, len(rows))
            if events.user[j - 1] == events.user[i]
        )
        for i in range(len(rows))
    ]
    labels = retention(5).label(events)
    assert labels.dtype == np.int8
    assert labels.tolist() == [int(y) for y in expected]


def test_retention_refuses_unsorted_events() -> None:
    with pytest.raises(ConfigurationError, match="sorted"):
        retention().label(table([(0, 5), (0, 1)]))
    with pytest.raises(ConfigurationError, match="sorted"):
        retention().label(table([(1, 0), (0, 1)]))


def test_definitions_are_one_line_and_a_proxy_says_so() -> None:
    tasks = (engagement(3), retention(60), monetization(4))
    assert [task.name for task in tasks] == ["engagement", "retention", "monetization"]
    assert all(task.definition and "\n" not in task.definition for task in tasks)
    assert "60 s" in tasks[1].definition
    assert "proxy" in tasks[2].definition
    assert engagement(3, "clicked").definition == "clicked"


def test_label_all_is_keyed_by_name() -> None:
    events = table([(0, 0), (0, 9000)], [3, 4])
    labels = label_all((engagement(3), retention(), monetization(4)), events)
    assert {name: y.tolist() for name, y in labels.items()} == {
        "engagement": [1, 1],
        "retention": [1, 0],
        "monetization": [0, 1],
    }
