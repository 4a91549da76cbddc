"""Choosing ports for servers."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import pytest

from mtgr.errors import UnavailableError
from mtgr.serving.ports import free_ports, is_free, on_free_ports


class Starts:
    """Notes the ports of each try; the first ``failing`` tries do not start."""

    def __init__(self, failing: int) -> None:
        self.failing = failing
        self.tries: list[Sequence[int]] = []

    def __call__(self, ports: Sequence[int]) -> str:
        self.tries.append(ports)
        if len(self.tries) <= self.failing:
            raise UnavailableError("its port was taken")
        return "a server"


def test_a_port_in_use_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not is_free("127.0.0.1", server.getsockname()[1])


def test_no_port_is_given_twice() -> None:
    given = [port for _ in range(60) for port in free_ports("127.0.0.1", 40)]
    assert len(set(given)) == len(given)


def test_chosen_ports_are_chosen_again_when_a_server_does_not_start() -> None:
    starts = Starts(failing=2)
    assert on_free_ports("127.0.0.1", [0, 7001, 0], starts) == "a server"
    assert [ports[1] for ports in starts.tries] == [7001] * 3
    chosen = [port for ports in starts.tries for port in (ports[0], ports[2])]
    assert len(set(chosen)) == 6
    assert 0 not in chosen


@pytest.mark.parametrize(("ports", "tries"), [([0], 3), ([7001], 1)])
def test_a_server_that_never_starts_says_why(ports: Sequence[int], tries: int) -> None:
    starts = Starts(failing=9)
    with pytest.raises(UnavailableError, match="its port was taken"):
        on_free_ports("127.0.0.1", ports, starts)
    assert len(starts.tries) == tries
