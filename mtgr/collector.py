"""Python's garbage collector in a process that serves."""

from __future__ import annotations

import gc

_THRESHOLDS = (20_000, 20, 20)  # new objects before the young are visited, and such visits before the older ones are


def settle() -> None:
    """Collect what is garbage, and leave what is there now out of all later collections.

    To be called when a model has loaded. A full collection visits every object of the libraries that were imported,
    170,000 of them with PyTorch, which took 80 ms; whoever asks meanwhile waits.
    """
    gc.collect()
    gc.freeze()
    # The young are visited after 700 new objects otherwise, which is more than once a request.
    gc.set_threshold(*_THRESHOLDS)
