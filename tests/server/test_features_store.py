"""The door in front of a real Redis: fresh, with events appended while it serves, without Redis, and with it again."""

from __future__ import annotations

import re
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mtgr.bundle import load_bundle
from mtgr.client import History, MTGRClient, Recommendation
from mtgr.features.redis import RedisStore
from mtgr.features.store import HistoryLimit
from mtgr.serving.server import TritonServer
from tests.unit.redis_server import RedisServer

REQUEST_TIME = 893_286_639 + 86_400  # a day after the last event of the log
USERS = ("196", "22", "6", "405")
TTL = 0.5


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory() as directory:
        server = RedisServer(Path(directory), "--requirepass", "secret")
        yield server
        server.kill()


def store_url(redis_server: RedisServer) -> str:
    return f"unix://:secret@{redis_server.socket}"


@pytest.fixture(scope="module")
def repository(model_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same models, but features that are soon too old."""
    directory = tmp_path_factory.mktemp("redis-repository")
    for model in model_repository.iterdir():
        if model.name != "mtgr_features":
            (directory / model.name).symlink_to(model)
    (directory / "mtgr_features").mkdir()
    for part in (model_repository / "mtgr_features").iterdir():
        if part.name != "config.pbtxt":
            (directory / "mtgr_features" / part.name).symlink_to(part)
    config = (model_repository / "mtgr_features" / "config.pbtxt").read_text(encoding="utf-8")
    for name, value in (("cache_ttl_seconds", TTL), ("store_retry_seconds", 0.1), ("store_timeout_ms", 500)):
        config, changed = re.subn(rf'("{name}" +value: {{ string_value: )"[^"]*"', rf'\g<1>"{value}"', config)
        assert changed == 1
    (directory / "mtgr_features" / "config.pbtxt").write_text(config, encoding="utf-8")
    return directory


def load(redis_server: RedisServer, repository: Path) -> None:
    bundle = load_bundle(repository)
    source = bundle.store()
    target = RedisStore(store_url(redis_server), HistoryLimit.of(bundle.schema), timeout=5.0)
    target.put_many((user, record) for user in source.user_ids() if (record := source.get(user)) is not None)
    target.close()


@pytest.fixture(scope="module")
def fed_server(redis_server: RedisServer, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    load(redis_server, repository)
    secret = tmp_path_factory.mktemp("secret") / "url"
    secret.write_text(store_url(redis_server) + "\n", encoding="utf-8")
    with TritonServer(repository, environment={"MTGR_STORE_URL_FILE": str(secret)}) as running:
        yield f"{running.grpc_url} {running.metrics_url}"


@pytest.fixture
def client(fed_server: str) -> Iterator[MTGRClient]:
    with MTGRClient(fed_server.split()[0]) as client:
        yield client


@pytest.fixture
def embedded(server: TritonServer) -> Iterator[MTGRClient]:
    with MTGRClient(server.grpc_url) as client:
        yield client


def rank(client: MTGRClient, repository: Path, user: str, **more: object) -> Recommendation:
    candidates = load_bundle(repository).catalog.raw_ids[:50]
    return client.rank(user, candidates, strategy="onnx", request_time=REQUEST_TIME, **more)  # type: ignore[arg-type]


def assert_equal(first: Recommendation, second: Recommendation) -> None:
    np.testing.assert_array_equal(first.items, second.items)
    np.testing.assert_array_equal(first.task_scores, second.task_scores)


def wait_for(ask: Callable[[], Recommendation], good: Callable[[Recommendation], bool]) -> Recommendation:
    deadline = time.monotonic() + 10
    while not good(answer := ask()):
        assert time.monotonic() < deadline, f"still {answer.labels}"
        time.sleep(0.02)
    return answer


def metric(fed_server: str, name: str, **labels: str) -> float:
    with urllib.request.urlopen(fed_server.split()[1]) as response:
        lines = response.read().decode().splitlines()
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        float(line.split()[-1])
        for line in lines
        if re.match(rf"{name}[ {{]", line) and all(label in line for label in wanted)
    )


def test_answers_are_those_of_the_embedded_store(client: MTGRClient, embedded: MTGRClient, repository: Path) -> None:
    for user in (*USERS, "nobody"):
        answer, expected = (rank(one, repository, user) for one in (client, embedded))
        assert_equal(answer, expected)
        assert answer.labels == expected.labels == (("cold_start",) if user == "nobody" else ())


def test_an_appended_event_changes_the_answer(
    client: MTGRClient, embedded: MTGRClient, redis_server: RedisServer, repository: Path
) -> None:
    bundle = load_bundle(repository)
    writer = RedisStore(store_url(redis_server), HistoryLimit.of(bundle.schema), timeout=5.0)
    record = bundle.store().get("22")
    assert record is not None
    before = rank(client, repository, "22")
    items, actions, times = [50, 181], [4, 0], [REQUEST_TIME - 60, REQUEST_TIME - 30]
    writer.append_events("22", items, actions, times)
    start = time.monotonic()
    after = wait_for(
        lambda: rank(client, repository, "22"), lambda one: not np.array_equal(one.task_scores, before.task_scores)
    )
    assert time.monotonic() - start < TTL  # by the announcement, not because the time was over
    history = History(
        np.append(record.items, items), np.append(record.actions, actions), np.append(record.times, times)
    )
    assert_equal(after, rank(embedded, repository, "22", history=history))
    assert after.labels == ()
    # A user whom nobody knew is known from the first event on.
    assert rank(client, repository, "newcomer").labels == ("cold_start",)
    writer.append_events("newcomer", [50], [4], [REQUEST_TIME - 60])
    wait_for(lambda: rank(client, repository, "newcomer"), lambda one: one.labels == ())
    writer.close()


def test_without_redis_every_request_is_answered_and_says_so(
    client: MTGRClient, embedded: MTGRClient, fed_server: str, redis_server: RedisServer, repository: Path
) -> None:
    fresh = rank(client, repository, "6")
    assert fresh.labels == ()
    redis_server.kill()
    try:
        time.sleep(TTL + 0.2)
        stale = rank(client, repository, "6")
        assert stale.labels == ("stale_features",)
        assert_equal(stale, fresh)

        record = load_bundle(repository).store().get("13")
        assert record is not None
        history = History(record.items, record.actions, record.times)
        brought = rank(client, repository, "13", history=history, profile=dict(record.profile))
        assert_equal(brought, rank(embedded, repository, "13"))
        assert brought.labels == ()
        assert rank(client, repository, "13", history=history).labels == ("features_unavailable",)

        cold = rank(client, repository, "13")
        assert cold.labels == ("features_unavailable", "cold_start")
        assert_equal(cold, rank(embedded, repository, "nobody"))

        latencies = [rank(client, repository, user).latency_ms for user in USERS * 5]
        assert np.median(latencies) < 100
    finally:
        redis_server.start()

    load(redis_server, repository)
    back = wait_for(lambda: rank(client, repository, "6"), lambda one: one.labels == ())
    assert_equal(back, fresh)
    again = wait_for(lambda: rank(client, repository, "13"), lambda one: one.labels == ())
    assert_equal(again, rank(embedded, repository, "13"))
    # The announcements are followed again, too.
    writer = RedisStore(store_url(redis_server), timeout=5.0)
    wait_for(lambda: rank(client, repository, "back"), lambda one: one.labels == ("cold_start",))
    writer.append_events("back", [50], [4], [REQUEST_TIME - 60])
    wait_for(lambda: rank(client, repository, "back"), lambda one: one.labels == ())
    writer.close()

    time.sleep(1.5)  # metrics are brought up to date once a second
    assert metric(fed_server, "mtgr_features_stale_total") >= 1
    assert metric(fed_server, "mtgr_features_labels_total", label="features_unavailable") >= 2
    assert metric(fed_server, "mtgr_features_store_failures_total") >= 1


def test_hits_and_misses_are_exported(client: MTGRClient, fed_server: str, repository: Path) -> None:
    def counts() -> tuple[float, float, float]:
        time.sleep(1.5)
        names = ("cache_hits_total", "cache_misses_total", "store_seconds")
        hits, misses, seconds = (metric(fed_server, f"mtgr_features_{name}") for name in names)
        return hits, misses, seconds

    before = counts()
    for _ in range(20):
        rank(client, repository, "405")
    hits, misses, seconds = (late - early for late, early in zip(counts(), before, strict=True))
    assert hits + misses == 20
    assert 1 <= misses < 5
    assert 0 < seconds < 1
    assert metric(fed_server, "mtgr_features_cache_bytes") > 1000
