"""``python -m perf.overload``: four times what the server sustains, and how it comes back.

1. Peak: answers per second in a closed loop, the best of a few concurrencies.
2. Sustainable: the open-loop rate, from 80% of the peak downwards, at which 99% are answered within the time limit.
3. Overload: four times that rate for a minute, with a time limit for each request.
4. Recovery: half of the sustainable rate, at once.

The client runs on the server's cores and takes its part of them, more under overload than at the peak: goodput under
overload counts against the server what the client costs. ``lag`` says how late the client itself was; where its p99
nears a bar, the bar was missed by the client. ``--client-cores`` and ``--server-cores`` keep the two apart on machines
with cores to spare.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from mtgr.client import RecommendationRequest
from mtgr.serving.server import TritonServer
from perf.load import Outcome, RawCaller, Samples, closed_loop, open_loop, percentile, poisson
from perf.processes import ServerProcesses, Usage, columns
from perf.record import ROOT, describe, store
from perf.repository import CONFIG, ranking_requests, synthetic_repository

CONTEXT, CANDIDATES, USERS = 512, 64, 256
SUCCESS = 0.99
_MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        time_limit: Seconds that every request allows.
        factor: Rate of the overload, in sustainable rates.
        concurrencies: Callers of the closed loops.
        warm_seconds: Of load before anything is measured.
        peak_seconds: Of each closed loop.
        sustain_seconds: Of each try of an open loop.
        overload_seconds: Of the overload.
        recovery_seconds: Of the load after it.
        seed: Of the arrivals.
    """

    time_limit: float = 2.0
    factor: float = 4.0
    concurrencies: tuple[int, ...] = (4, 16, 64)
    warm_seconds: float = 5.0
    peak_seconds: float = 10.0
    sustain_seconds: float = 10.0
    overload_seconds: float = 60.0
    recovery_seconds: float = 15.0
    seed: int = 0


@dataclass(frozen=True)
class Bars:
    """What must hold.

    Attributes:
        goodput: Least part of the peak's goodput under overload.
        refusal_seconds: Most seconds until a refusal, p99.
        recovery_seconds: Most seconds until 99% are answered again.
        growth: Most growth of resident memory within the overload, from its second fifth to its last, as a part.
    """

    goodput: float = 0.8
    refusal_seconds: float = 0.05
    recovery_seconds: float = 5.0
    growth: float = 0.02


@dataclass
class Measurement:
    """What was seen.

    Attributes:
        plan: How it was measured.
        peaks: The closed loops, by concurrency.
        sustainable: Requests per second.
        tries: The open loops that looked for it, by rate.
        load: Overload and recovery in one run.
        before: Processes before the overload.
        during: Processes during overload and recovery, every half second.
        after: Processes after recovery.
    """

    plan: Plan
    peaks: dict[int, Samples] = field(default_factory=dict)
    sustainable: float = 0.0
    tries: dict[float, Samples] = field(default_factory=dict)
    load: Samples = field(default_factory=lambda: Samples(0.0))
    before: Usage | None = None
    during: list[Usage] = field(default_factory=list)
    after: Usage | None = None

    @property
    def peak(self) -> float:
        """Best goodput of the closed loops, per second."""
        return max(samples.goodput() for samples in self.peaks.values())

    @property
    def overload(self) -> Samples:
        """Requests of the overload."""
        return self.load.between(0.0, self.plan.overload_seconds)

    @property
    def accepted_p99(self) -> float:
        """Seconds; what timed out was accepted too."""
        return percentile(self.overload.latencies_of(Outcome.ANSWERED, Outcome.TIMED_OUT), 99)

    @property
    def refusal_p99(self) -> float:
        """Seconds; NaN if nothing was refused."""
        return percentile(self.overload.latencies_of(Outcome.REFUSED), 99)

    @property
    def lag_p99(self) -> float:
        """Seconds that the client was late to send."""
        return percentile(self.overload.lags, 99)

    @property
    def recovery(self) -> float:
        """Seconds after the overload from which on, second by second, 99% are answered; infinite if never."""
        end, needed = self.plan.overload_seconds, 0.0
        for second in range(round(self.plan.recovery_seconds)):
            part = self.load.between(end + second, end + second + 1)
            if part.outcomes and part.count(Outcome.ANSWERED) < SUCCESS * len(part.outcomes):
                needed = second + 1.0
        return needed if needed < self.plan.recovery_seconds else float("inf")

    @property
    def growth(self) -> float:
        """Part by which resident memory grew within the overload, from its second fifth to its last; medians."""
        seconds = self.plan.overload_seconds
        start = self.during[0].seconds

        def middle(first: float, last: float) -> float:
            return statistics.median(
                usage.rss for usage in self.during if first * seconds <= usage.seconds - start < last * seconds
            )

        return middle(0.8, 1.0) / middle(0.2, 0.4) - 1

    def missed(self, bars: Bars) -> list[str]:
        """A sentence for each bar that was missed."""
        overload = self.overload
        verdicts = {
            f"goodput is {overload.goodput() / self.peak:.0%} of the peak, not {bars.goodput:.0%}": overload.goodput()
            >= bars.goodput * self.peak,
            f"accepted requests took {self.accepted_p99:.2f} s at p99, more than the {self.plan.time_limit:g} s that "
            "they allowed": self.accepted_p99 <= self.plan.time_limit,
            # NaN, of no refusals at all, is a miss: then this was no overload.
            f"refusals took {self.refusal_p99 * 1e3:.0f} ms at p99, not {bars.refusal_seconds * 1e3:.0f} ms": (
                self.refusal_p99 <= bars.refusal_seconds
            ),
            f"recovery took {self.recovery:g} s, not {bars.recovery_seconds:g} s": self.recovery
            <= bars.recovery_seconds,
            f"memory grew by {self.growth:.1%}, not {bars.growth:.0%}": self.growth <= bars.growth,
            f"{overload.count(Outcome.FAILED, Outcome.INVALID)} requests failed in other ways": not overload.count(
                Outcome.FAILED, Outcome.INVALID
            ),
            f"the client left {overload.count(Outcome.UNSENT)} requests unsent": not overload.count(Outcome.UNSENT),
        }
        return [sentence for sentence, good in verdicts.items() if not good]


def main(arguments: list[str] | None = None) -> int:
    """Measure; 0 if every bar is held, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m perf.overload", description=__doc__)
    parser.add_argument("--model-repository", type=Path, help="an exported one; by default a random network's")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--time-limit", type=float, default=2.0, help="seconds that every request allows")
    parser.add_argument("--policy", type=Path, help="policy file for the server")
    parser.add_argument("--client-cores", help="cores for the load, such as 0 or 0-3; by default all")
    parser.add_argument("--server-cores", help="cores for the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="overload-cpu", help="file name in perf/results")
    options = parser.parse_args(arguments)
    plan = Plan(time_limit=options.time_limit, overload_seconds=options.seconds, seed=options.seed)
    environment = {"MTGR_POLICY": str(options.policy.absolute())} if options.policy else {}
    with tempfile.TemporaryDirectory() as folder:
        repository = options.model_repository or synthetic_repository(Path(folder), USERS, CONTEXT, options.seed)
        requests = ranking_requests(repository, 1024, CANDIDATES, options.seed)
        if options.server_cores:
            os.sched_setaffinity(0, cores(options.server_cores))  # which the server's processes inherit
        with TritonServer(repository, environment=environment) as server:
            os.sched_setaffinity(0, cores(options.client_cores or f"0-{(os.cpu_count() or 1) - 1}"))
            measurement = asyncio.run(measure(server, requests, plan))
    return report(options, measurement)


async def measure(server: TritonServer, requests: Sequence[RecommendationRequest], plan: Plan) -> Measurement:
    """Run all phases."""
    result = Measurement(plan)
    processes = ServerProcesses(server.pid)
    with tqdm(leave=False, disable=None, bar_format="{desc}") as title:
        async with RawCaller(server.grpc_url, requests, plan.time_limit) as call:
            title.set_description_str("warm-up")
            await closed_loop(call, 8, plan.warm_seconds)
            for concurrency in plan.concurrencies:
                title.set_description_str(f"peak, {concurrency} callers")
                result.peaks[concurrency] = await closed_loop(call, concurrency, plan.peak_seconds)
            result.sustainable = 0.8 * result.peak
            for attempt in range(6):
                rate = result.sustainable = 0.8 * result.peak * 0.9**attempt
                title.set_description_str(f"open loop, {rate:.0f} per second")
                arrivals = poisson(rate, plan.sustain_seconds, plan.seed + attempt)
                samples = result.tries[rate] = await open_loop(call, arrivals, plan.sustain_seconds)
                if samples.count(Outcome.ANSWERED) >= SUCCESS * len(samples.outcomes):
                    break
            result.before = processes.sample()
            title.set_description_str(f"overload, {plan.factor * result.sustainable:.0f} per second, and recovery")
            arrivals = poisson(plan.factor * result.sustainable, plan.overload_seconds, plan.seed + 100)
            arrivals += [
                plan.overload_seconds + moment
                for moment in poisson(result.sustainable / 2, plan.recovery_seconds, plan.seed + 101)
            ]
            async with processes.watched(0.5) as result.during:
                result.load = await open_loop(call, arrivals, plan.overload_seconds + plan.recovery_seconds)
            result.after = processes.sample()
    return result


def cores(text: str) -> set[int]:
    """``0,2-3`` as a set."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def table(measurement: Measurement, bars: Bars) -> str:
    """What was seen, for readers."""
    plan, overload = measurement.plan, measurement.overload
    assert measurement.before is not None
    assert measurement.after is not None
    lines = [f"{'':34}{'answers/s':>11}{'answered':>10}{'p50':>10}{'p99':>10}"]
    loops = {f"closed loop, {n} callers": samples for n, samples in measurement.peaks.items()}
    loops |= {f"open loop, {rate:.0f}/s": samples for rate, samples in measurement.tries.items()}
    loops[f"overload, {plan.factor * measurement.sustainable:.0f}/s, accepted"] = overload
    end = plan.overload_seconds
    loops[f"after it, {measurement.sustainable / 2:.0f}/s"] = measurement.load.between(end, end + plan.recovery_seconds)
    for name, samples in loops.items():
        accepted = samples.latencies_of(Outcome.ANSWERED, Outcome.TIMED_OUT)
        share = samples.count(Outcome.ANSWERED) / max(len(samples.outcomes), 1)
        middle, tail = (percentile(accepted, q) * 1e3 for q in (50, 99))
        lines.append(f"{name:34}{samples.goodput():11.1f}{share:10.1%}{middle:7.0f} ms{tail:7.0f} ms")
    refusals = overload.latencies_of(Outcome.REFUSED)
    counts = ", ".join(f"{overload.count(outcome)} {outcome.name.lower()}" for outcome in Outcome)
    before, after = (usage.rss / _MEGABYTE for usage in (measurement.before, measurement.after))
    lines += [
        "",
        f"overload         {counts}",
        f"goodput          {overload.goodput() / measurement.peak:.0%} of the peak (at least {bars.goodput:.0%})",
        f"accepted p99     {measurement.accepted_p99 * 1e3:.0f} ms (at most {plan.time_limit * 1e3:.0f})",
        f"refusals         p50 {percentile(refusals, 50) * 1e3:.1f} ms, p99 {measurement.refusal_p99 * 1e3:.1f} ms "
        f"(at most {bars.refusal_seconds * 1e3:.0f})",
        f"recovery         {measurement.recovery:g} s (at most {bars.recovery_seconds:g})",
        f"memory           {before:.0f} MB before, {after:.0f} MB after; {measurement.growth:+.1%} within the overload "
        f"(at most {bars.growth:.0%})",
        f"client's lag     p99 {measurement.lag_p99 * 1e3:.1f} ms, within all of the above",
    ]
    return "\n".join(lines)


def report(options: argparse.Namespace, measurement: Measurement) -> int:
    """Print and store; the exit code."""
    bars = Bars()
    missed = measurement.missed(bars)
    print(table(measurement, bars))
    for sentence in missed:
        print(f"MISSED: {sentence}")
    plan = measurement.plan
    result = describe(options.seed) | {
        "network": str(options.model_repository) if options.model_repository else CONFIG.to_dict(),
        "candidates": CANDIDATES,
        "time_limit": plan.time_limit,
        "sustainable": measurement.sustainable,
        "missed": missed,
        "closed_loops": {name: samples.to_dict() for name, samples in measurement.peaks.items()},
        "open_loops": {f"{rate:.1f}": samples.to_dict() for rate, samples in measurement.tries.items()},
        "overload_seconds": plan.overload_seconds,
        "overload_and_recovery": measurement.load.to_dict(),
        "processes": columns(
            [usage for usage in (measurement.before, *measurement.during, measurement.after) if usage is not None]
        ),
    }
    print(f"raw samples: {store(options.name, result).relative_to(ROOT)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
