"""Mixed good and bad traffic leaves nothing behind on a real server; ``perf.soak`` takes half an hour."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtgr.serving.server import TritonServer
from perf.processes import ServerProcesses, Usage
from perf.repository import ranking_requests
from perf.soak import CANDIDATES, SLACK, Soak, growth, table

SECONDS = float(os.environ.get("MTGR_SOAK_SECONDS", "30"))  # 300 for five minutes
INTERVAL = min(2.0, SECONDS / 20)
WARM_UP = 3000  # requests: by then every shape that this traffic makes has been seen


@pytest.fixture
def server(model_repository: Path) -> Iterator[TritonServer]:
    with TritonServer(model_repository) as running:
        yield running


@pytest.mark.timeout(int(SECONDS) + 300)
def test_nothing_grows_under_mixed_traffic(server: TritonServer, model_repository: Path) -> None:
    soak = Soak(server, ranking_requests(model_repository, 256, CANDIDATES, seed=3), seed=3)
    usages = asyncio.run(soak.run(SECONDS, callers=4, interval=INTERVAL, warm_up=WARM_UP))
    assert not soak.wrong
    # Traffic of every kind, or the rest proves nothing.
    assert min(soak.counts[name] for name in ("answered", "refused as invalid", "given up")) >= 100, soak.counts
    found = growth(usages)
    assert all(one.good for one in found), table(found)


@pytest.mark.parametrize("name", SLACK)
def test_a_leak_is_seen(name: str) -> None:
    """Verdicts on samples of this process that grow steadily, or stand still."""
    process = ServerProcesses(os.getpid(), pss=True)
    usage = process.sample()
    assert usage.processes >= 1
    assert min(usage.rss, usage.pss, usage.handles, usage.threads) > 0

    def run(step: float) -> list[Usage]:
        return [dataclasses.replace(usage, **{name: getattr(usage, name) + index * step}) for index in range(100)]

    assert all(one.good for one in growth(run(0)))
    part, constant = SLACK[name]
    step = (getattr(usage, name) * part + constant + 1) / 50
    assert [one.name for one in growth(run(step)) if not one.good] == [name]


def test_samples_follow_what_a_process_holds(tmp_path: Path) -> None:
    process = ServerProcesses(os.getpid(), pss=True)
    before = process.sample()
    files = [(tmp_path / str(index)).open("w") for index in range(20)]
    block = bytearray(os.urandom(1 << 20) * 32)
    after = process.sample()
    assert after.handles - before.handles == 20
    for name in ("rss", "pss"):
        assert getattr(after, name) - getattr(before, name) >= len(block) * 0.9
    for file in files:
        file.close()
    assert process.sample().handles == before.handles
