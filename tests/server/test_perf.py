"""A small performance run with the real perf_analyzer on a real server: what both sides count is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtgr.bundle import load_bundle
from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.serving.server import TritonServer
from perf.analyzer import Analyzer, Samples, StalledError, find_analyzer
from perf.measure import DIRECT, Bench, mean_batch, mismatches
from perf.model_memory import SERVER
from perf.results_format import PerfResult, load
from perf.run import main
from perf.watch import answered_by, quiet_page
from perf.workload import Kind, WorkloadConfig, door_steps, stored_traffic, write_input

STRATEGIES = ("baseline", "onnx", "auto", DIRECT)


@pytest.fixture(scope="module")
def result(model_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> PerfResult:
    try:
        find_analyzer()
    except ConfigurationError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("perf")
    arguments = ["--model-repository", str(model_repository), "--out", str(out), "--name", "small", "--seed", "7"]
    arguments += ["--concurrency", "1,8", "--rate-shares", "0.5", "--repeats", "1"]
    arguments += ["--seconds", "0.8", "--warm-seconds", "0.5", "--kpi-seconds", "3", "--fill", "200"]
    # 0 means that counts of server and client are the same, at every point.
    assert main(arguments) == 0
    return load(out / "small.json")


def test_every_point_was_measured(result: PerfResult) -> None:
    sweep = {(point.strategy, point.level) for point in result.points if point.mode == "concurrency"}
    assert sweep == {(strategy, level) for strategy in STRATEGIES for level in (1.0, 8.0)}
    rates = [point for point in result.points if point.mode == "request_rate"]
    assert {point.strategy for point in rates} == {"baseline", "onnx", "auto"}
    assert {point.tool for point in result.points if point.mode == "concurrency"} == {"perf_analyzer"}
    assert {point.tool for point in rates} == {"perf_analyzer" if find_analyzer().exact_rates else "load_generator"}
    for point in result.points:
        assert not point.errors, point
        assert point.requests == len(point.latency_samples_ms) >= 20
        assert 0 < point.latency_ms.p50 <= point.latency_ms.p99 <= point.latency_ms.max
        assert point.server_memory_bytes > 100 << 20
        assert point.cpu_seconds > 0
    for point in rates:
        assert point.offered_rate is not None
        assert point.throughput == pytest.approx(point.offered_rate, rel=0.6)


def test_each_model_has_memory_of_its_own(result: PerfResult) -> None:
    whole = max(point.server_memory_bytes for point in result.points)
    assert {"mtgr_baseline", "mtgr_onnx_rank", "mtgr_features", "mtgr_router", SERVER} <= set(result.memory)
    assert all(10 << 20 < found.host_bytes < whole for found in result.memory.values())
    assert sum(found.host_bytes for found in result.memory.values()) < whole


def test_server_and_client_count_the_same(result: PerfResult) -> None:
    for point in result.points:
        assert mismatches(point) == []
        if point.strategy == DIRECT:
            assert set(point.models) == {"mtgr_onnx_rank"}
        else:
            assert {"features", "engine"} <= set(point.stages_ms)
        if point.strategy in ("baseline", "onnx"):
            assert point.answered_by == {point.strategy: point.requests}
    merged = [mean_batch(*result.of("onnx", "concurrency", level)) or 0.0 for level in (1.0, 8.0)]
    assert merged[0] == 1.0 < merged[1]


def test_no_payload_is_sent_twice(result: PerfResult) -> None:
    sent = sum(point.requests + point.rightly_refused for point in result.points)
    assert result.workload.requests_generated == result.workload.unique_payloads == sent


def test_key_figures_come_from_an_open_loop(result: PerfResult) -> None:
    assert result.kpi is not None
    point = result.points[result.kpi.point]
    assert (point.mode, point.tool, point.strategy) == ("open_loop", "load_generator", "auto")
    assert result.kpi.rate == pytest.approx(0.7 * result.kpi.saturation, rel=0.01)
    assert point.requests + point.rightly_refused == pytest.approx(result.kpi.rate * 3, rel=0.3)
    assert point.client_lag_ms is not None


def test_it_says_how_to_do_it_again(result: PerfResult) -> None:
    assert result.run.seed == 7
    assert result.run.git_revision
    assert len(result.run.checkpoint_version) == 64
    assert result.threads["mtgr_onnx_rank.intra_op_thread_count"] == 1
    assert result.versions["perf_analyzer"].startswith("2.")
    assert result.versions["triton"].startswith("2.")
    for point in result.points:
        if point.tool != "perf_analyzer":
            continue
        assert "-m" in point.command
        assert any(part.startswith("--request-count=") for part in point.command)


def test_what_is_known_of_rates_holds_for_the_perf_analyzer_at_hand(
    server: TritonServer, model_repository: Path, tmp_path: Path
) -> None:
    try:
        analyzer = find_analyzer()
    except ConfigurationError as error:
        pytest.skip(str(error))
    visits = stored_traffic(load_bundle(model_repository), WorkloadConfig(seed=4)).take(60)
    data = write_input(tmp_path / "input.json", door_steps(visits, "baseline"))
    before = quiet_page(server)
    samples = analyzer.run(server.grpc_url, "mtgr", data, 60, rate=40.0)
    served = sum(answered_by(before, quiet_page(server)).values())
    assert len(samples.latencies_ms) == 60
    assert served == (60 if analyzer.exact_rates else 120)


class GivesUp(Analyzer):
    """perf_analyzer as it is where the server refuses a request, or where it does not end."""

    def __init__(self, errors: list[UnavailableError]) -> None:
        self.errors = errors
        self.exact_rates = True

    def run(self, *_: Any, **__: Any) -> Samples:
        raise self.errors.pop(0)


def test_where_perf_analyzer_gives_up_the_load_generator_counts(
    server: TritonServer, model_repository: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(model_repository)
    stalled = [StalledError("perf_analyzer did not end within 1 s.") for _ in range(3)]
    gives_up = GivesUp([*stalled, UnavailableError("perf_analyzer failed: Failed to retrieve results.")])
    bench = Bench(server, bundle, gives_up, tmp_path)
    traffic = stored_traffic(bundle, WorkloadConfig(bad_share=0.2, seed=3))
    good = []
    while len(good) < 160:
        good += [visit for visit in traffic.take(40) if visit.kind is not Kind.BAD]
    closed = bench.concurrency("onnx", good[:60], 4, 0)
    paced = bench.request_rate("onnx", good[60:160], 50.0, 0, seed=1)
    mixed = traffic.take(150)
    assert not gives_up.errors
    opened = bench.open_loop("baseline", mixed, 40.0, 3.0, seed=2)
    assert {point.tool for point in (closed, paced, opened)} == {"load_generator"}
    assert [mismatches(point) for point in (closed, paced, opened)] == [[], [], []]
    assert closed.requests == 60
    assert closed.throughput == pytest.approx(60 / closed.seconds, rel=0.01)
    assert paced.requests == pytest.approx(100, abs=30)
    sent = opened.requests + opened.rightly_refused
    bad = sum(visit.kind is Kind.BAD for visit in mixed[:sent])
    assert opened.rightly_refused == bad > 5
    assert not opened.errors
    assert not list(tmp_path.iterdir())
