"""What is counted: nothing is lost, nothing shrinks, labels are few, and the server is never asked what it refuses."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtgr.errors import UnavailableError
from mtgr.features.extract import Features
from mtgr.metrics import OTHER, MetricRegistry, MetricSpec, stage_seconds
from mtgr.routing.admission import Admission
from mtgr.routing.breaker import BreakerConfig, CircuitBreaker
from mtgr.routing.metrics import RouterMetrics
from mtgr.routing.policy import load_profile
from mtgr.routing.ranker import Ranking
from mtgr.routing.reasons import Reason, reason_of
from mtgr.routing.router import FALLBACK
from mtgr.routing.shadow import Drift
from mtgr.routing.strategies import AUTO, STRATEGIES
from mtgr.schema import TYPE_COLUMN, UNKNOWN, TokenType
from mtgr.triton_metrics import MetricReporter

COUNTER = MetricSpec("c_total", "A counter")
GAUGE = MetricSpec("g", "A gauge", counter=False)
HISTOGRAM = MetricSpec("h", "A histogram", buckets=(0.1, 1.0))
ITEM_COLUMN = 2


class Page:
    """The server's side of ``pb_utils``: what Triton 2.51 refuses, and may die of, fails the test."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.kinds: dict[str, str] = {}
        self.refused: list[str] = []
        self.log: list[str] = []
        self.failing = False
        page = self

        class Metric:
            def __init__(self, kind: str, key: Any) -> None:
                self.kind, self.key = kind, key
                page.values.setdefault(key, 0.0)

            def increment(self, amount: float) -> None:
                if page.failing:
                    raise RuntimeError("the server is going")
                if self.kind != "counter" or not amount >= 0 or math.isinf(amount):
                    page.refused.append(f"increment {self.key} by {amount}")
                page.values[self.key] += amount

            def set(self, value: float) -> None:
                if self.kind != "gauge":
                    page.refused.append(f"set {self.key}")
                page.values[self.key] = value

        class MetricFamily:
            COUNTER, GAUGE = "counter", "gauge"

            def __init__(self, name: str, description: str, kind: str) -> None:
                assert page.kinds.setdefault(name, kind) == kind
                self.name, self.kind = name, kind

            def Metric(self, labels: dict[str, str]) -> Metric:
                return Metric(self.kind, (self.name, tuple(labels.items())))

        class Logger:
            log_error = self.log.append

        self.MetricFamily = MetricFamily
        self.Logger = Logger


def page_of(registry: MetricRegistry) -> Page:
    page = Page()
    MetricReporter(page, registry.changes, seconds=60.0).stop()
    return page


def value(page: Page, name: str, **labels: str) -> float:
    return page.values[name, tuple(labels.items())]


# Finite ones are small enough for their sum to be finite.
amounts = st.floats(-1e300, 1e300) | st.sampled_from((math.inf, -math.inf, math.nan)) | st.integers(-5, 5).map(float)
specs = st.sampled_from(("a", "b")).map(lambda label: MetricSpec("c_total", "A counter", labels=(("l", label),)))
operations = st.lists(
    st.tuples(st.just("increment"), specs, amounts)
    | st.tuples(st.just("advance"), st.just(MetricSpec("t_total", "A total")), amounts)
    | st.tuples(st.just("set"), st.just(GAUGE), amounts)
    | st.tuples(st.just("observe"), st.just(HISTOGRAM), amounts)
    | st.tuples(st.just("report"), st.none(), st.none()),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(operations)
def test_counters_hold_what_was_added_and_never_shrink(steps: list[tuple[str, Any, Any]]) -> None:
    registry, page = MetricRegistry(), Page()
    reporter = MetricReporter(page, registry.changes, seconds=60.0)
    expected: Counter[str] = Counter()
    total, gauge = 0.0, None
    observed: list[float] = []
    before: dict[Any, float] = {}
    for operation, spec, amount in [*steps, ("report", None, None)]:
        if operation == "report":
            reporter.report()
            for key, last in before.items():
                if page.kinds[key[0]] == "counter":
                    assert page.values[key] >= last
            before = dict(page.values)
            continue
        getattr(registry, operation)(spec, amount)
        if operation == "increment" and 0 <= amount < math.inf:
            expected[spec.labels[0][1]] += amount
        elif operation == "advance" and total <= amount < math.inf:
            total = amount
        elif operation == "set" and math.isfinite(amount):
            gauge = amount
        elif operation == "observe" and math.isfinite(amount):
            observed.append(amount)
    reporter.stop()
    assert page.refused == []
    for label, added in expected.items():
        assert value(page, "c_total", l=label) == pytest.approx(added)
    assert page.values.get(("t_total", ()), 0.0) == pytest.approx(total)
    assert page.values.get(("g", ())) == gauge
    if observed:
        for bound in (*HISTOGRAM.buckets, math.inf):
            label = "+Inf" if bound == math.inf else f"{bound:g}"
            assert value(page, "h_bucket", le=label) == sum(one <= bound for one in observed)
        assert value(page, "h_count") == len(observed)
        assert value(page, "h_sum") == pytest.approx(sum(one for one in observed if one > 0))


def test_a_counter_appears_with_its_first_zero() -> None:
    registry = MetricRegistry()
    registry.increment(COUNTER, 0.0)
    registry.advance(MetricSpec("t_total", "A total"), 0.0)
    page = page_of(registry)
    assert value(page, "c_total") == value(page, "t_total") == 0.0


def test_labels_beyond_the_bound_share_one_series() -> None:
    registry = MetricRegistry(max_series=10)
    for index in range(1000):
        registry.increment(MetricSpec("c_total", "A counter", labels=(("user", f"u{index}"), ("k", "v"))))
        registry.set(MetricSpec("g", "A gauge", counter=False, labels=(("user", f"u{index}"),)), 1.0)
    registry.increment(MetricSpec("d_total", "Another", labels=(("user", "u999"),)))
    page = page_of(registry)
    assert len([key for key in page.values if key[0] == "c_total"]) == 11
    assert value(page, "c_total", user=OTHER, k=OTHER) == 990
    assert value(page, "c_total", user="u3", k="v") == 1
    assert value(page, "d_total", user="u999") == 1
    assert len(registry._series) <= 21


def test_a_report_costs_the_same_whatever_was_observed() -> None:
    registry = MetricRegistry()
    for _ in range(50_000):
        registry.observe(HISTOGRAM, 0.5)
    assert len(registry.changes()) == len(HISTOGRAM.buckets) + 3
    assert registry.changes() == []


def test_threads_lose_nothing() -> None:
    registry, page = MetricRegistry(), Page()
    reporter = MetricReporter(page, registry.changes, seconds=0.001)

    def work() -> None:
        for _ in range(3000):
            registry.increment(COUNTER)
            registry.observe(HISTOGRAM, 0.25)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reporter.stop()
    reporter.report()
    assert value(page, "c_total") == 12_000
    assert value(page, "h_count") == value(page, "h_bucket", le="1") == 12_000
    assert value(page, "h_bucket", le="0.1") == 0


def test_the_reporter_never_asks_for_what_the_server_may_die_of() -> None:
    page = Page()
    changes = [(COUNTER, bad) for bad in (-1.0, math.nan, math.inf, -math.inf)] + [(GAUGE, 2.0)]
    MetricReporter(page, lambda: changes, seconds=60.0).stop()
    assert page.refused == []
    assert value(page, "g") == 2.0


def test_the_reporter_goes_on_after_an_error_and_says_it_once() -> None:
    registry, page = MetricRegistry(), Page()
    reporter = MetricReporter(page, registry.changes, seconds=0.002)
    page.failing = True
    until = time.monotonic() + 5
    while not page.log and time.monotonic() < until:
        registry.increment(COUNTER)
        time.sleep(0.005)
    for _ in range(5):
        registry.increment(COUNTER)
        time.sleep(0.005)
    page.failing = False
    registry.increment(COUNTER)
    time.sleep(0.05)
    reporter.stop()
    assert page.log == ["metrics: RuntimeError: the server is going"]
    assert value(page, "c_total") >= 1


# The router's own.


def features(strategy: str = AUTO, candidates: int = 3, arm: str = "default") -> Features:
    return Features(
        context=np.ones((4, 8), dtype=np.int32),
        candidate_state=np.zeros(4, dtype=np.int32),
        candidates=np.arange(candidates, dtype=np.int64),
        strategy=strategy,
        top_k=0,
        arm=arm,
    )


def ranking(strategy: str = "onnx", labels: tuple[str, ...] = ()) -> Ranking:
    items = np.arange(3, dtype=np.int64)
    return Ranking(items, np.zeros(3, np.float32), np.zeros((3, 3), np.float32), strategy, "default", labels)


def test_requests_and_errors_by_strategy_arm_and_reason() -> None:
    metrics = RouterMetrics(MetricRegistry(), ITEM_COLUMN)
    metrics.answered(features(arm="blue"), ranking("onnx", (FALLBACK,)), 0.02)
    metrics.answered(features(arm="blue"), ranking("onnx"), 0.03)
    metrics.answered(features("baseline", candidates=0), ranking("baseline"), 0.5)
    for error in (UnavailableError("user u-17's engine said: out of memory"), RuntimeError("u-17")):
        metrics.refused(features(arm="blue"), reason_of(error), error)
        metrics.engine_failed("tensorrt", reason_of(error))
    metrics.stage("queue", 0.001)
    page = page_of(metrics.registry)
    assert value(page, "mtgr_requests_total", asked=AUTO, strategy="onnx", arm="blue") == 2
    assert value(page, "mtgr_requests_total", asked="baseline", strategy="baseline", arm="default") == 1
    assert value(page, "mtgr_errors_total", asked=AUTO, arm="blue", reason="failed") == 1
    assert value(page, "mtgr_errors_total", asked=AUTO, arm="blue", reason="internal") == 1
    assert value(page, "mtgr_engine_failures_total", strategy="tensorrt", reason="failed") == 1
    assert value(page, "mtgr_fallbacks_total") == 1
    assert value(page, "mtgr_candidates_count") == 2
    assert value(page, "mtgr_request_seconds_count", strategy="onnx") == 2
    assert value(page, "mtgr_request_seconds_bucket", strategy="onnx", le="0.02") == 1
    assert value(page, f"{stage_seconds('queue').name}_count", stage="queue") == 1
    assert "u-17" not in str(page.values)


def test_padding_and_unknown_items_are_counted_in_rows() -> None:
    context = np.zeros((1, 64, 8), dtype=np.int32)
    context[0, :40, TYPE_COLUMN] = TokenType.HISTORY
    candidates = np.zeros((1, 16, 8), dtype=np.int32)
    candidates[0, :10, TYPE_COLUMN] = TokenType.CANDIDATE
    candidates[0, :10, ITEM_COLUMN] = 5
    candidates[0, 3:5, ITEM_COLUMN] = UNKNOWN
    metrics = RouterMetrics(MetricRegistry(), ITEM_COLUMN)
    metrics.rows("onnx", {"context": context, "candidates": candidates})
    metrics.rows("onnx", {"context": context})
    page = page_of(metrics.registry)
    assert value(page, "mtgr_tokens_total", strategy="onnx") == 64 + 16 + 64
    assert value(page, "mtgr_padding_tokens_total", strategy="onnx") == 24 + 6 + 24
    assert value(page, "mtgr_scored_items_total") == 10
    assert value(page, "mtgr_unknown_items_total") == 2


def test_breakers_show_their_state() -> None:
    now = [0.0]
    metrics = RouterMetrics(MetricRegistry(), ITEM_COLUMN)
    config = BreakerConfig(consecutive_failures=2, jitter=0.0)
    breaker = CircuitBreaker("mtgr_onnx_rank", config, lambda: now[0], random.Random(1), metrics.breaker)
    labels = {"model": "mtgr_onnx_rank"}

    def call(ok: bool) -> None:
        permit = breaker.allow()
        assert permit is not None
        permit.record(ok, 0.1)

    page = Page()
    reporter = MetricReporter(page, metrics.registry.changes, seconds=60.0)
    states = []
    for ok in (False, False, False, True):
        call(ok)
        reporter.report()
        states.append(page.values.get(("mtgr_breaker_state", tuple(labels.items()))))
        now[0] += 2.0
    reporter.stop()
    assert states == [None, 2.0, 2.0, 0.0]
    assert value(page, "mtgr_breaker_openings_total", **labels) == 2


def test_what_others_keep() -> None:
    metrics = RouterMetrics(MetricRegistry(), ITEM_COLUMN)
    admission = Admission("m")
    metrics.report(load_profile("prod"), admission, reloads=2, refusals=1)
    metrics.report(load_profile("prod"), admission, reloads=3, refusals=1)
    metrics.shadow(Drift(0.001, 0.0001, 0.9))
    metrics.shadow(None)
    page = page_of(metrics.registry)
    assert value(page, "mtgr_policy_reloads_total") == 3
    assert value(page, "mtgr_policy_refusals_total") == 1
    assert value(page, "mtgr_router_limit") == admission.limit
    assert value(page, "mtgr_shadow_max_error_sum") == 0.001
    assert value(page, "mtgr_shadow_unanswered_total") == 1


def test_all_labels_there_are_stay_few() -> None:
    metrics = RouterMetrics(MetricRegistry(), ITEM_COLUMN)
    for asked in (AUTO, *STRATEGIES):
        for arm in ("default", "a", "b"):
            for reason in Reason:
                metrics.refused(features(asked, arm=arm), reason, RuntimeError(f"{asked} {arm} at {time.time()}"))
            for served in STRATEGIES:
                metrics.answered(features(asked, arm=arm), ranking(served), 0.1)
    page = page_of(metrics.registry)
    assert not any(text == OTHER for _, labels in page.values for _, text in labels)
    assert len(page.values) < 300
