"""What a server's processes hold: memory, file handles, threads, shared memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    """Processor time of a process so far, without its children's; 0 if it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS
    return 0.0


@dataclass(frozen=True)
class Usage:
    """Of a process and all that descend from it, at one moment.

    Attributes:
        seconds: Since the first sample.
        processes: Processes that were found.
        rss: Bytes of resident memory; what processes share counts once for each of them.
        pss: The same with what is shared divided among those who share it; 0 if it was not asked for.
        handles: Open files and sockets.
        threads: Threads.
        shared_files: Files of /dev/shm that are mapped.
        shared_bytes: Their size.
    """

    seconds: float
    processes: int
    rss: int
    pss: int
    handles: int
    threads: int
    shared_files: int
    shared_bytes: int


class ServerProcesses:
    """Looks at a server's processes.

    Args:
        pid: The server's process.
        pss: Whether to ask for ``pss``, for which the system walks all pages: milliseconds, not microseconds.
    """

    def __init__(self, pid: int, pss: bool = False) -> None:
        self._pid = pid
        self._pss = pss
        self._started = time.monotonic()

    def sample(self) -> Usage:
        """What they hold now."""
        totals = {"rss": 0, "pss": 0, "handles": 0, "threads": 0}
        segments: set[str] = set()
        found = self.processes()
        for pid in found:
            process = Path(f"/proc/{pid}")
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                totals["rss"] += int((process / "statm").read_text().split()[1]) * _PAGE
                totals["handles"] += len(os.listdir(process / "fd"))
                totals["threads"] += len(os.listdir(process / "task"))
                if self._pss:
                    rollup = (process / "smaps_rollup").read_text()
                    totals["pss"] += int(rollup.split("\nPss:", 1)[1].split(maxsplit=1)[0]) << 10
                segments |= {
                    line.split(maxsplit=5)[5]
                    for line in (process / "maps").read_text().splitlines()
                    if " /dev/shm/" in line and "(deleted)" not in line
                }
        sizes = []
        for segment in segments:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(Path(segment).stat().st_size)
        return Usage(
            seconds=round(time.monotonic() - self._started, 3),
            processes=len(found),
            shared_files=len(sizes),
            shared_bytes=sum(sizes),
            **totals,
        )

    def processes(self) -> list[int]:
        """Process ids that are alive, the server's own first."""
        return [process for process, _ in self.tree()]

    def tree(self) -> list[tuple[int, int]]:
        """Processes that are alive with their parents, the server's own first and every parent before its children."""
        children: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(path.parent.name))
        found = [(self._pid, 0)]
        for pid, _ in found:
            found += [(child, pid) for child in children.get(pid, ())]
        return found

    @contextlib.asynccontextmanager
    async def watched(self, interval: float) -> AsyncIterator[list[Usage]]:
        """A list that gets a sample every ``interval`` seconds for as long as the block runs."""
        usages: list[Usage] = []

        async def watch() -> None:
            while True:
                # In a thread: reading maps must not hold up the load.
                usages.append(await asyncio.to_thread(self.sample))
                await asyncio.sleep(interval)

        task = asyncio.create_task(watch())
        try:
            yield usages
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def columns(usages: list[Usage]) -> dict[str, list[float]]:
    """Raw samples for a result file."""
    rows = [asdict(usage) for usage in usages]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
