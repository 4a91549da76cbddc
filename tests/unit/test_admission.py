"""Admission control under overload, in simulated time on the real batcher, and its bookkeeping under random use."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtgr.errors import ConfigurationError, RequestTimeoutError
from mtgr.routing.admission import Admission, AdmissionConfig
from mtgr.routing.batching import Arrays, ShapeBatcher
from mtgr.routing.deadline import Deadline
from mtgr.routing.reasons import Reason, RefusedError
from tests.unit.virtual_time import run_virtual

MAX_BATCH = 32
OFF = AdmissionConfig(shedding=False, max_concurrent=256, max_queue=100_000)


@dataclass
class SimulatedEngine:
    """Takes ``fixed`` seconds for a batch and ``each`` for every request in it, one batch at a time, whatever waits."""

    fixed: float
    each: float
    noise: float = 0.0  # standard deviation of the logarithm of a batch's time
    stall: tuple[float, float] = (0.0, 0.0)  # from when until when it hangs

    def __post_init__(self) -> None:
        self.generator = random.Random(3)
        self.idle = asyncio.Lock()

    @property
    def capacity(self) -> float:
        """Requests per second in full batches."""
        return MAX_BATCH / ((self.fixed + MAX_BATCH * self.each) * math.exp(self.noise**2 / 2))

    async def infer(self, model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        async with self.idle:
            now, (hangs, ends) = asyncio.get_running_loop().time(), self.stall
            stalled = max(0.0, ends - now) if now >= hangs else 0.0
            factor = self.generator.lognormvariate(0, self.noise)
            await asyncio.sleep(stalled + factor * (self.fixed + self.each * inputs["x"].shape[0]))
        return {"y": inputs["x"]}


@dataclass
class Outcome:
    arrived: float
    seconds: float
    result: str  # "ok", "late", "refused", "expired"


@dataclass
class Phase:
    """What happened to those who arrived within some seconds."""

    outcomes: list[Outcome]
    seconds: float

    @property
    def goodput(self) -> float:
        return self.count("ok") / self.seconds

    @property
    def late_share(self) -> float:
        """Part of those let run, or let wait till their end, that got no answer in time."""
        late = self.count("late") + self.count("expired")
        return late / max(1, late + self.count("ok"))

    def count(self, result: str) -> int:
        return sum(outcome.result == result for outcome in self.outcomes)

    def refusal_p99(self) -> float:
        return float(np.percentile([o.seconds for o in self.outcomes if o.result == "refused"] or [0.0], 99))

    def latency(self, percent: float) -> float:
        return float(np.percentile([o.seconds for o in self.outcomes if o.result == "ok"], percent))


class Simulation:
    """Poisson arrivals of given rates in front of an engine."""

    def __init__(self, engine: SimulatedEngine, config: AdmissionConfig, deadline: float) -> None:
        self.engine = engine
        self.config = config
        self.deadline = deadline
        self.outcomes: list[Outcome] = []
        self.most_waiting = 0
        self.origin = 0.0

    def run(self, *phases: tuple[float, float]) -> Simulation:
        """Each phase: seconds, requests per second."""
        run_virtual(self._main(phases))
        return self

    def between(self, begin: float, end: float) -> Phase:
        return Phase([o for o in self.outcomes if begin <= o.arrived < end], end - begin)

    async def _main(self, phases: Sequence[tuple[float, float]]) -> None:
        loop, generator = asyncio.get_running_loop(), random.Random(7)
        self.origin = loop.time()
        self.engine.stall = (self.engine.stall[0] + self.origin, self.engine.stall[1] + self.origin)
        admission = Admission("mtgr_onnx", self.config, loop.time)
        batcher = ShapeBatcher(self.engine, MAX_BATCH)
        tasks: set[asyncio.Task[None]] = set()
        begin = self.origin
        for seconds, rate in phases:
            arrivals, last = [], 0.0
            while (last := last + generator.expovariate(rate)) < seconds:
                arrivals.append(begin + last)
            begin += seconds
            for arrival in arrivals:
                await asyncio.sleep(arrival - loop.time())
                task = loop.create_task(self._request(admission, batcher))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                self.most_waiting = max(self.most_waiting, admission.waiting)
        await asyncio.gather(*tasks)
        assert admission.idle

    async def _request(self, admission: Admission, batcher: ShapeBatcher) -> None:
        clock = asyncio.get_running_loop().time
        arrived, result = clock(), "expired"
        deadline = Deadline.after(self.deadline, clock)
        try:
            async with admission.admit(deadline):
                result = "late"
                async with asyncio.timeout(deadline.remaining()):
                    await batcher.infer("mtgr_onnx", {"x": np.zeros((1, 4))}, ["y"])
            result = "ok"
        except RefusedError:
            result = "refused"
        except (TimeoutError, RequestTimeoutError):
            pass
        self.outcomes.append(Outcome(arrived - self.origin, clock() - arrived, result))


def overload(engine: SimulatedEngine, deadline: float, config: AdmissionConfig | None = None) -> Simulation:
    """Ten seconds at half the engine's rate, sixty at four times its rate, fifteen at half again."""
    simulation = Simulation(engine, config or AdmissionConfig(), deadline)
    return simulation.run((10, 0.5 * engine.capacity), (60, 4 * engine.capacity), (15, 0.5 * engine.capacity))


def problems(simulation: Simulation) -> list[str]:
    """What of the promises under overload does not hold."""
    before, during, recovered = (simulation.between(*times) for times in ((0, 10), (10, 70), (75, 85)))
    checks = {
        "nothing is refused at half load": not before.count("refused") and not before.late_share,
        "goodput": during.goodput >= 0.8 * simulation.engine.capacity,
        "accepted requests in time": during.late_share <= 0.01,
        # Clients and the way to the door take their part of the time too.
        "accepted requests with time to spare": not during.goodput or during.latency(99) <= 0.9 * simulation.deadline,
        "refusals at once": during.refusal_p99() <= 0.05,
        "recovery": not recovered.count("refused") and not recovered.late_share,
        "latency as before": recovered.latency(50) <= 1.5 * before.latency(50),
    }
    return [name for name, holds in checks.items() if not holds]


@pytest.mark.parametrize(
    ("engine", "deadline"),
    [
        (SimulatedEngine(0.02, 0.005), 1.0),  # batches pay: 178 a second, a request alone takes 25 ms
        (SimulatedEngine(0.0, 0.05), 1.0),  # batches do not pay: 20 a second
        (SimulatedEngine(0.02, 0.005), 10.0),  # patient clients: the queue must not stand at their patience
        (SimulatedEngine(0.05, 0.04), 1.0),  # slow: 24 a second, and a full batch takes longer than the deadline
        (SimulatedEngine(0.02, 0.005, noise=0.3), 1.0),  # some batches take twice as long as others
    ],
)
def test_goodput_and_latency_hold_at_four_times_the_sustainable_rate(engine: SimulatedEngine, deadline: float) -> None:
    simulation = overload(engine, deadline)
    assert problems(simulation) == []
    assert simulation.most_waiting <= deadline * engine.capacity


def test_without_shedding_the_promises_break() -> None:
    broken = problems(overload(SimulatedEngine(0.02, 0.005), 1.0, OFF))
    assert {"goodput", "accepted requests in time"} <= set(broken)


def test_a_limit_that_does_not_follow_the_engine_breaks_them_too() -> None:
    fixed = AdmissionConfig(initial_limit=256, min_limit=256, max_concurrent=256)
    assert "goodput" in problems(overload(SimulatedEngine(0.05, 0.04), 1.0, fixed))


def test_goodput_returns_soon_after_a_hang() -> None:
    engine = SimulatedEngine(0.02, 0.005, stall=(20, 23))
    simulation = Simulation(engine, AdmissionConfig(), 1.0).run((40, 0.7 * engine.capacity))
    after = simulation.between(25, 40)
    assert simulation.between(20, 22).goodput < 0.1 * engine.capacity
    assert after.goodput >= 0.65 * engine.capacity
    assert after.late_share == 0


@pytest.mark.parametrize("before", [(), ((3.0, 5.0),)])
def test_a_burst_that_can_be_answered_in_time_is_not_refused(before: tuple[tuple[float, float], ...]) -> None:
    simulation = Simulation(SimulatedEngine(0.02, 0.005), AdmissionConfig(), 10.0)
    simulation.run(*before, (0.3, 1000), (5, 2))
    assert len(simulation.outcomes) > 250
    assert {outcome.result for outcome in simulation.outcomes} == {"ok"}


def test_requests_with_hardly_any_time_do_not_lower_the_limit_of_others() -> None:
    engine = SimulatedEngine(0.02, 0.005)

    class Impatient(Simulation):
        async def _request(self, admission: Admission, batcher: ShapeBatcher) -> None:
            self.deadline = 0.001 if len(self.outcomes) % 5 < 2 else 1.0
            await super()._request(admission, batcher)

    simulation = Impatient(engine, AdmissionConfig(), 1.0).run((10, 0.5 * engine.capacity), (20, 4 * engine.capacity))
    assert simulation.between(12, 30).goodput >= 0.9 * engine.capacity


def test_a_refusal_is_immediate_and_says_why() -> None:
    async def check() -> None:
        clock = asyncio.get_running_loop().time
        admission = Admission("mtgr_onnx", AdmissionConfig(max_concurrent=1), clock)
        gate = asyncio.Event()

        async def hold(seconds: float) -> None:
            async with admission.admit(Deadline.after(100.0, clock)):
                await asyncio.sleep(seconds)
                await gate.wait()

        gate.set()
        await hold(2.0)  # it is known now that service takes 2 s
        gate.clear()
        first, second = (asyncio.ensure_future(hold(2.0)) for _ in range(2))
        await asyncio.sleep(0)
        assert (admission.running, admission.waiting) == (1, 1)
        assert admission.pressure().expected_seconds == pytest.approx(6.0)
        before = clock()
        with pytest.raises(RefusedError, match=r"^mtgr_onnx: an answer would take about 6 s behind 1 others") as caught:
            async with admission.admit(Deadline.after(5.0, clock)):
                pytest.fail("it was admitted")
        assert caught.value.reason is Reason.OVERLOADED
        assert clock() == before
        assert admission.refused == {Reason.OVERLOADED: 1}
        gate.set()
        await asyncio.gather(first, second)

    run_virtual(check())


def test_the_queue_is_bounded() -> None:
    async def check() -> None:
        clock = asyncio.get_running_loop().time
        admission = Admission("m", AdmissionConfig(max_concurrent=1, max_queue=2, shedding=False), clock)

        async def hold() -> None:
            async with admission.admit(Deadline.after(100.0, clock)):
                await asyncio.sleep(1.0)

        results = await asyncio.gather(*(hold() for _ in range(5)), return_exceptions=True)
        assert [isinstance(result, RefusedError) for result in results] == [False] * 3 + [True] * 2
        assert "m: 2 requests wait, as many as may; try again later." in str(results[-1])

    run_virtual(check())


def test_who_waits_past_the_deadline_is_told_so_and_leaves_the_queue() -> None:
    async def check() -> None:
        clock = asyncio.get_running_loop().time
        admission = Admission("m", AdmissionConfig(max_concurrent=1, shedding=False), clock)
        async with admission.admit(Deadline.after(100.0, clock)):
            before = clock()
            with pytest.raises(RequestTimeoutError, match="ran out while it waited for m"):
                async with admission.admit(Deadline.after(0.25, clock)):
                    pytest.fail("there was no place")
            assert clock() - before == pytest.approx(0.25)
            assert admission.waiting == 0
            with pytest.raises(RequestTimeoutError, match="before admission to m"):
                async with admission.admit(Deadline.after(-0.1, clock)):
                    pytest.fail("its time was over")
        assert admission.idle
        assert admission.refused == {Reason.DEADLINE: 2}

    run_virtual(check())


def test_a_place_given_in_the_moment_of_giving_up_goes_to_the_next() -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()
        admission = Admission("m", AdmissionConfig(max_concurrent=1, shedding=False), loop.time)
        gates = [asyncio.Event() for _ in range(3)]

        async def hold(index: int) -> int:
            async with admission.admit(Deadline.after(100.0, loop.time)):
                await gates[index].wait()
                return index

        first, second, third = (loop.create_task(hold(index)) for index in range(3))
        await asyncio.sleep(0)
        gates[0].set()
        while not first.done():
            await asyncio.sleep(0)
        second.cancel()  # it has the place, and has not run since
        gates[2].set()
        assert await third == 2
        assert admission.idle
        with pytest.raises(asyncio.CancelledError):
            await second

    run_virtual(check())


def test_draining_refuses_the_new_and_ends_the_old() -> None:
    async def check() -> None:
        clock = asyncio.get_running_loop().time
        admission = Admission("m", AdmissionConfig(max_concurrent=1), clock)
        done = []

        async def hold(index: int) -> None:
            async with admission.admit(Deadline.after(100.0, clock)):
                await asyncio.sleep(1.0)
            done.append(index)

        old = [asyncio.ensure_future(hold(index)) for index in range(3)]
        await asyncio.sleep(0.5)
        admission.drain()
        with pytest.raises(RefusedError, match="about to stop") as caught:
            await hold(9)
        assert caught.value.reason is Reason.DRAINING
        assert not admission.idle
        await asyncio.gather(*old)
        assert admission.idle
        assert done == [0, 1, 2]

    run_virtual(check())


def test_a_deadline_that_never_comes_is_fine() -> None:
    async def check() -> None:
        clock = asyncio.get_running_loop().time
        admission = Admission("m", AdmissionConfig(max_concurrent=1), clock)

        async def hold() -> float:
            async with admission.admit(Deadline.from_unix_ms(0, clock)) as waited:
                await asyncio.sleep(1.0)
                return waited

        assert await asyncio.gather(*(hold() for _ in range(3))) == pytest.approx([0.0, 1.0, 2.0])

    run_virtual(check())


REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 3),  # arrival
        st.floats(0.01, 2),  # service
        st.floats(0.01, 4),  # deadline
        st.sampled_from(("ok", "ok", "fail", "cancel")),
        st.floats(0, 2),  # when it is cancelled
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=150)
@given(REQUESTS, st.integers(1, 6), st.integers(0, 8), st.booleans())
def test_no_place_is_lost_or_given_twice(
    requests: list[tuple[float, float, float, str, float]], most: int, queue: int, shedding: bool
) -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()
        config = AdmissionConfig(max_concurrent=most, max_queue=queue, shedding=shedding, initial_limit=1, min_limit=1)
        admission = Admission("m", config, loop.time)
        inside = 0
        started: list[float] = []

        async def request(arrival: float, service: float, limit: float, end: str, cancel: float) -> None:
            nonlocal inside
            await asyncio.sleep(arrival)
            if end == "cancel":
                task = asyncio.current_task()
                assert task is not None
                loop.call_later(cancel, task.cancel)
            came = loop.time()
            async with admission.admit(Deadline.after(limit, loop.time)):
                inside += 1
                started.append(came)
                assert inside <= admission.running <= most
                assert admission.waiting <= queue
                try:
                    await asyncio.sleep(service)
                finally:
                    inside -= 1
                if end == "fail":
                    raise ValueError("the engine failed")

        results = await asyncio.gather(*(request(*one) for one in requests), return_exceptions=True)
        allowed = (RefusedError, RequestTimeoutError, ValueError, asyncio.CancelledError)
        assert all(result is None or isinstance(result, allowed) for result in results)
        assert admission.idle
        assert started == sorted(started)  # in the order of arrival
        async with admission.admit(Deadline.after(1.0, loop.time)):
            pass  # there is a place again

    run_virtual(check())


@pytest.mark.parametrize(
    "bad", [{"max_concurrent": 0}, {"max_queue": -1}, {"safety": 0.0}, {"service_share": 1.1}, {"half_life": 0.0}]
)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"admission: {next(iter(bad))} is"):
        AdmissionConfig(**bad)
