"""MovieLens 1M and 20M, read from the archives as GroupLens publishes them.

Their licence forbids to pass them on, so that nobody but the user can fetch them: what to fetch and where to put it
stands in the message that is raised while they are missing, and in docs/training.md.
"""

from __future__ import annotations

import csv
from functools import cached_property
from pathlib import Path

import numpy as np

from mtgr.data.dataset import Interactions, Item, Task, User
from mtgr.data.files import Counts, check_header, read_numbers, required_file, sorted_interactions
from mtgr.data.movielens import default_cache_dir, parse_item
from mtgr.data.tasks import engagement, monetization, retention
from mtgr.errors import ConfigurationError

ML_1M = Counts(1_000_209, 6_040, 3_883)
ML_20M = Counts(20_000_263, 138_493, 27_278)

_OCCUPATIONS = 21
_NO_GENRE = "(no genres listed)"


class MovieLens1M:
    """1,000,209 ratings of 3,883 films by 6,040 users; implements ``Dataset``.

    An action is the rating minus 1, so 0 to 4. A user's profile is gender (M or F), age (the lower end of one of
    seven ranges), and occupation (the archive's number).

    Args:
        cache_dir: Folder that holds ``ml-1m/``; by default ``$MTGR_DATA_DIR``, else ``build/data``.
        expected: What a complete copy holds.

    The first access to data reads the files. Raises UnavailableError where they are missing and ConfigurationError
    where they are not the published ones.
    """

    fetch = "download https://files.grouplens.org/datasets/movielens/ml-1m.zip and unpack it into {parent}"

    def __init__(self, cache_dir: Path | None = None, expected: Counts = ML_1M) -> None:
        self._folder = (cache_dir if cache_dir is not None else default_cache_dir()) / "ml-1m"
        self._expected = expected

    @property
    def name(self) -> str:
        """Short name, used in schemas and paths."""
        return "ml-1m"

    def interactions(self) -> Interactions:
        """All ratings, sorted by (user, time, position in the file)."""
        return self._tables[0]

    def users(self) -> list[User]:
        """All users, in ascending order of id."""
        return list(self._tables[1])

    def items(self) -> list[Item]:
        """All films of the archive, rated or not, in ascending order of id: Meta's evaluation ranks all of them."""
        return list(self._tables[2])

    def tasks(self) -> tuple[Task, ...]:
        """Engagement (rated 4 or 5), retention (back after an hour), monetization (rated 5, a proxy)."""
        return (
            engagement(3, "the user rated the film 4 or 5"),
            retention(),
            monetization(4, "proxy, as nothing is sold here: the user gave the film the top rating, 5"),
        )

    @cached_property
    def _tables(self) -> tuple[Interactions, tuple[User, ...], tuple[Item, ...]]:
        users = sorted((self._user(fields) for fields in self._rows("users.dat", 5)), key=lambda user: int(user.id))
        items = sorted((_item(*fields) for fields in self._rows("movies.dat", 3)), key=lambda item: item.id)
        table = read_numbers(self._path("ratings.dat"), (0, 1, 2, 3), 0, "::").astype(np.int64)
        self._expected.check("MovieLens 1M", self._folder, Counts(len(table), len(users), len(items)))
        ids = np.array([int(user.id) for user in users], dtype=np.int64)
        if table[:, 2].min() < 1 or table[:, 2].max() > 5:
            raise ConfigurationError(f"{self._folder / 'ratings.dat'} has a rating outside 1 to 5: unpack it again.")
        log = sorted_interactions(ids, table[:, 0], table[:, 1], (table[:, 2] - 1).astype(np.int32), table[:, 3])
        return log, tuple(users), tuple(items)

    def _path(self, name: str) -> Path:
        return required_file(self._folder, name, "MovieLens 1M", self.fetch.format(parent=self._folder.parent))

    def _rows(self, name: str, columns: int) -> list[list[str]]:
        path = self._path(name)
        rows = [line.split("::") for line in path.read_text(encoding="latin-1").splitlines()]
        if any(len(row) != columns for row in rows):
            raise ConfigurationError(f"{path} has a row without {columns} columns: unpack the archive there again.")
        return rows

    def _user(self, fields: list[str]) -> User:
        user, gender, age, occupation, _ = fields
        if not 0 <= int(occupation) < _OCCUPATIONS:
            raise ConfigurationError(f"user {user} of MovieLens 1M has occupation {occupation}: unpack it again.")
        return User(user, {"gender": gender, "age": int(age), "occupation": f"occupation {occupation}"})


class MovieLens20M:
    """20,000,263 ratings of 27,278 films by 138,493 users; implements ``Dataset``.

    Ratings go from 0.5 to 5 in halves; an action is their rank, 0 to 9. There are no profiles: every user has the one
    profile token ``member``, after which the sequence begins.

    Args:
        cache_dir: Folder that holds ``ml-20m/``; by default ``$MTGR_DATA_DIR``, else ``build/data``.
        expected: What a complete copy holds.

    The first access to data reads the files. Raises UnavailableError where they are missing and ConfigurationError
    where they are not the published ones.
    """

    fetch = "download https://files.grouplens.org/datasets/movielens/ml-20m.zip and unpack it into {parent}"

    def __init__(self, cache_dir: Path | None = None, expected: Counts = ML_20M) -> None:
        self._folder = (cache_dir if cache_dir is not None else default_cache_dir()) / "ml-20m"
        self._expected = expected

    @property
    def name(self) -> str:
        """Short name, used in schemas and paths."""
        return "ml-20m"

    def interactions(self) -> Interactions:
        """All ratings, sorted by (user, time, position in the file)."""
        return self._tables[0]

    def users(self) -> list[User]:
        """All users, in ascending order of id."""
        return list(self._tables[1])

    def items(self) -> list[Item]:
        """All films of the archive, rated or not, in ascending order of id."""
        return list(self._tables[2])

    def tasks(self) -> tuple[Task, ...]:
        """Engagement (rated 4 or more), retention (back after an hour), monetization (rated 5, a proxy)."""
        return (
            engagement(7, "the user rated the film 4 or more"),
            retention(),
            monetization(9, "proxy, as nothing is sold here: the user gave the film the top rating, 5"),
        )

    @cached_property
    def _tables(self) -> tuple[Interactions, tuple[User, ...], tuple[Item, ...]]:
        fetch = self.fetch.format(parent=self._folder.parent)
        ratings, movies = (
            required_file(self._folder, name, "MovieLens 20M", fetch) for name in ("ratings.csv", "movies.csv")
        )
        column = check_header(ratings, ("userId", "movieId", "rating", "timestamp"))
        check_header(movies, ("movieId", "title", "genres"))
        table = read_numbers(ratings, [column[name] for name in ("userId", "movieId", "rating", "timestamp")], 1)
        with open(movies, encoding="utf-8", newline="") as file:
            rows = [(row["movieId"], row["title"], row["genres"]) for row in csv.DictReader(file)]
        items = sorted((_item(*row) for row in rows), key=lambda item: item.id)
        rank = table[:, 2] * 2 - 1
        if np.any(rank != np.rint(rank)) or rank.min() < 0 or rank.max() > 9:
            raise ConfigurationError(f"{ratings} has a rating that is no half star from 0.5 to 5: unpack it again.")
        raw = table[:, 0].astype(np.int64)
        ids = np.unique(raw)
        self._expected.check("MovieLens 20M", self._folder, Counts(len(table), len(ids), len(items)))
        log = sorted_interactions(
            ids, raw, table[:, 1].astype(np.int64), rank.astype(np.int32), table[:, 3].astype(np.int64)
        )
        return log, tuple(User(str(user), {"member": "yes"}) for user in ids.tolist()), tuple(items)


def _item(item_id: str, title: str, genres: str) -> Item:
    """One film; its year stands in its title."""
    names = [] if genres == _NO_GENRE else genres.split("|")
    # Genres are joined by spaces where MovieLens-100K's are read; these have none in their names but Sci-Fi's dash.
    return parse_item(item_id, title.strip(), "", " ".join(names))
