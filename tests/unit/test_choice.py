"""How ``auto`` chooses: the rule of ``mtgr.routing.choice``, line by line."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from mtgr.errors import ConfigurationError
from mtgr.routing.choice import AutoChoice, AutoConfig, Load

ORDER = ("tensorrt", "vllm", "onnx", "baseline")
SMALL = (0, 1, False)


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def choice(clock: Clock | None = None, **config: object) -> AutoChoice:
    values: dict[str, object] = {"order": ORDER, "explore": 0.0, **config}
    return AutoChoice(AutoConfig(**values), clock or Clock())  # type: ignore[arg-type]


def measure(auto: AutoChoice, **milliseconds: float) -> None:
    for _ in range(10):
        for name, value in milliseconds.items():
            auto.answered(Load(name), SMALL, value / 1e3)


@pytest.mark.parametrize(
    ("ready", "milliseconds", "first"),
    [
        (ORDER, {}, "tensorrt"),  # nothing measured: the order
        (("onnx", "baseline"), {}, "onnx"),
        (ORDER, {"tensorrt": 9, "vllm": 3, "onnx": 12}, "vllm"),  # the quickest
        (ORDER, {"tensorrt": 3.2, "vllm": 3}, "tensorrt"),  # within a tenth: the order
        (ORDER, {"tensorrt": 3.4, "vllm": 3}, "vllm"),
        (("onnx", "baseline"), {"vllm": 1, "onnx": 12, "baseline": 5}, "baseline"),  # vllm is not ready
        (ORDER, {"baseline": 7}, "baseline"),  # the others are tried by exploring only
    ],
)
def test_the_rule(ready: tuple[str, ...], milliseconds: dict[str, float], first: str) -> None:
    auto = choice()
    measure(auto, **milliseconds)
    chosen = auto.choose(ready, SMALL)
    assert chosen.order[0] == first
    assert sorted(chosen.order) == sorted(ready)  # every other one is a fallback
    assert chosen.reason


def test_what_was_measured_under_load_is_not_held_against_an_engine_when_the_load_is_gone() -> None:
    auto = choice()
    for _ in range(10):
        auto.answered(Load("onnx", 32, 32), SMALL, 0.160)  # 5 ms each
        auto.answered(Load("vllm"), SMALL, 0.009)
    assert auto.choose(ORDER, SMALL).order[0] == "onnx"


def test_requests_in_flight_do_not_shift_the_next_one_to_an_idle_engine() -> None:
    auto = choice()
    measure(auto, onnx=5, vllm=9)
    assert [auto.started(name).all for name in ("onnx", "onnx", "vllm", "onnx")] == [1, 2, 3, 4]
    chosen = auto.choose(ORDER, SMALL)
    assert chosen.order[0] == "onnx"
    assert "onnx 25.0 ms" in chosen.reason
    for name in ("onnx", "onnx", "vllm", "onnx"):
        auto.ended(name)
    assert "onnx 5.0 ms" in auto.choose(ORDER, SMALL).reason


def test_what_an_engine_takes_for_few_beside_a_busy_one_is_a_bound_only() -> None:
    auto = choice()
    auto.answered(Load("onnx", 31, 32), SMALL, 0.090)  # 2.9 ms each
    auto.answered(Load("vllm", 1, 32), SMALL, 0.060)  # idle, but for this one
    assert auto.choose(ORDER, SMALL).order[:2] == ("onnx", "vllm")
    auto.answered(Load("vllm", 32, 32), SMALL, 0.064)  # 2 ms each, in one batch
    assert auto.choose(ORDER, SMALL).order[:2] == ("vllm", "onnx")
    auto.answered(Load("tensorrt", 1, 32), SMALL, 0.001)  # it takes no more than that, however many there are
    assert auto.choose(ORDER, SMALL).order[0] == "tensorrt"


@dataclass
class Machine:
    """Engines that share a processor, each with a batch of its own; all waiting requests go into the next one.

    Attributes:
        costs: Milliseconds of a batch, and of each request in it, by engine.
    """

    costs: dict[str, tuple[float, float]]

    def serve(self, auto: AutoChoice, clock: Clock, callers: int, requests: int) -> Counter[str]:
        """Callers that ask again as soon as they have an answer; how many requests each engine got."""
        served: Counter[str] = Counter()
        waiting: dict[str, list[tuple[Load, float]]] = {name: [] for name in self.costs}
        batches: dict[str, list[tuple[Load, float]]] = {}
        left: dict[str, float] = {}
        idle = callers
        while served.total() < requests:
            for _ in range(idle):
                name = auto.choose(tuple(self.costs), SMALL).order[0]
                served[name] += 1
                waiting[name].append((auto.started(name), clock.now))
            for name in self.costs:
                if name not in batches and waiting[name]:
                    batches[name], waiting[name] = waiting[name], []
                    left[name] = (self.costs[name][0] + self.costs[name][1] * len(batches[name])) / 1e3
            first = min(batches, key=lambda name: left[name])
            step = left[first]
            clock.advance(step * len(batches))  # each gets its part of the processor
            for name in batches:
                left[name] -= step
            done = batches.pop(first)
            for load, asked in done:
                auto.ended(first)
                auto.answered(load, SMALL, clock.now - asked)
            idle = len(done)
        return served


@pytest.mark.parametrize(
    ("costs", "callers", "best"),
    [
        ({"vllm": (6, 3.1), "onnx": (2, 2.4), "baseline": (3, 7)}, 32, "onnx"),  # measured on two cores, nearly
        ({"vllm": (6, 3.1), "onnx": (2, 2.4), "baseline": (3, 7)}, 1, "onnx"),
        ({"vllm": (9, 0.5), "onnx": (1, 4)}, 1, "onnx"),  # the one that batches well is slow for one
        ({"vllm": (9, 0.5), "onnx": (1, 4)}, 32, "vllm"),
        ({"vllm": (9, 0.5), "onnx": (1, 4)}, 256, "vllm"),
        ({"tensorrt": (8, 2), "onnx": (1, 1)}, 256, "onnx"),  # and the order is wrong
    ],
)
def test_callers_settle_at_the_engine_that_takes_least_for_all_of_them(
    costs: dict[str, tuple[float, float]], callers: int, best: str
) -> None:
    clock = Clock()
    auto = choice(clock, explore=0.01)
    machine = Machine(costs)
    machine.serve(auto, clock, callers, 100 * callers)
    later = machine.serve(auto, clock, callers, 6400)
    assert later[best] >= 0.95 * later.total(), later


def test_without_adapting_the_order_decides() -> None:
    auto = choice(adaptive=False)
    measure(auto, tensorrt=900, onnx=1)
    assert auto.choose(("onnx", "tensorrt"), SMALL).order == ("tensorrt", "onnx")


def test_sizes_are_measured_apart() -> None:
    auto = choice()
    measure(auto, tensorrt=9, vllm=3)
    assert auto.choose(ORDER, SMALL).order[0] == "vllm"
    assert auto.choose(ORDER, (2, 1, False)).order[0] == "tensorrt"


def test_an_engine_that_becomes_slow_is_left_and_one_that_recovers_is_found() -> None:
    clock = Clock()
    auto = choice(clock, explore=0.1)
    speed = {"tensorrt": 0.002, "onnx": 0.010}

    def serve(count: int) -> dict[str, int]:
        served = dict.fromkeys(speed, 0)
        for _ in range(count):
            name = auto.choose(tuple(speed), SMALL).order[0]
            served[name] += 1
            auto.answered(Load(name), SMALL, speed[name])
            clock.advance(0.05)
        return served

    assert serve(200)["tensorrt"] >= 150
    speed["tensorrt"] = 0.5
    assert serve(400)["onnx"] >= 280
    speed["tensorrt"] = 0.002
    serve(1600)  # its slow answers have to fade
    assert serve(200)["tensorrt"] >= 150


def test_the_slowest_engine_is_found_out_before_it_serves_many() -> None:
    for gap in (0.01, 1.0, 60.0):  # whether there is much traffic or hardly any
        clock = Clock()
        auto = choice(clock, explore=0.01)
        speed = {"tensorrt": 0.5, "onnx": 0.01}
        slow = 0
        for _ in range(300):
            name = auto.choose(tuple(speed), SMALL).order[0]
            slow += name == "tensorrt"
            auto.answered(Load(name), SMALL, speed[name])
            clock.advance(gap)
        assert slow <= 15


def test_what_was_measured_outlives_a_quiet_hour() -> None:
    clock = Clock()
    auto = choice(clock)
    measure(auto, tensorrt=90, onnx=10)
    clock.advance(3600)
    assert auto.choose(ORDER, SMALL).order[0] == "onnx"


def test_an_engine_that_fails_often_counts_as_slower() -> None:
    clock = Clock()
    auto = choice(clock)
    measure(auto, tensorrt=6, onnx=10)
    for _ in range(10):  # ten of twenty
        auto.failed("tensorrt")
    assert auto.choose(ORDER, SMALL).order[0] == "onnx"
    clock.advance(120)  # long ago
    assert auto.choose(ORDER, SMALL).order[0] == "tensorrt"


def test_an_engine_that_never_answers_is_a_number_all_the_same() -> None:
    clock = Clock()
    auto = choice(clock)
    measure(auto, onnx=10)
    clock.advance(3600)  # of its answers nothing counts any more
    auto.failed("onnx")
    assert auto.choose(("onnx", "baseline"), SMALL).order == ("onnx", "baseline")


def test_the_same_history_leads_to_the_same_choices() -> None:
    def run() -> list[tuple[str, ...]]:
        auto, generator, chosen = choice(explore=0.05), random.Random(0), []
        for _ in range(500):
            size = generator.choice([SMALL, (2, 2, True)])
            ready = generator.sample(ORDER, generator.randint(0, 4))
            order = auto.choose(ready, size).order
            assert sorted(order) == sorted(ready)
            chosen.append(order)
            if order:
                auto.answered(Load(order[0]), size, generator.uniform(0.001, 0.1))
        return chosen

    assert run() == run()


def test_exploring_is_rare_and_reaches_every_engine() -> None:
    auto = choice(explore=0.01)
    counts = dict.fromkeys(ORDER, 0)
    for _ in range(1000):
        name = auto.choose(ORDER, SMALL).order[0]
        counts[name] += 1
        auto.answered(Load(name), SMALL, 0.001 * (1 + ORDER.index(name)))
    assert counts["tensorrt"] >= 985
    assert all(counts.values())


def test_a_context_is_cached_for_a_while() -> None:
    clock = Clock()
    auto = choice(clock, cached_seconds=60)
    assert auto.size(500, 64, context=7) == (2, 1, False)
    auto.remember(7)
    assert auto.size(500, 64, context=7) == (2, 1, True)
    assert auto.size(500, 64, context=8) == (2, 1, False)
    clock.advance(61)
    assert auto.size(500, 64, context=7) == (2, 1, False)


@pytest.mark.parametrize(
    "wrong",
    [{"order": ()}, {"order": ("onnx", "onnx")}, {"order": ("gpu",)}, {"explore": 0.6}, {"half_life": 0.0}],
    ids=str,
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="auto: "):
        AutoConfig(**wrong)  # type: ignore[arg-type]
