"""Ports of a server: whether one is free, and free ones to choose."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from mtgr.errors import ConfigurationError, UnavailableError

Server = TypeVar("Server")

# Below the kernel's range for outgoing connections: a port there could be taken between the choice and the use.
_CHOICES = range(20000, 32000)
_TRIES = 3
# Of this process: a server needs seconds until it listens, and nobody else may get its port meanwhile.
_given: set[int] = set()


def resolve_host(host: str) -> str:
    """The IPv4 address to listen on.

    Raises:
        ConfigurationError: If the name has no address.
    """
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ConfigurationError(
            f"host '{host}' has no IPv4 address ({error.strerror}); give an address of this machine, such as 127.0.0.1."
        ) from error


def is_free(address: str, port: int) -> bool:
    """Whether a server could listen on ``port`` of ``address`` now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: closed connections that wait for stray packets do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def free_ports(address: str, count: int) -> list[int]:
    """Distinct free ports that this process was not given before.

    They are chosen at random, so that processes that start servers at the same time do not meet.

    Raises:
        UnavailableError: If none are left.
    """
    found: list[int] = []
    for port in random.sample(_CHOICES, len(_CHOICES)):
        if len(found) == count:
            _given.update(found)
            return found
        if port not in _given and is_free(address, port):
            found.append(port)
    raise UnavailableError(f"no free port was found on {address} between {_CHOICES.start} and {_CHOICES.stop - 1}.")


def on_free_ports(address: str, ports: Sequence[int], start: Callable[[Sequence[int]], Server]) -> Server:
    """Start a server on ports, of which those of 0 are chosen, and chosen again if it does not start.

    Another process may take a chosen port before the server does, so that one try is not enough.

    Args:
        address: Where it listens.
        ports: Its ports; if none is 0, there is one try.
        start: Starts it on the ports it is given.

    Raises:
        UnavailableError: If it does not start, or no port is free.
    """
    tries = 1 if all(ports) else _TRIES
    while True:
        spare = iter(free_ports(address, sum(port == 0 for port in ports)))
        try:
            return start([port or next(spare) for port in ports])
        except UnavailableError:
            tries -= 1
            if not tries:
                raise
