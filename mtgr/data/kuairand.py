"""KuaiRand (Gao et al., CIKM 2022, arXiv 2208.08696): exposures of short videos with many kinds of feedback.

The tasks are click, like and long view. The logs are those of the standard policies; videos that were exposed at random
stand in files of their own and are not read. Times are in milliseconds in the files and in seconds here; the order
within a second is kept.
"""

from __future__ import annotations

import csv
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from mtgr.data.dataset import Int8Array, Interactions, Item, Task, User
from mtgr.data.files import Counts, check_header, read_numbers, required_file, sorted_interactions
from mtgr.data.movielens import default_cache_dir
from mtgr.errors import ConfigurationError

Version = Literal["pure", "1k"]

FOLDERS: dict[str, str] = {"pure": "KuaiRand-Pure", "1k": "KuaiRand-1K"}
EXPECTED: dict[str, Counts] = {
    "pure": Counts(1_436_609, 27_285, 7_551),
    "1k": Counts(11_713_045, 1_000, 4_369_953),
}

# Bits of an action, in ascending order of what they say: an action of more weight is the stronger one.
CLICK, LONG_VIEW, LIKE = 1, 2, 4
WATCHED = LONG_VIEW  # the weakest action that counts as liked: watched to the end, or for long

_LOGS = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08")
_COLUMNS = ("user_id", "video_id", "time_ms", "is_click", "is_like", "long_view")
_PROFILE = (
    "user_active_degree",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
)


class KuaiRand:
    """The logs of one version; implements ``Dataset``.

    An action is the sum of the signals' bits: click 1, long view 2, like 4. A video's categories are its tags.

    Args:
        version: ``pure`` (7,551 videos) or ``1k`` (1,000 users, 4.4 million videos).
        cache_dir: Folder that holds ``KuaiRand-Pure/`` or ``KuaiRand-1K/``; by default ``$MTGR_DATA_DIR``, else
            ``build/data``.
        expected: What a complete copy holds; by default what its authors state.

    The first access to data reads the files. Raises UnavailableError where they are missing and ConfigurationError
    where they are not the published ones.
    """

    fetch = (
        "download {folder}.tar.gz from https://zenodo.org/records/10439422 (its licence is CC BY-SA 4.0) and unpack it "
        "into {parent}"
    )

    def __init__(
        self, version: Version = "pure", cache_dir: Path | None = None, expected: Counts | None = None
    ) -> None:
        self._version = version
        self._root = (cache_dir if cache_dir is not None else default_cache_dir()) / FOLDERS[version]
        self._folder = self._root / "data"
        self._expected = expected or EXPECTED[version]

    @property
    def name(self) -> str:
        """Short name, used in schemas and paths."""
        return f"kuairand-{self._version}"

    def interactions(self) -> Interactions:
        """All exposures by the standard policies, sorted by (user, time, position in the files)."""
        return self._tables[0]

    def users(self) -> list[User]:
        """All users, in ascending order of id."""
        return list(self._tables[1])

    def items(self) -> list[Item]:
        """The videos of the log, in ascending order of id."""
        return list(self._tables[2])

    def tasks(self) -> tuple[Task, ...]:
        """Click, like and long view, as the log has them."""
        return (
            _signal("click", CLICK, "the user clicked the video, or in a one-column feed watched it for 7 s"),
            _signal("like", LIKE, "the user liked the video"),
            _signal("long_view", LONG_VIEW, "the user watched the video to its end, or for 18 s"),
        )

    @cached_property
    def _tables(self) -> tuple[Interactions, tuple[User, ...], tuple[Item, ...]]:
        table = np.concatenate([self._log(name) for name in _LOGS])
        if np.any((table[:, 3:] != 0) & (table[:, 3:] != 1)):
            raise ConfigurationError(f"a log in {self._folder} has a signal that is neither 0 nor 1: unpack it again.")
        users = self._users()
        videos = np.unique(table[:, 1])
        self._expected.check("KuaiRand", self._folder, Counts(len(table), len(users), len(videos)))
        action = CLICK * table[:, 3] + LIKE * table[:, 4] + LONG_VIEW * table[:, 5]
        ids = np.array([int(user.id) for user in users], dtype=np.int64)
        log = sorted_interactions(ids, table[:, 0], table[:, 1], action.astype(np.int32), table[:, 2])
        in_seconds = Interactions(log.user, log.item, log.action, log.time // 1000)
        return in_seconds, tuple(users), tuple(self._items(set(videos.tolist())))

    def _log(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        path = self._path(f"{name}_{self._version}.csv")
        column = check_header(path, _COLUMNS)
        return read_numbers(path, [column[name] for name in _COLUMNS], 1).astype(np.int64)

    def _users(self) -> list[User]:
        path = self._path(f"user_features_{self._version}.csv")
        check_header(path, ("user_id", *_PROFILE))
        with open(path, encoding="utf-8", newline="") as file:
            users = [User(row["user_id"], {name: row[name] for name in _PROFILE}) for row in csv.DictReader(file)]
        return sorted(users, key=lambda user: int(user.id))

    def _items(self, videos: set[int]) -> list[Item]:
        path = self._path(f"video_features_basic_{self._version}.csv")
        check_header(path, ("video_id", "tag"))
        tags: dict[int, tuple[str, ...]] = {}
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if (video := int(row["video_id"])) in videos:
                    tags[video] = tuple(f"tag {tag.strip()}" for tag in row["tag"].split(",") if tag.strip())
        return [Item(video, f"video {video}", tags.get(video, ()), None) for video in sorted(videos)]

    def _path(self, name: str) -> Path:
        fetch = self.fetch.format(folder=FOLDERS[self._version], parent=self._root.parent)
        return required_file(self._folder, name, "KuaiRand", fetch)


def _signal(name: str, bit: int, definition: str) -> Task:
    def label(interactions: Interactions) -> Int8Array:
        return ((interactions.action & bit) > 0).astype(np.int8)

    return Task(name, definition, label)
