"""A server process with all that belongs to it: its process group, its stubs, its shared memory."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_SHARED_MEMORY = Path("/dev/shm")
_TETHER = Path(__file__).with_name("tether.py")
_POLL_S = 0.02
_GROUP_GONE_S = 2.0


class ServerProcess:
    """tritonserver, started in a process group of its own.

    Args:
        command: The server's command line.
        environment: Its whole environment.
        log: File that takes its output and that of its stubs.

    Attributes:
        pid: Process id, also the id of the group.
        shared_memory_prefix: What the names of its shared-memory segments begin with; no other server's do.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> None:
        self.shared_memory_prefix = f"mtgr_{secrets.token_hex(8)}_"
        command = [*command, f"--backend-config=python,shm-region-prefix-name={self.shared_memory_prefix}"]
        if threading.current_thread() is threading.main_thread():
            # The kernel ends the server when the thread that started it ends, so other threads must not tie it.
            command = [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid()), *command]
        self._popen = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._popen.pid
        self._stopped = False

    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs.

        The process is not reaped before :meth:`stop`: until then its id cannot pass to another process or group.
        """
        if self._popen.returncode is not None:
            return self._popen.returncode
        status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is None:
            return None
        return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status

    def stop(self, timeout: float) -> None:
        """End the server, its stubs and its shared memory.

        Args:
            timeout: Seconds for requests in flight and for unloading, after which everything is killed; it is killed
                at once when an exception, such as KeyboardInterrupt, ends the wait.
        """
        if self._stopped:
            return
        try:
            if self.exit_code() is None:
                os.kill(self.pid, signal.SIGTERM)
                deadline = time.monotonic() + timeout
                while self.exit_code() is None and time.monotonic() < deadline:
                    time.sleep(_POLL_S)
        finally:
            self._stopped = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._popen.wait()
            self._await_group()
            for segment in _SHARED_MEMORY.glob(f"{self.shared_memory_prefix}*"):
                segment.unlink(missing_ok=True)

    def _await_group(self) -> None:
        """Wait until killed stubs are gone too; they are no children of ours."""
        deadline = time.monotonic() + _GROUP_GONE_S
        while time.monotonic() < deadline:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(_POLL_S)
