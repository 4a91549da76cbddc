"""Arms: by weight, sticky, and few users move when weights change."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
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


@settings(max_examples=5, deadline=None)
@given(before=st.lists(st.floats(0.05, 10), min_size=4, max_size=4), data=st.data())
def test_changed_weights_move_as_few_users_as_can_be(before: list[float], data: st.DataObject) -> None:
    """At most 2d / (1 + d) of them where shares differ by d; exactly d where one weight changes."""
    after = data.draw(st.lists(st.floats(0.05, 10), min_size=4, max_size=4))
    for values, share in ((after, None), ([after[0], *before[1:]], 1)):
        one, other = (np.array(weights) / sum(weights) for weights in (before, values))
        distance = np.abs(one - other).sum() / 2
        bound = distance if share else 2 * distance / (1 + distance)
        old, new = experiment(before), experiment(values)
        moved = np.mean([old.assign(user) is not old.arm(new.assign(user).name) for user in USERS[:5000]])
        assert moved <= bound + 5 * math.sqrt(0.25 / 5000)


def test_arms_come_and_go_without_the_others_noticing() -> None:
    three, two = experiment([1, 2, 3]), experiment([1, 2])
    reordered = Experiment("test", three.arms[::-1])
    for user in USERS[:5000]:
        arm = three.assign(user).name
        assert reordered.assign(user).name == arm
        assert arm == "arm-2" or two.assign(user).name == arm


def test_a_hundred_thousand_users_come_out_even() -> None:
    users = [f"{index:x}" for index in range(100_000)]
    counts = Counter(experiment([90, 9, 1]).assign(user).name for user in users)
    chi_square = sum((counts[f"arm-{i}"] - share) ** 2 / share for i, share in enumerate((90_000, 9_000, 1_000)))
    assert chi_square < 20.7  # of two degrees of freedom: once in 30,000 choices of users


def test_a_user_stays_where_she_is() -> None:
    one, same = experiment([1, 2]), experiment([1, 2])
    assert [one.assign(user) for user in USERS[:1000]] == [same.assign(user) for user in USERS[:1000]]
    # Also in the next release: these were drawn when the test was written.
    assert "".join(one.assign(user).name[-1] for user in USERS[:20]) == "11101100101110111010"


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
        (lambda: Arm("default"), "this name is of those who are in no arm"),
        (lambda: Arm("a", strategy="gpu"), "strategy is 'gpu'"),
        (lambda: Arm("a", version=0), "version is 0"),
        (lambda: Shadow("auto", 0.1), "strategy is 'auto'"),
        (lambda: Shadow("onnx", 1.1), "share is 1.1"),
    ],
)
def test_wrong_settings_are_refused(make: object, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()  # type: ignore[operator]
