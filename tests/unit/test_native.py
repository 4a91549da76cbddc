"""Compiled loops: the same numbers as Python's own, and a cache that follows the text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mtgr.features import buckets, catalog, context, native, state
from mtgr.schema import LOG_COUNT_SIZE

PROGRAM = """
from mtgr.features.buckets import log_id
from mtgr.features.native import _FOLDER
print(log_id(6, 34), _FOLDER)
"""


def run(environment: dict[str, str]) -> tuple[int, str]:
    """Import in a process of its own: the id of 6, and where compiled functions are kept."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    number, folder = done.stdout.split()
    return int(number), folder


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (buckets.log_id, (10**6, LOG_COUNT_SIZE)),
        (buckets.log_id, (-1, LOG_COUNT_SIZE)),
        (buckets.rate_id, (3, 7, 22)),
        (buckets.deviation_id, (-1000, 24, 34)),
        (buckets.hour_id, (-1,)),
        (catalog.strength_of, (9, 5)),
        (context.seconds_since, (2**40, 5)),
    ],
)
def test_compiled_rules_are_pythons(function: object, arguments: tuple[int, ...]) -> None:
    """Floor division and the like mean the same in both."""
    plain = getattr(function, "py_func")  # noqa: B009 - Numba's attribute, which types do not know
    assert function(*arguments) == plain(*arguments)  # type: ignore[operator]


@pytest.mark.parametrize("largest", [0, 255, 256, 70_000, 2**40])
def test_items_are_sorted_stably(largest: int) -> None:
    items = np.random.default_rng(largest).integers(0, largest + 1, 300)
    np.testing.assert_array_equal(state._by_item(items), np.argsort(items, kind="stable"))


def test_what_was_compiled_is_kept(tmp_path: Path) -> None:
    assert run({"XDG_CACHE_HOME": str(tmp_path)})[0] == 4
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    assert kept
    number, folder = run({"XDG_CACHE_HOME": str(tmp_path)})
    assert number == 4
    assert Path(folder).is_relative_to(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")} == kept


def test_a_cache_that_cannot_be_written_gives_way_to_the_home_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    number, folder = run({"XDG_CACHE_HOME": "/proc", "HOME": str(home)})
    assert number == 4
    assert Path(folder).is_relative_to(home)
    assert run({"XDG_CACHE_HOME": "/proc", "HOME": "/proc"}) == (4, "None")


def test_a_cache_that_cannot_be_read_is_done_without(tmp_path: Path) -> None:
    run({"XDG_CACHE_HOME": str(tmp_path)})
    for path in tmp_path.rglob("*.nbi"):
        path.write_bytes(b"")
    assert run({"XDG_CACHE_HOME": str(tmp_path)})[0] == 4


def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    folder = Path(run({"XDG_CACHE_HOME": str(tmp_path)})[1])
    folder.chmod(0o777)
    number, other = run({"XDG_CACHE_HOME": str(tmp_path), "HOME": str(home)})
    assert number == 4
    assert Path(other).is_relative_to(home)


def test_every_file_with_loops_is_known() -> None:
    """Or a change to it would leave what was compiled of the old one in use."""
    package = Path(native.__file__).parents[1]
    with_loops = {
        path for path in package.rglob("*.py") if "mtgr.features.native import" in path.read_text(encoding="utf-8")
    }
    assert with_loops
    assert with_loops <= set(native.sources())
