"""``python -m mtgr.features``, and the settings of stores: where users come from, and that passwords stay secret."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from mtgr.bundle import STORE_FILE, load_bundle, stage_bundle
from mtgr.checkpoint import Checkpoint, save_checkpoint
from mtgr.errors import ConfigurationError
from mtgr.features.__main__ import main
from mtgr.features.parquet import read_parquet
from mtgr.features.redis import RedisStore
from mtgr.features.settings import FeatureSettings, feature_settings, open_store, store_url
from mtgr.features.sqlite import SQLiteStore, write_store
from mtgr.features.store import HistoryLimit, UserRecord
from tests.conftest import ROOT
from tests.unit.models import small_catalog, small_config, small_schema, spread_model
from tests.unit.redis_server import RedisServer

SCHEMA = small_schema()
CATALOG = small_catalog()
NUM_USERS = 600


def record(index: int) -> UserRecord:
    events = index % 50
    return UserRecord({"age": index}, np.arange(events), np.full(events, 2, dtype=np.int32), np.arange(events) + 1000)


@pytest.fixture(autouse=True)
def no_store_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MTGR_STORE_URL", "MTGR_STORE_URL_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    checkpoint, config = tmp_path / "checkpoint", small_config()
    checkpoint.mkdir()
    save_checkpoint(Checkpoint(spread_model(config, SCHEMA, CATALOG), config, SCHEMA, CATALOG), checkpoint)
    write_store(checkpoint / STORE_FILE, ((f"user-{index}", record(index)) for index in range(NUM_USERS)))
    with ExitStack() as stack:
        stage_bundle(checkpoint, checkpoint / STORE_FILE, tmp_path / "repository", stack)
    return tmp_path / "repository"


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "redis":
        return str(request.getfixturevalue("redis_server").url)
    return f"sqlite://{tmp_path}/copy%20of%20the%20store.sqlite"


def run(repository: Path, *arguments: str) -> int:
    return main([arguments[0], "--model-repository", str(repository), *arguments[1:]])


def test_a_store_is_loaded_whole(repository: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(repository, "load", "--to", url) == 0
    printed = capsys.readouterr()
    assert "600 users with 14,700 events in " in printed.out
    assert "users/s" in printed.out
    assert "100%" in printed.err
    store = open_store(url, None)
    assert len(store.user_ids()) == NUM_USERS
    for index in (0, 1, 49, 599):
        found = store.get(f"user-{index}")
        assert found is not None
        assert found.profile == {"age": index}
        np.testing.assert_array_equal(found.items, record(index).items)
    store.close()


def test_events_are_appended_and_shown(repository: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(repository, "load", "--to", url)
    capsys.readouterr()
    append = ("append", "--to", url, "--user", "user-3")
    assert run(repository, *append, "--item", "50", "51", "--action", "4", "--time", "880000000", "880000100") == 0
    assert capsys.readouterr().out == "user user-3: 2 events appended\n"
    assert run(repository, *append, "--item", "7", "--action", "99") == 0
    assert "this model does not know them" in capsys.readouterr().err
    assert run(repository, "show", "--to", url, "--user", "user-3", "--events", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "user user-3: age 3; 6 events"
    assert lines[1].split() == ["1997-11-20", "04:26:40", "item", "50", "action", "4"]
    assert lines[2].split() == ["1997-11-20", "04:28:20", "item", "51", "action", "4"]
    assert lines[3].split()[2:] == ["item", "7", "action", "99"]
    assert len(lines) == 4
    assert run(repository, "show", "--to", url, "--user", "nobody") == 1


def test_show_looks_into_the_embedded_store_by_default(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(repository, "show", "--user", "user-2") == 0
    assert capsys.readouterr().out.startswith("user user-2: age 2; 2 events\n  1970-01-01 00:16:40")


def test_parquet_is_loaded_by_user_and_time(
    repository: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "events.parquet"
    columns = {
        "time": [30, 10, 20, 20, 5],
        "user_id": [7, 12, 7, 7, 7],
        "item_id": [1, 2, 3, 4, 5],
        "action": [0, 1, 2, 3, 4],
        "profile": ['{"age": 1}', None, '{"age": 2}', None, None],
    }
    parquet.write_table(pa.table(columns), path)
    assert run(repository, "load", "--to", url, "--from", str(path)) == 0
    assert "2 users with 5 events" in capsys.readouterr().out
    store = open_store(url, None)
    seven, twelve = store.get_many(["7", "12"])
    assert seven is not None
    assert twelve is not None
    assert seven.items.tolist() == [5, 3, 4, 1]
    assert seven.actions.tolist() == [4, 2, 3, 0]
    assert seven.profile == {"age": 2}
    assert (twelve.items.tolist(), twelve.profile) == ([2], {})
    store.close()

    del columns["action"]
    parquet.write_table(pa.table(columns), path)
    assert run(repository, "load", "--to", url, "--from", str(path)) == 2
    assert "has no column 'action'" in capsys.readouterr().err


def test_parquet_keeps_the_order_within_a_second(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "events.parquet"
    users = np.random.default_rng(0).integers(0, 3, 3000)
    same = np.zeros(3000, dtype=np.int64)
    columns = {"user_id": users, "item_id": np.arange(3000), "action": same, "time": same}
    parquet.write_table(pa.table(columns), path)
    total, records = read_parquet(path)
    assert total == 3
    for user_id, found in records:
        assert found.items.tolist() == np.flatnonzero(users == int(user_id)).tolist()


def test_without_pyarrow_there_is_a_sentence(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(repository, "load", "--to", f"sqlite://{tmp_path}/s.sqlite", "--from", "events.parquet") == 2
    assert "pip install 'mtgr[parquet]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("load",), "name the store with --to"),
        (("load", "--to", "http://host"), "is not the address of a feature store"),
        (("load", "--to", "sqlite:///x.sqlite", "--from", "/nothing.sqlite"), "there is no feature store at"),
        (("append", "--user", "a", "--item", "1", "2", "--action", "1", "2", "3"), "--action 3; give one or as many"),
        (("append", "--user", "a", "--item", "1", "--action", "1", "--time", "1", "2"), "--time 2; give one"),
        (
            ("append", "--to", "sqlite:///nothing.sqlite", "--user", "a", "--item", "1", "--action", "1"),
            "is no feature",
        ),
        (("show", "--to", "redis://:secret@127.0.0.1:1", "--user", "a"), "redis://127.0.0.1:1 cannot be used"),
        (("show", "--user", ""), "1 to 256 bytes"),
    ],
)
def test_mistakes_are_one_sentence(
    repository: Path, arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(repository, *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert "secret" not in error


def test_times_in_milliseconds_are_refused(repository: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(repository, "load", "--to", url)
    arguments = ("--user", "user-3", "--item", "1", "--action", "1", "--time", "1700000000000")
    assert run(repository, "append", "--to", url, *arguments) == 2
    assert "not milliseconds" in capsys.readouterr().err


def test_the_environment_names_the_store(
    repository: Path, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTGR_STORE_URL", redis_server.url)
    assert run(repository, "load") == 0
    bundle = load_bundle(repository)
    store = bundle.open_store(feature_settings({"store_url": "redis://elsewhere"}))
    assert isinstance(store, RedisStore)
    assert len(store.user_ids()) == NUM_USERS
    store.close()


# Settings.


def test_the_configs_settings_are_the_defaults() -> None:
    text = (ROOT / "model_repository" / "mtgr_features" / "config.pbtxt").read_text(encoding="utf-8")
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    del parameters["profile"], parameters["policy"]  # the adapter takes these out: mtgr.routing.policy
    assert feature_settings(parameters, {}) == feature_settings({}, {}) == FeatureSettings()
    assert len(parameters) == 7


def test_every_parameter_has_its_effect() -> None:
    settings = feature_settings(
        {
            "store_url": "redis://host",
            "store_timeout_ms": "20",
            "store_retry_seconds": "2",
            "cache_bytes": "1e6",
            "cache_ttl_seconds": "3",
            "cache_negative_ttl_seconds": "4",
            "stale_seconds": "5",
        },
        {},
    )
    assert (settings.store_url, settings.store_timeout) == ("redis://host", 0.02)
    cache = settings.cache
    assert (cache.max_bytes, cache.ttl_seconds, cache.negative_ttl_seconds) == (1_000_000, 3.0, 4.0)
    assert (cache.stale_seconds, cache.retry_seconds) == (5.0, 2.0)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"cache_size": "1"}, "unknown parameter 'cache_size'"),
        ({"cache_bytes": "many"}, "cache_bytes is 'many'; it must be a number"),
        ({"cache_ttl_seconds": "-1"}, "must not be negative"),
        ({"stale_seconds": "nan"}, "must not be negative or infinite"),
        ({"store_timeout_ms": "0"}, "store_timeout_ms must be positive"),
        ({"store_url": "redis://user:secret@host/0"}, "store_url holds a password; give it in the environment"),
        ({"store_url": "unix:///socket?password=secret"}, "store_url holds a password; give it in the environment"),
    ],
)
def test_wrong_settings_are_refused(parameters: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        feature_settings(parameters, {})
    assert "secret" not in str(caught.value)


def test_the_variable_comes_before_the_file_and_the_file_before_the_config(tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("redis://:pass@file\n", encoding="utf-8")
    environment = {"MTGR_STORE_URL": "redis://variable", "MTGR_STORE_URL_FILE": str(secret)}
    assert store_url(environment) == "redis://variable"
    del environment["MTGR_STORE_URL"]
    assert feature_settings({"store_url": "redis://config"}, environment).store_url == "redis://:pass@file"
    environment["MTGR_STORE_URL_FILE"] += "-missing"
    with pytest.raises(ConfigurationError, match=r"MTGR_STORE_URL_FILE names .* which cannot be read"):
        feature_settings({}, environment)


def test_every_scheme_opens_its_store(tmp_path: Path) -> None:
    limit = HistoryLimit.of(SCHEMA)
    SQLiteStore.create(tmp_path / "s.sqlite").close()
    for url, kind in (
        ("redis://host:1/2", RedisStore),
        ("rediss://u:p@host:1/2", RedisStore),
        ("unix:///socket", RedisStore),
        (f"sqlite://{tmp_path}/s.sqlite", SQLiteStore),
    ):
        store = open_store(url, limit)
        assert isinstance(store, kind)
        store.close()
    for url in ("", "host:6379", "redis", "sqlite://s.sqlite", "ftp://u:secret@host", "redis://host:port"):
        with pytest.raises(ConfigurationError, match="is not the address") as caught:
            open_store(url, limit)
        assert "secret" not in str(caught.value)


def test_without_redis_py_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mtgr.features.redis", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'mtgr\[serve\]'"):
        open_store("redis://host", None)
