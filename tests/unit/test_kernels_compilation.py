"""Kernels are compiled in threads, which must not get into each other's way."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.interpreted import NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)

from triton.runtime.jit import JITFunction

from mtgr.kernels.compilation import one_parse_at_a_time
from mtgr.kernels.triton_attention import _attend_keys


@pytest.fixture
def busy_collector() -> Iterator[None]:
    """Python code in the midst of what is otherwise one step to other threads."""
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()

    def callback(phase: str, info: dict[str, int]) -> None:
        sum(range(200))

    gc.callbacks.append(callback)
    gc.set_threshold(50)
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*threshold)
    gc.callbacks.remove(callback)


def test_sources_are_parsed_in_turn(busy_collector: None) -> None:
    errors: list[BaseException] = []

    def parse(depth: int) -> None:
        if depth:
            return parse(depth - 1)
        try:
            for _ in range(40):
                _attend_keys.parse()
        except SystemError as error:
            errors.append(error)

    threads = [threading.Thread(target=parse, args=(9 * number,)) for number in range(4)]
    with one_parse_at_a_time():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_parsing_is_left_as_it_was() -> None:
    before = JITFunction.parse
    with one_parse_at_a_time():
        assert JITFunction.parse is not before
    assert JITFunction.parse is before
