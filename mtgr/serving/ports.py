"""Ports of a server: whether one is free, and free ones to choose."""

from __future__ import annotations

import random
import socket

from mtgr.errors import ConfigurationError, UnavailableError

# Below the kernel's range for outgoing connections: a port there could be taken between the choice and the use.
_CHOICES = range(20000, 32000)


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
    """Distinct free ports, chosen at random so that servers that start together do not meet.

    Raises:
        UnavailableError: If none are left.
    """
    found: list[int] = []
    for port in random.sample(_CHOICES, len(_CHOICES)):
        if len(found) == count:
            return found
        if is_free(address, port):
            found.append(port)
    raise UnavailableError(f"no free port was found on {address} between {_CHOICES.start} and {_CHOICES.stop - 1}.")
