"""The server's log on its way to standard output: all of it there, and a file of bounded size."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from mtgr.serving.log import PassedOnLog

KEPT = 1 << 16


@pytest.mark.parametrize("lines", [1, 20_000])
def test_all_of_it_is_passed_on_and_the_file_keeps_the_end(lines: int, tmp_path: Path) -> None:
    path, target = tmp_path / "log", tmp_path / "output"
    with target.open("wb") as output:
        log = PassedOnLog(path, output, kept_bytes=KEPT)
        with log as writer:
            subprocess.run(["seq", str(lines)], stdout=writer, check=True)
        log.join()
    assert target.read_text().split() == [str(line + 1) for line in range(lines)]
    kept = path.read_bytes()
    assert 0 < len(kept) <= KEPT
    assert target.read_bytes().endswith(kept)


def test_a_reader_that_is_gone_does_not_stop_the_writer(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as output:
        log = PassedOnLog(tmp_path / "log", output, kept_bytes=KEPT)
        with log as inlet:
            subprocess.run(["seq", "20000"], stdout=inlet, check=True, timeout=20)
        log.join()
    assert (tmp_path / "log").read_text().endswith("20000\n")
