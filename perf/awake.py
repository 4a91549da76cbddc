"""Processors that do not fall asleep while lone requests are timed.

A request passes some twenty threads. On a virtual machine a processor with nothing to do is given back to the host, and
each of those threads waits for it to come back; on a host of one's own ``idle=poll``, or the latency profiles of
``tuned``, do what these loops do. They run at the lowest priority there is, behind all that wants the processor.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SPIN = "import os\nos.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"


@contextmanager
def awake(processors: int | None = None) -> Iterator[None]:
    """Keep so many processors busy with nothing, by default all that this process may use."""
    count = len(os.sched_getaffinity(0)) if processors is None else processors
    loops = [subprocess.Popen([sys.executable, "-S", "-c", _SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()
