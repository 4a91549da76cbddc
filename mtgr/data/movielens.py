"""MovieLens-100K: 100,000 ratings of 1,682 films by 943 users, with times, profiles, and genres.

The files come out of a wheel on the Python package index that ships them as an example, so that a host which
can install this package can also train. Nothing of that wheel is installed or imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from functools import cached_property
from pathlib import Path

import numpy as np

from mtgr.data.dataset import Interactions, Item, Task, User
from mtgr.data.tasks import engagement, monetization, retention
from mtgr.errors import ConfigurationError, UnavailableError

REQUIREMENT = "recbole==1.2.1"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
WHEEL_FOLDER = "recbole/dataset_example/ml-100k"
FILES_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
NUM_EVENTS, NUM_USERS, NUM_ITEMS = 100_000, 943, 1_682
DOWNLOAD_TIMEOUT_SECONDS = 300

# "Usual Suspects, The" -> "The Usual Suspects", alone or within the parentheses of an original title.
_TRAILING_ARTICLE = re.compile(
    r"(?P<open>^|\()(?P<rest>[^()]+), "
    r"(?P<article>The|An|A|Les|Le|La|L'|Il|O|Das|Der|Die|Det)(?P<close>\)|$| (?=\())"
)
_YEAR = re.compile(r"\d{4}")
_YEAR_IN_TITLE = re.compile(r" \((\d{4})\)$")


class MovieLens100K:
    """The data set as interactions, users, and items; implements ``Dataset``.

    An action is the rating minus 1, so 0 to 4. A user's profile is age (int), gender (M or F), and
    occupation.

    Args:
        cache_dir: Folder that holds, or will hold, ``ml-100k/`` with the three files. By default
            ``$MTGR_DATA_DIR``, else ``build/data`` of the repository, else of the current directory.

    The first access to data fetches the files where they are missing. Raises UnavailableError when they
    cannot be fetched and ConfigurationError when a file is not the published one.
    """

    def __init__(self, cache_dir: Path | None = None) -> None:
        self._folder = (cache_dir if cache_dir is not None else default_cache_dir()) / "ml-100k"

    @property
    def name(self) -> str:
        """Short name, used in schemas and paths."""
        return "ml-100k"

    def interactions(self) -> Interactions:
        """All 100,000 ratings, sorted by (user, time, position in the file)."""
        return self._interactions

    def users(self) -> list[User]:
        """All 943 users, in ascending order of id."""
        return list(self._users)

    def items(self) -> list[Item]:
        """All 1,682 films, in ascending order of id; a film of unknown genre has no category."""
        return list(self._items)

    def tasks(self) -> tuple[Task, ...]:
        """Engagement (rated 4 or 5), retention (back after an hour), monetization (rated 5, a proxy)."""
        return (
            engagement(3, "the user rated the film 4 or 5"),
            retention(),
            monetization(4, "proxy, as nothing is sold here: the user gave the film the top rating, 5"),
        )

    @cached_property
    def _files(self) -> dict[str, bytes]:
        return _cached_files(self._folder)

    @cached_property
    def _users(self) -> tuple[User, ...]:
        rows = _rows(self._files["ml-100k.user"], ("user_id", "age", "gender", "occupation", "zip_code"))
        rows.sort(key=lambda row: int(row[0]))
        _check_count("users", len(rows), NUM_USERS)
        return tuple(User(row[0], {"age": int(row[1]), "gender": row[2], "occupation": row[3]}) for row in rows)

    @cached_property
    def _items(self) -> tuple[Item, ...]:
        rows = _rows(self._files["ml-100k.item"], ("item_id", "movie_title", "release_year", "class"))
        rows.sort(key=lambda row: int(row[0]))
        _check_count("items", len(rows), NUM_ITEMS)
        return tuple(parse_item(*row) for row in rows)

    @cached_property
    def _interactions(self) -> Interactions:
        text = self._files["ml-100k.inter"].decode()
        header, _, body = text.partition("\n")
        _check_header(header, ("user_id", "item_id", "rating", "timestamp"))
        table = np.loadtxt(body.splitlines(), dtype=np.int64, delimiter="\t", ndmin=2)
        _check_count("ratings", len(table), NUM_EVENTS)
        user_ids = np.array([int(user.id) for user in self._users], dtype=np.int64)
        user = np.searchsorted(user_ids, table[:, 0]).astype(np.int64)
        # lexsort is stable: ratings of one user and second keep the order of the file.
        order = np.lexsort((table[:, 3], user))
        user, table = user[order], table[order]
        return Interactions(user, table[:, 1].copy(), (table[:, 2] - 1).astype(np.int32), table[:, 3].copy())


def default_cache_dir() -> Path:
    """``$MTGR_DATA_DIR``, else ``build/data`` of the repository, else of the current directory."""
    override = os.environ.get("MTGR_DATA_DIR")
    if override:
        return Path(override)
    root = Path(__file__).resolve().parents[2]
    return (root if (root / "pyproject.toml").is_file() else Path.cwd()) / "build" / "data"


def readable_title(title: str) -> str:
    """The title with its article in front: "Usual Suspects, The" becomes "The Usual Suspects"."""

    def move(match: re.Match[str]) -> str:
        article = match["article"]
        glue = "" if article.endswith("'") else " "
        return f"{match['open']}{article}{glue}{match['rest']}{match['close']}"

    return _TRAILING_ARTICLE.sub(move, title)


def parse_item(item_id: str, title: str, year: str, categories: str) -> Item:
    """One row of the item file; its few oddities are settled here.

    Film 267 has neither a title nor a year ("unkonwn"), and the year of film 1412 stands in its title.
    """
    parsed_year = int(year) if _YEAR.fullmatch(year) else None
    in_title = _YEAR_IN_TITLE.search(title)
    if parsed_year is None and in_title:
        parsed_year, title = int(in_title[1]), title[: in_title.start()]
    if title == "unkonwn":
        title = "unknown"
    genres = tuple(genre for genre in categories.split() if genre != "unknown")
    return Item(int(item_id), readable_title(title), genres, parsed_year)


def _rows(content: bytes, columns: tuple[str, ...]) -> list[list[str]]:
    header, *lines = content.decode().splitlines()
    _check_header(header, columns)
    return [line.split("\t") for line in lines]


def _check_header(header: str, columns: tuple[str, ...]) -> None:
    found = tuple(column.partition(":")[0] for column in header.split("\t"))
    if found != columns:
        raise ConfigurationError(
            f"A MovieLens-100K file has the columns {', '.join(found)} instead of {', '.join(columns)}: "
            "delete the cached copy to fetch it again."
        )


def _check_count(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise ConfigurationError(
            f"MovieLens-100K has {expected} {what}, but {found} were read: delete the cached copy to fetch it again."
        )


def _cached_files(folder: Path) -> dict[str, bytes]:
    """The three files' contents, fetched first if one is missing, each checked against its published hash."""
    if not all((folder / name).is_file() for name in FILES_SHA256):
        _fetch(folder)
    contents = {name: (folder / name).read_bytes() for name in FILES_SHA256}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != FILES_SHA256[name]:
            raise ConfigurationError(f"{folder / name} is not the published file: delete it to fetch it again.")
    return contents


def _fetch(folder: Path) -> None:
    """Download the wheel with pip, check its hash, and put its three files into ``folder``."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download(Path(scratch), folder)
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
            raise ConfigurationError(
                f"The wheel of {REQUIREMENT} that pip fetched is not the one published on PyPI: "
                "check the package index that pip is configured to use."
            )
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES_SHA256:
                _write_atomically(folder / name, archive.read(f"{WHEEL_FOLDER}/{name}"))


def _download(scratch: Path, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--quiet",
    ]
    command += ["--disable-pip-version-check", REQUIREMENT, "-d", str(scratch)]
    advice = f"connect this host to a package index, or copy {', '.join(FILES_SHA256)} into {folder}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(
            f"pip did not fetch {REQUIREMENT} within {DOWNLOAD_TIMEOUT_SECONDS} s: {advice}."
        ) from error
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1].rstrip(".")
        raise UnavailableError(f"pip could not fetch {REQUIREMENT}, which carries MovieLens-100K ({said}): {advice}.")
    return wheels[0]


def _write_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path`` and rename, so that a reader never meets half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp's files are the owner's alone; a cache may be shared
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
