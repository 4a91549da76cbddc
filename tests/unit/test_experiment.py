"""Arms: by weight, sticky, and few users move when weights change."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtgr.errors import ConfigurationError
from mtgr.routing.experiment import Arm, Experiment, Shadow

USERS = [f"user-{index}" for index in range(20_000)]
weights = st.lists(st.floats(0.05, 10), min_size=2, max_size=4)


def experiment(values: list[float], name: str = "test") -> Experiment:
    return Experiment(name, tuple(Arm(f"arm-{index}", weight) for index, weight in enumerate(values)))


@settings(max_examples=8, deadline=None)
@given(values=weights)
def test_users_are_divided_by_weight(values: list[float]) -> None:
    found = [experiment(values).assign(user).name for user in USERS]
    for index, weight in enumerate(values):
        share = weight / sum(values)
        margin = 5 * math.sqrt(share * (1 - share) / len(USERS))
        assert abs(found.count(f"arm-{index}") / len(USERS) - share) <= margin


@settings(max_examples=5, deadline=None)
@given(values=weights, factor=st.floats(0.2, 5))
def test_a_changed_weight_moves_users_to_or_from_that_arm_alone(values: list[float], factor: float) -> None:
    before, after = experiment(values), experiment([values[0] * factor, *values[1:]])
    for user in USERS[:4000]:
        old, new = before.assign(user).name, after.assign(user).name
        if old != new:
            assert (new if factor > 1 else old) == "arm-0"


def test_a_user_stays_where_she_is() -> None:
    one, same = experiment([1, 2]), experiment([1, 2])
    assert [one.assign(user) for user in USERS[:1000]] == [same.assign(user) for user in USERS[:1000]]


def test_another_experiment_divides_anew() -> None:
    """Knowing a user's side in one says nothing about the other."""
    first, second = experiment([1, 1], "first"), experiment([1, 1], "second")
    together = sum(first.assign(user).name == second.assign(user).name for user in USERS)
    assert abs(together / len(USERS) - 0.5) <= 5 * math.sqrt(0.25 / len(USERS))


def test_an_arm_without_weight_gets_nobody() -> None:
    assert {experiment([1, 0]).assign(user).name for user in USERS[:1000]} == {"arm-0"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: experiment([1]), "two or more arms"),
        (lambda: Experiment("x", (Arm("a"), Arm("a"))), "different names"),
        (lambda: experiment([0, 0]), "no arm has a weight above 0"),
        (lambda: Arm("a", -1), "weight is -1"),
        (lambda: Arm("a", float("nan")), "weight is nan"),
        (lambda: Arm("a b"), "a name must be"),
        (lambda: Arm("a", strategy="gpu"), "strategy is 'gpu'"),
        (lambda: Arm("a", version=0), "version is 0"),
        (lambda: Shadow("auto", 0.1), "strategy is 'auto'"),
        (lambda: Shadow("onnx", 1.1), "share is 1.1"),
    ],
)
def test_wrong_settings_are_refused(make: object, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()  # type: ignore[operator]
