"""Run as a script: become a command that the kernel ends with SIGTERM when the parent dies.

Usage: ``python tether.py PARENT_PID COMMAND [ARGUMENT ...]``. A process of its own, because code between fork and exec
(``preexec_fn``) can deadlock in a program with threads. It imports only the standard library, so that it starts fast.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent, then exec the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call above
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
