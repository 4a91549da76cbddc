"""Compile many kernels at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def parallel_compilation() -> Iterator[None]:
    """Have Triton compile in threads, where this version of it can."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        yield
        return
    workers = min(16, len(os.sched_getaffinity(0)))
    with one_parse_at_a_time(), ThreadPoolExecutor(workers) as executor, AsyncCompileMode(executor, ignore_errors=True):
        yield


@contextmanager
def one_parse_at_a_time() -> Iterator[None]:
    """Have kernels' sources parsed in turn.

    CPython 3.11 keeps one depth of recursion for all threads that are in ``ast.parse``. Where the garbage collector
    runs Python code in the midst of it, threads change, and the next one fails with a SystemError.
    """
    from triton.runtime.jit import JITFunction

    lock = threading.Lock()
    parse = JITFunction.parse

    def in_turn(function: Any) -> Any:
        with lock:
            return parse(function)

    JITFunction.parse = in_turn
    try:
        yield
    finally:
        JITFunction.parse = parse
