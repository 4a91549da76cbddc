"""Processes of vLLM end with the process that started them, however that ends.

vLLM's engine process does not notice that its client was killed, and would keep a GPU's memory for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import threading

VARIABLE = "MTGR_VLLM_END_WITH_PARENT"


def mark_children() -> None:
    """Let every process of vLLM that this one starts from now on end with it."""
    os.environ[VARIABLE] = "1"


def end_with_parent() -> None:
    """In a marked child: watch the parent, and end when it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None and os.environ.get(VARIABLE) == "1":
        threading.Thread(target=_watch, args=(parent,), name="parent-watch", daemon=True).start()


def _watch(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    # Without clean-up: what it would talk to is gone, and waiting for that is how processes are left over.
    os._exit(1)
