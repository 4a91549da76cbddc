"""A process that serves does not stand still to look for garbage among what it loaded."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, torch
from mtgr.collector import settle
before = len(gc.get_objects())
settle()
visited = len(gc.get_objects())
class Cycle: pass
one = Cycle(); one.me = one; del one
print(before, visited, gc.get_freeze_count(), gc.collect())
"""


def test_what_was_loaded_is_not_visited_again() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, visited, frozen, found = map(int, done.stdout.split())
    assert frozen > 50_000 < before
    assert visited < before / 20
    assert found >= 1  # garbage that comes later is still found
