"""Memory that the router and the models in front of it share: how hard the router is pressed, and what comes its way.

Both are processes of one server, and both may be loaded again while the other runs. So the memory is a file that
whoever comes first makes, and that each looks for again from time to time.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from mtgr.routing.pressure import Pressure

Clock = Callable[[], float]

# What was written longer ago says nothing: the router may be gone, or nobody may have asked it since.
FRESH_SECONDS = 0.5

_SHARED_MEMORY = Path("/dev/shm")
_TRIES = 3


class _Record:
    """Numbers at a place of the memory, with when they were written, and a checksum that tells a half-written state."""

    def __init__(self, offset: int, numbers: int) -> None:
        self._format = struct.Struct(f"={1 + numbers}d")
        self._checked = slice(offset, offset + 8 + self._format.size)
        self.end = self._checked.stop

    def write(self, memory: mmap.mmap, now: float, *numbers: float) -> None:
        data = self._format.pack(now, *numbers)
        # At once: packing right into the memory would show zeros for a moment.
        memory[self._checked] = zlib.crc32(data).to_bytes(8, sys.byteorder) + data

    def read(self, memory: mmap.mmap, now: float) -> tuple[float, ...] | None:
        """The numbers; None if they are old, or were never written."""
        for _ in range(_TRIES):
            found = memory[self._checked]
            if zlib.crc32(found[8:]) == int.from_bytes(found[:8], sys.byteorder):
                written, *numbers = self._format.unpack(found[8:])
                return tuple(numbers) if 0 <= now - written <= FRESH_SECONDS else None
        return None


_PRESSURE = _Record(0, len(Pressure._fields))
_ARRIVALS = _Record(_PRESSURE.end, 1)


class PressureBoard:
    """One process's view of the memory, without locks: each record has one process that writes it.

    Args:
        path: The file.
        clock: Gives seconds, the same in all processes of a host.

    Raises:
        OSError: If the file cannot be made, or is somebody else's.
    """

    def __init__(self, path: Path, clock: Clock = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._memory, self._inode = self._open()

    def publish(self, pressure: Pressure) -> None:
        """The router's side: say how it is pressed."""
        _PRESSURE.write(self._memory, self._clock(), *pressure)

    @property
    def pressure(self) -> Pressure | None:
        """The router's pressure; None if it said nothing lately."""
        found = _PRESSURE.read(self._memory, self._clock())
        return None if found is None else Pressure(*found)

    def announce(self, usual_seconds: float) -> None:
        """The door's side: say what time requests usually have left, those that it refuses itself included."""
        _ARRIVALS.write(self._memory, self._clock(), usual_seconds)

    @property
    def usual_seconds(self) -> float | None:
        """What the door announced; None if it said nothing lately."""
        found = _ARRIVALS.read(self._memory, self._clock())
        return None if found is None else found[0]

    def refresh(self) -> None:
        """Look whether the file is still the one that is mapped; to be called from time to time."""
        try:
            if self.path.stat().st_ino == self._inode:
                return
        except OSError:
            pass
        with contextlib.suppress(OSError):
            self._memory, self._inode = self._open()

    def close(self) -> None:
        """Remove the file; who has it mapped keeps the memory, until it looks again."""
        self.path.unlink(missing_ok=True)

    def _open(self) -> tuple[mmap.mmap, int]:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, 0o600)
        try:
            status = os.fstat(descriptor)
            if status.st_uid != os.geteuid():
                raise PermissionError(f"{self.path} belongs to another user.")
            if status.st_size < _ARRIVALS.end:
                os.ftruncate(descriptor, _ARRIVALS.end)
            return mmap.mmap(descriptor, _ARRIVALS.end), status.st_ino
        finally:
            os.close(descriptor)


def server_board() -> PressureBoard | None:
    """The memory of the server whose child this process is; None if there can be none, without which all works too."""
    try:
        path = board_path(os.getppid())
        _remove_orphans(path)
        return PressureBoard(path)
    except OSError:
        return None


def _remove_orphans(path: Path) -> None:
    """Remove the files of servers that were killed."""
    namespace = path.name.split("-")[1]
    for other in path.parent.glob(f"mtgr-{namespace}-*-*"):
        server = other.name.split("-")[2]
        with contextlib.suppress(OSError):
            if not server.isdigit() or other == _path_if_alive(int(server)):
                continue
            other.unlink()


def _path_if_alive(server: int) -> Path | None:
    try:
        return board_path(server)
    except OSError:
        return None


def board_path(server: int) -> Path:
    """Where a server's memory is: a name that no other server of this host has, in whatever container it runs.

    Args:
        server: Its process id.

    Raises:
        OSError: If there is no such process.
    """
    # Process ids are unique within a namespace and at one time; containers may share /dev/shm.
    namespace = os.stat("/proc/self/ns/pid").st_ino
    started = Path(f"/proc/{server}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
    folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    return folder / f"mtgr-{namespace}-{server}-{started}"


class UsualSeconds:
    """What time requests usually have left: a running median, moved by 2% with each; infinite before the first."""

    def __init__(self) -> None:
        self.value = math.inf

    def add(self, remaining: float) -> None:
        """Take one request into account."""
        if math.isinf(self.value):
            self.value = remaining
        else:
            self.value *= 1.02 if remaining > self.value else 1 / 1.02
