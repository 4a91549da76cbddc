"""Four times what a real server sustains: it goes on answering, refuses the rest at once, and comes back.

The bars are wide, for machines that do other things besides; ``perf.overload`` holds the tight ones for a minute.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from mtgr.serving.server import TritonServer
from perf.load import Outcome, Samples, percentile, poisson
from perf.overload import Bars as TightBars
from perf.overload import Measurement, Plan, measure, table
from perf.repository import ranking_requests

# Many candidates: what is scarce is the engine, as it is with real networks, and not the client's processor time.
CANDIDATES = 512
PLAN = Plan(
    time_limit=2.0,
    concurrencies=(4, 16),
    warm_seconds=3.0,
    peak_seconds=4.0,
    sustain_seconds=4.0,
    overload_seconds=20.0,
    recovery_seconds=8.0,
)
# For whoever wants to see this test fail: a policy file without shedding and without bounds.
POLICY = os.environ.get("MTGR_OVERLOAD_POLICY", "")


@pytest.mark.timeout(600)
def test_four_times_the_sustainable_rate(model_repository: Path) -> None:
    requests = ranking_requests(model_repository, 512, CANDIDATES, seed=5)
    with TritonServer(model_repository, environment={"MTGR_POLICY": POLICY} if POLICY else {}) as server:
        found = asyncio.run(measure(server, requests, PLAN))
        if not POLICY:
            check_who_refused(server.metrics_url, found)
    check(found)


def check_who_refused(metrics_url: str, found: Measurement) -> None:
    """Nearly all are refused before anything is spent on them, and every refusal is counted once."""
    time.sleep(2.5)  # models report once a second
    with urllib.request.urlopen(metrics_url) as response:
        page = response.read().decode()
    series = re.compile(r'^mtgr_errors_total{arm="[^"]*",asked="([^"]*)",reason="overloaded"} (\S+)$', re.MULTILINE)
    counts = {asked: float(count) for asked, count in series.findall(page)}
    runs = (*found.peaks.values(), *found.tries.values(), found.load)
    refused = sum(samples.count(Outcome.REFUSED) for samples in runs)
    assert sum(counts.values()) >= refused, counts  # the warm-up is counted there only
    assert counts[""] >= 0.7 * sum(counts.values()), counts


def check(found: Measurement) -> None:
    overload, seen = found.overload, table(found, TightBars())
    answered, refused, late = (
        overload.count(outcome) for outcome in (Outcome.ANSWERED, Outcome.REFUSED, Outcome.TIMED_OUT)
    )
    assert answered + refused + late == len(overload.outcomes), (seen, found.load.sentences)
    # It was an overload, and the client was not what broke.
    assert answered <= 0.7 * len(overload.outcomes), seen
    assert percentile(overload.lags, 90) <= 0.25, seen
    # The engine goes on working, and for requests that end in time.
    assert overload.goodput() >= 0.6 * found.peak, seen
    assert late <= 0.2 * (answered + late), seen
    # Whoever is refused knows at once.
    refusals = overload.latencies_of(Outcome.REFUSED)
    assert percentile(refusals, 50) <= 0.05, seen
    assert percentile(refusals, 90) <= 0.25, seen
    assert found.recovery <= 5.0, seen
    assert found.growth <= 0.25, seen


def test_arrivals_are_of_the_rate_and_of_the_seed() -> None:
    moments = np.array(poisson(200.0, 30.0, seed=1))
    assert abs(len(moments) - 6000) <= 4 * np.sqrt(6000)
    assert (np.diff(moments) > 0).all()
    assert moments[0] > 0
    assert moments[-1] < 30.0
    # Exponential gaps: their deviation is their mean.
    assert np.diff(moments).std() == pytest.approx(1 / 200, rel=0.1)
    assert poisson(200.0, 30.0, seed=1) == moments.tolist()
    assert poisson(200.0, 30.0, seed=2) != moments.tolist()


def test_recovery_is_the_last_bad_second() -> None:
    def recovery(bad: set[int]) -> float:
        found = Measurement(PLAN, load=Samples(PLAN.overload_seconds + PLAN.recovery_seconds))
        for step in range(80):
            outcome = Outcome.REFUSED if step // 10 in bad else Outcome.ANSWERED
            found.load.add(PLAN.overload_seconds + step / 10, 0.0, 0.01, outcome)
        return found.recovery

    assert recovery(set()) == 0.0
    assert recovery({0, 2}) == 3.0
    assert recovery({7}) == float("inf")
