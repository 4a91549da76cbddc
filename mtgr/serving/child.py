"""A process that belongs to this one: it ends when this one does, whatever the reason."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_TETHER = Path(__file__).with_name("tether.py")
_STOP_S = 10.0
_POLL_S = 0.02
_EXCERPT_LINES = 5


class ChildProcess:
    """A command in a process group of its own, tied to the main thread's life.

    Start it from the main thread: the kernel ends it when the thread that started it ends.

    Args:
        name: For messages.
        command: Path of the executable, and arguments.
        log: File that takes its output; appended to.
        environment: Its whole environment; None hands this process's on.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid()), *command],
                env=None if environment is None else dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it has ended, by itself or by :meth:`stop`.

        It is not reaped before :meth:`stop`: until then its id cannot pass to another process or group.
        """
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def terminate(self) -> None:
        """Ask it to end, without waiting."""
        if not self.ended:
            os.kill(self.pid, signal.SIGTERM)

    def stop(self, timeout: float = _STOP_S) -> None:
        """End it and all of its group; what does not go within ``timeout`` seconds is killed."""
        if self._process.returncode is not None:
            return
        try:
            self.terminate()
            deadline = time.monotonic() + timeout
            while not self.ended and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        finally:
            # A group outlives its leader as long as anyone is in it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def last_words(self) -> str:
        """The end of its log, for a message."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(["", *lines[-_EXCERPT_LINES:]])
