"""Readers of datasets that users fetch, on small copies in the published formats; and how logs are split."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mtgr.data.dataset import Dataset, Interactions
from mtgr.data.files import Counts
from mtgr.data.kuairand import EXPECTED, KuaiRand
from mtgr.data.movielens_large import ML_1M, ML_20M, MovieLens1M, MovieLens20M
from mtgr.data.registry import DATASETS, find_dataset
from mtgr.data.split import leave_last_out, leave_one_out_split, split_by, temporal_split
from mtgr.data.tasks import label_all
from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.training.prepare import prepare
from tests.unit.synthetic import LIKED, SyntheticDataset

SIZES = Counts(7, 2, 3)


@pytest.fixture
def ml_1m(tmp_path: Path) -> MovieLens1M:
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    (folder / "users.dat").write_text("10::F::1::0::48067\n2::M::56::16::70072\n", encoding="latin-1")
    (folder / "movies.dat").write_bytes(
        b"1::Toy Story (1995)::Animation|Children's|Comedy\n"
        b"3::Mis\xe9rables, Les (1998)::Drama\n"
        b"5::Unrated (1950)::Sci-Fi|Film-Noir\n"
    )
    (folder / "ratings.dat").write_text(
        "2::1::5::978300760\n2::3::3::978300760\n10::3::1::978302109\n10::1::4::978301968\n"
        "2::3::4::978300000\n2::1::2::978400000\n10::1::5::978500000\n"
    )
    return MovieLens1M(tmp_path, SIZES)


@pytest.fixture
def ml_20m(tmp_path: Path) -> MovieLens20M:
    folder = tmp_path / "ml-20m"
    folder.mkdir()
    (folder / "movies.csv").write_text(
        'movieId,title,genres\n1,Toy Story (1995),Adventure|Children\n29,"City of Lost Children, The (1995)",Sci-Fi\n'
        "131262,Innocence (2014),(no genres listed)\n",
        encoding="utf-8",
    )
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,29,3.5,1112486027\n1,1,0.5,1112484676\n7,1,5.0,1112484819\n"
        "7,29,4.0,1112484727\n7,131262,4.5,1112484727\n1,131262,1.0,1112486030\n7,29,2.0,1112490000\n"
    )
    return MovieLens20M(tmp_path, SIZES)


LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)


def log_row(user: int, video: int, time_ms: int, click: int, like: int, long_view: int) -> str:
    return f"{user},{video},20220421,400,{time_ms},{click},{like},0,0,0,0,{long_view},900,1000,0,0,0,0,1\n"


@pytest.fixture
def kuairand(tmp_path: Path) -> KuaiRand:
    folder = tmp_path / "KuaiRand-Pure" / "data"
    folder.mkdir(parents=True)
    (folder / "log_standard_4_08_to_4_21_pure.csv").write_text(
        LOG_HEADER
        + log_row(3, 20, 1650485801301, 1, 0, 1)
        + log_row(3, 10, 1650485801200, 0, 0, 0)
        + log_row(0, 10, 1650485900000, 1, 1, 0)
    )
    (folder / "log_standard_4_22_to_5_08_pure.csv").write_text(
        LOG_HEADER
        + log_row(0, 20, 1650600000000, 1, 1, 1)
        + log_row(3, 30, 1650600000500, 1, 0, 0)
        + log_row(0, 30, 1650700000000, 0, 0, 0)
        + log_row(3, 10, 1650700000000, 0, 1, 0)
    )
    profile = "user_active_degree,is_live_streamer,is_video_author,follow_user_num_range,fans_user_num_range"
    (folder / "user_features_pure.csv").write_text(
        f"user_id,{profile},friend_user_num_range,register_days_range\n"
        '3,full_active,0,1,"(0,10]","[1,10)",0,730+\n0,high_active,0,0,500+,0,0,91-180\n'
    )
    (folder / "video_features_basic_pure.csv").write_text(
        'video_id,author_id,video_type,tag\n10,5,NORMAL,"12,65"\n20,6,NORMAL,12\n30,6,AD,\n99,1,NORMAL,3\n'
    )
    return KuaiRand("pure", tmp_path, SIZES)


def test_movielens_1m(ml_1m: MovieLens1M) -> None:
    log = ml_1m.interactions()
    assert [user.id for user in ml_1m.users()] == ["2", "10"]
    assert ml_1m.users()[1].profile == {"gender": "F", "age": 1, "occupation": "occupation 0"}
    np.testing.assert_array_equal(log.user, [0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(log.item, [3, 1, 3, 1, 1, 3, 1])  # ratings of one second keep the file's order
    np.testing.assert_array_equal(log.action, [3, 4, 2, 1, 3, 0, 4])
    np.testing.assert_array_equal(log.time[:3], [978300000, 978300760, 978300760])
    titles = [(item.id, item.title, item.year, item.categories) for item in ml_1m.items()]
    assert titles[0] == (1, "Toy Story", 1995, ("Animation", "Children's", "Comedy"))
    assert titles[1] == (3, "Les Misérables", 1998, ("Drama",))
    assert titles[2] == (5, "Unrated", 1950, ("Sci-Fi", "Film-Noir"))  # in the catalogue though nobody rated it


def test_movielens_20m(ml_20m: MovieLens20M) -> None:
    log = ml_20m.interactions()
    assert [user.id for user in ml_20m.users()] == ["1", "7"]
    np.testing.assert_array_equal(log.user, [0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(log.item, [1, 29, 131262, 29, 131262, 1, 29])
    np.testing.assert_array_equal(log.action, [0, 6, 1, 7, 8, 9, 3])
    np.testing.assert_array_equal(label_all(ml_20m.tasks(), log)["engagement"], [0, 0, 0, 1, 1, 1, 0])
    assert [(item.title, item.year, item.categories) for item in ml_20m.items()] == [
        ("Toy Story", 1995, ("Adventure", "Children")),
        ("The City of Lost Children", 1995, ("Sci-Fi",)),
        ("Innocence", 2014, ()),
    ]


def test_kuairand(kuairand: KuaiRand) -> None:
    log = kuairand.interactions()
    assert [user.id for user in kuairand.users()] == ["0", "3"]
    assert kuairand.users()[1].profile["follow_user_num_range"] == "(0,10]"
    np.testing.assert_array_equal(log.user, [0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(log.item, [10, 20, 30, 10, 20, 30, 10])  # milliseconds order what one second holds
    np.testing.assert_array_equal(log.time[3:5], [1650485801, 1650485801])
    labels = label_all(kuairand.tasks(), log)
    np.testing.assert_array_equal(labels["click"], [1, 1, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(labels["like"], [1, 1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(labels["long_view"], [0, 1, 0, 0, 1, 0, 0])
    assert [(item.id, item.categories) for item in kuairand.items()] == [
        (10, ("tag 12", "tag 65")),
        (20, ("tag 12",)),
        (30, ()),
    ]


@pytest.mark.parametrize("reader", ["ml_1m", "ml_20m", "kuairand"])
def test_samples_can_be_made_of_it(reader: str, request: pytest.FixtureRequest) -> None:
    dataset: Dataset = request.getfixturevalue(reader)
    data = prepare(dataset, 3, max_history=16, realtime_step=8, protocol="leave-one-out")
    assert data.schema.task_names == tuple(task.name for task in dataset.tasks())
    (known,) = {len(sample.candidates) for sample in data.held_out_samples()}
    assert known == 1
    assert sum(len(sample.candidates) for sample in data.train_samples()) == 5
    assert all(len(sample.context) > 0 for sample in data.train_samples())


@pytest.mark.parametrize(
    ("dataset", "needed"),
    [
        (MovieLens1M, "ml-1m.zip"),
        (MovieLens20M, "ml-20m.zip"),
        (lambda folder: KuaiRand("pure", folder), "KuaiRand-Pure.tar.gz"),
        (lambda folder: KuaiRand("1k", folder), "KuaiRand-1K.tar.gz"),
    ],
)
def test_missing_files_say_what_to_fetch(dataset: object, needed: str, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=needed) as caught:
        dataset(tmp_path).interactions()  # type: ignore[operator]
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("reader", ["ml_1m", "ml_20m", "kuairand"])
@pytest.mark.parametrize("what", ["events", "users", "items"])
def test_an_incomplete_copy_is_refused(reader: str, what: str, request: pytest.FixtureRequest) -> None:
    dataset = request.getfixturevalue(reader)
    dataset._expected = dataclasses.replace(SIZES, **{what: 9})
    with pytest.raises(ConfigurationError, match=f"has 9 {what}, but"):
        dataset.items()


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="latin-1")
    assert old in text
    path.write_text(text.replace(old, new), encoding="latin-1")


@pytest.mark.parametrize(
    ("reader", "file", "old", "new", "said"),
    [
        ("ml_1m", "ml-1m/ratings.dat", "10::3::1::", "10::3::9::", "rating outside"),
        ("ml_1m", "ml-1m/ratings.dat", "10::3::1::", "10::3::x::", "damaged"),
        ("ml_1m", "ml-1m/ratings.dat", "10::3::1::", "11::3::1::", "user 11"),
        ("ml_1m", "ml-1m/movies.dat", "::Drama", "", "without 3 columns"),
        ("ml_1m", "ml-1m/users.dat", "::16::", "::99::", "occupation 99"),
        ("ml_20m", "ml-20m/ratings.csv", "rating", "stars", "no column rating"),
        ("ml_20m", "ml-20m/ratings.csv", "3.5", "3.7", "half star"),
        ("kuairand", "KuaiRand-Pure/data/log_standard_4_22_to_5_08_pure.csv", "long_view", "view", "long_view"),
        (
            "kuairand",
            "KuaiRand-Pure/data/log_standard_4_08_to_4_21_pure.csv",
            "1650485900000,1",
            "1650485900000,7",
            "0 nor 1",
        ),
        ("kuairand", "KuaiRand-Pure/data/user_features_pure.csv", "register_days_range", "days", "register_days_range"),
    ],
)
def test_damaged_files_are_refused(
    reader: str, file: str, old: str, new: str, said: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    dataset = request.getfixturevalue(reader)
    replace_in(tmp_path / file, old, new)
    with pytest.raises(ConfigurationError, match=said):
        dataset.interactions()


def test_published_counts() -> None:
    assert (ML_1M.events, ML_1M.users, ML_1M.items) == (1_000_209, 6_040, 3_883)
    assert (ML_20M.events, ML_20M.users, ML_20M.items) == (20_000_263, 138_493, 27_278)
    assert EXPECTED["pure"].events == 1_436_609
    assert EXPECTED["1k"].users == 1_000


def test_all_are_registered() -> None:
    names = {find_dataset(name).factory().name for name in DATASETS}
    assert names >= {"ml-100k", "ml-1m", "ml-20m", "kuairand-pure", "kuairand-1k"}


def make_log(users: list[int], times: list[int]) -> Interactions:
    user = np.array(users, dtype=np.int64)
    return Interactions(
        user, np.arange(len(user)), np.zeros(len(user), dtype=np.int32), np.array(times, dtype=np.int64)
    )


def test_leave_one_out_is_by_order_as_published() -> None:
    log = make_log([0, 0, 0, 0, 1, 1, 2, 3, 3, 3], [1, 2, 9, 9, 4, 4, 5, 1, 2, 3])
    split = leave_one_out_split(log, 5)
    assert np.flatnonzero(split.test).tolist() == [3, 5, 9]
    assert np.flatnonzero(split.validation).tolist() == [2, 8]
    assert np.all(split.train.astype(int) + split.validation + split.test == 1)
    # Users 0 and 1 end in a second with two events: by order both are asked, by time user 1 has no history.
    assert leave_last_out(log, 5, by_order=True).tolist() == [3, 5, 9]
    assert leave_last_out(log, 5).tolist() == [3, 9]


def test_temporal_split_cuts_all_users_at_one_moment() -> None:
    generator = np.random.default_rng(0)
    user = np.sort(generator.integers(0, 20, 500))
    time = generator.integers(0, 300, 500)
    order = np.lexsort((time, user))
    log = make_log(user[order].tolist(), time[order].tolist())
    split = temporal_split(log, 0.1, 0.2)
    assert np.all(split.train.astype(int) + split.validation + split.test == 1)
    assert log.time[split.train].max() < log.time[split.validation].min()
    assert log.time[split.validation].max() < log.time[split.test].min()
    assert 0.2 <= split.test.mean() < 0.22
    assert 0.1 <= split.validation.mean() + split.test.mean() - 0.2 < 0.12
    assert not temporal_split(log, 0.0, 0.0).test.any()


def test_nobody_is_asked_for_an_event_of_the_training_part() -> None:
    data = prepare(SyntheticDataset(), LIKED, max_history=16, realtime_step=8, protocol="temporal")
    assert 0 < len(data.last) < 40  # some users were active before the cut alone
    assert not data.known[data.last].any()
    assert data.interactions.time[data.known].max() < data.interactions.time[~data.known].min()


def test_protocols() -> None:
    log = make_log([0] * 20, list(range(20)))
    assert int(split_by("leave-one-out", log, 1, 0.1, 0.2).test.sum()) == 1
    assert int(split_by("chronological", log, 1, 0.1, 0.2).test.sum()) == 4
    assert int(split_by("temporal", log, 1, 0.1, 0.2).test.sum()) == 4
    with pytest.raises(ConfigurationError, match="protocol"):
        split_by("random", log, 1, 0.1, 0.2)  # type: ignore[arg-type]
    for function in (lambda: temporal_split(log, -0.1, 0.2), lambda: temporal_split(log, 0.5, 0.5)):
        with pytest.raises(ConfigurationError, match="fraction"):
            function()
