"""Traffic: seeded, of the asked-for shape, never the same request twice, and understood by the server's own parser."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mtgr.bundle import STORE_FILE, Bundle
from mtgr.client.wire import encode
from mtgr.errors import ConfigurationError, InvalidRequestError
from mtgr.features.catalog import CATALOG_FILE
from mtgr.features.extract import FeatureExtractor
from mtgr.features.sqlite import write_store
from mtgr.features.store import UserRecord
from mtgr.routing.buckets import CANDIDATE_BUCKETS
from mtgr.schema import SCHEMA_FILE
from perf.load import Outcome, open_loop, poisson
from perf.synthetic import EPOCH, SPAN, synthetic_catalog, synthetic_schema
from perf.workload import (
    Kind,
    Traffic,
    Visit,
    WorkloadConfig,
    digest,
    door_steps,
    generated_traffic,
    row_steps,
    stored_traffic,
    summary,
    write_input,
)

USERS, EVENTS = 200, 400


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("bundle")
    generator = np.random.default_rng(1)
    catalog = synthetic_catalog(500, generator)
    schema = synthetic_schema(catalog, max_history=200)
    catalog.save(directory / CATALOG_FILE)
    schema.save(directory / SCHEMA_FILE)

    def record() -> UserRecord:
        return UserRecord(
            {"age": 30, "gender": "F"},
            generator.choice(catalog.raw_ids, EVENTS),
            generator.integers(0, 5, EVENTS).astype(np.int32),
            np.sort(generator.integers(EPOCH, EPOCH + SPAN, EVENTS)),
        )

    write_store(directory / STORE_FILE, ((f"user-{index}", record()) for index in range(USERS)))
    return Bundle(schema, catalog, directory)


def by_user(visits: list[Visit]) -> dict[str, list[Visit]]:
    groups: dict[str, list[Visit]] = defaultdict(list)
    for visit in visits:
        groups[visit.request.user_id].append(visit)
    return groups


@pytest.mark.parametrize("source", ["stored", "generated"])
def test_same_seed_same_traffic(bundle: Bundle, source: str) -> None:
    def digests(seed: int) -> list[bytes]:
        config = WorkloadConfig(seed=seed, bad_share=0.1)
        make = {"stored": stored_traffic, "generated": lambda *of: generated_traffic(*of, users=50)}[source]
        return [digest(visit.request) for visit in make(bundle, config).take(200)]

    first = digests(3)
    assert digests(3) == first
    assert not set(digests(4)) & set(first)
    assert len(set(first)) == 200


def test_shares_and_laws(bundle: Bundle) -> None:
    config = WorkloadConfig(zipf=1.0, new_user_share=0.1, repeat_share=0.2, bad_share=0.05, events_between_visits=2.0)
    visits = stored_traffic(bundle, config).take(6000)
    found = summary(config, visits)
    assert (found.requests_generated, found.unique_payloads) == (6000, 6000)
    for share, meant in ((found.new_user_share, 0.1), (found.repeat_share, 0.2), (found.bad_share, 0.05)):
        assert share == pytest.approx(meant, abs=0.015)
    # A returning user has 2 new events on the mean; first visits, and those that start again, have none.
    assert 1.4 < found.events_between_visits < 2.1
    assert found.candidates.p50 == pytest.approx(64, rel=0.05)
    assert found.candidates.p99 == pytest.approx(64 * np.exp(0.5 * 2.326), rel=0.15)
    firsts = [group[0].events for user, group in by_user(visits).items() if group[0].kind is Kind.USUAL]
    assert np.median(firsts) == pytest.approx(80, rel=0.3)
    assert np.std(np.log(firsts)) == pytest.approx(0.75, abs=0.15)
    counts = [count for user, count in Counter(visit.request.user_id for visit in visits).most_common()]
    usual = 6000 * 0.85
    harmonic = np.sum(1 / np.arange(1, USERS + 1))
    assert counts[0] == pytest.approx(usual / harmonic, rel=0.15)
    assert counts[9] == pytest.approx(usual / harmonic / 10, rel=0.35)
    even = stored_traffic(bundle, replace(config, zipf=0.0)).take(3000)
    assert Counter(visit.request.user_id for visit in even).most_common(1)[0][1] < 50


@pytest.mark.parametrize("source", ["stored", "generated"])
def test_a_user_comes_back_with_new_events(bundle: Bundle, source: str) -> None:
    """What the server's own parser and extractor make of a sequence: contexts that grow by what was appended."""
    config = WorkloadConfig(zipf=1.5, repeat_share=0.3, new_user_share=0.05)
    traffic = (
        stored_traffic(bundle, config) if source == "stored" else generated_traffic(bundle, config, 40, max_events=150)
    )
    extractor = FeatureExtractor(bundle.schema, bundle.catalog, bundle.store())
    grown = 0
    for user, visits in by_user(traffic.take(400)).items():
        before = None
        for visit in visits:
            features = extractor.extract({tensor.name: tensor.data for tensor in encode(visit.request)})
            events = features.context[len(bundle.schema.profile) :]
            if visit.events < bundle.schema.max_history:
                assert len(events) == visit.events, user
            if visit.kind is Kind.NEW:
                assert features.labels == ("cold_start",)
            if visit.kind is Kind.REPEAT and before is not None:
                assert np.array_equal(events, before)
            if visit.appended and before is not None and len(events) > len(before):
                assert len(events) - len(before) == visit.appended
                columns = [index for index in range(events.shape[1]) if index != 0]  # R may have become S
                assert np.array_equal(events[: len(before), columns], before[:, columns])
                grown += 1
            before = events
    assert grown > 40


def test_nobody_goes_back_in_time_before_all_is_told(bundle: Bundle) -> None:
    for visits in by_user(stored_traffic(bundle, WorkloadConfig(repeat_share=0.4)).take(500)).values():
        moments = [visit.request.request_time or 0 for visit in visits]
        ends = [visit.events >= EVENTS - 1 for visit in visits]
        for before, after, told in zip(moments, moments[1:], ends, strict=False):
            assert after >= before or told


def test_bad_requests_are_refused_and_the_others_not(bundle: Bundle) -> None:
    extractor = FeatureExtractor(bundle.schema, bundle.catalog, bundle.store())
    visits = stored_traffic(bundle, WorkloadConfig(bad_share=0.3)).take(200)
    sentences = set()
    for visit, tensors in zip(visits, door_steps(visits, "onnx"), strict=True):
        values = {tensor.name: tensor.data for tensor in tensors}
        if visit.kind is Kind.BAD:
            with pytest.raises(InvalidRequestError) as caught:
                extractor.extract(values)
            sentences.add(str(caught.value).split()[0])
        else:
            assert extractor.extract(values).strategy == "onnx"
    assert sentences == {"top_k", "strategy", "request_time"}


def test_perf_analyzer_input(bundle: Bundle, tmp_path: Path) -> None:
    visits = stored_traffic(bundle, WorkloadConfig()).take(60)
    path = write_input(tmp_path / "input.json", door_steps(visits, "vllm"))
    steps = json.loads(path.read_text(encoding="utf-8"))["data"]
    assert len({json.dumps(step) for step in steps}) == 60
    for step, visit in zip(steps, visits, strict=True):
        assert step["user_id"] == {"content": [visit.request.user_id], "shape": [1]}
        assert step["strategy"]["content"] == ["vllm"]
        assert step["candidates"]["shape"] == [len(step["candidates"]["content"])]
        assert step["candidates"]["content"] == list(visit.request.candidates)


def test_ready_rows_are_padded_to_buckets(bundle: Bundle, tmp_path: Path) -> None:
    visits = stored_traffic(bundle, WorkloadConfig()).take(20)
    rows = list(row_steps(visits, bundle))
    for visit, (context, candidates) in zip(visits, rows, strict=True):
        assert context.data.shape[1] in (64, 128, 192, 256, 384)
        assert candidates.data.shape[1] in CANDIDATE_BUCKETS
        assert np.count_nonzero(candidates.data[0, :, 0]) == len(visit.request.candidates)
    write_input(tmp_path / "rows.json", rows)
    step = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["data"][0]
    assert step["context"]["shape"] == list(rows[0][0].data.shape[1:])
    assert step["context"]["content"] == rows[0][0].data.ravel().tolist()
    with pytest.raises(ConfigurationError, match="bad_share 0"):
        list(row_steps(stored_traffic(bundle, WorkloadConfig(bad_share=0.8)).take(20), bundle))


@pytest.mark.parametrize("apart", [30, 10 * USERS])
def test_nobody_asks_again_at_once(bundle: Bundle, apart: int) -> None:
    config = WorkloadConfig(zipf=1.0, new_user_share=0.0, repeat_share=0.0, apart=apart)
    users = [visit.request.user_id for visit in stored_traffic(bundle, config).take(1500)]
    apart = min(apart, USERS // 2)
    for start in range(len(users) - apart + 1):
        assert len(set(users[start : start + apart])) == apart
    assert Counter(users).most_common(1)[0][1] > 3 * 1500 / USERS or apart == USERS // 2


def test_few_items_do_not_repeat_a_request(bundle: Bundle) -> None:
    traffic = stored_traffic(bundle, WorkloadConfig(repeat_share=0.9, candidates_median=1, candidates_sigma=0))
    few = Traffic(traffic.users, traffic.items[:200], traffic.config).take(300)
    assert len({digest(visit.request) for visit in few}) == 300


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"zipf": -1}, "zipf is -1; it must not be negative"),
        ({"apart": -1}, "apart is -1; it must not be negative"),
        ({"history_median": 0}, "history_median is 0; it must be at least 1"),
        ({"bad_share": 0.6, "repeat_share": 0.5}, "nor their sum above 1"),
        ({"new_user_share": -0.1}, "none may be negative"),
    ],
)
def test_what_makes_no_traffic(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        WorkloadConfig(**values)


def test_visits_of_a_user_go_one_after_the_other() -> None:
    """A slow server: what a visit waits for the one before counts, and other users do not wait."""
    running: Counter[str] = Counter()
    order: dict[str, list[int]] = defaultdict(list)
    keys = ["a", "a", "b", "a", "c"]

    async def call(index: int) -> None:
        running[keys[index]] += 1
        assert running[keys[index]] == 1
        order[keys[index]].append(index)
        await asyncio.sleep(0.1)
        running[keys[index]] -= 1

    samples = asyncio.run(open_loop(call, [0.0, 0.01, 0.02, 0.03, 0.04], 0.05, keys=keys))
    assert order == {"a": [0, 1, 3], "b": [2], "c": [4]}
    latencies = dict(zip(samples.indices, samples.latencies, strict=True))
    assert latencies[3] == pytest.approx(0.27, abs=0.05)
    assert latencies[4] == pytest.approx(0.1, abs=0.05)
    assert max(samples.lags) < 0.05


def test_a_client_that_falls_behind_cannot_hide_it() -> None:
    async def call(index: int) -> None:
        time.sleep(0.1)

    samples = asyncio.run(open_loop(call, [0.0, 0.01, 0.02], 0.05))
    assert samples.latencies == pytest.approx([0.1, 0.19, 0.28], abs=0.04)
    assert samples.lags == pytest.approx([0.0, 0.09, 0.18], abs=0.04)


def test_a_stalled_server_cannot_hide_it() -> None:
    """Coordinated omission: while the server stands still, requests go on being due, and wait as long as they wait."""
    gate = asyncio.Event()

    async def call(index: int) -> None:
        await gate.wait()

    async def run() -> list[float]:
        asyncio.get_running_loop().call_later(0.5, gate.set)
        arrivals = poisson(200.0, 0.5, seed=1)
        samples = await open_loop(call, arrivals, 0.5)
        assert samples.count(Outcome.ANSWERED) == len(arrivals) > 70
        return samples.latencies

    assert np.median(asyncio.run(run())) == pytest.approx(0.25, abs=0.08)
