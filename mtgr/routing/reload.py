"""A policy file that may change while the service runs."""

from __future__ import annotations

from pathlib import Path

from mtgr.errors import ConfigurationError
from mtgr.routing.policy import load_policy

_Signature = tuple[int, int, int] | None


class PolicyFile:
    """The policy as last read without an error.

    Args:
        path: The file.

    Attributes:
        current: The policy.
        problem: Why the file as it is now is not in force, or None.
        reloads: Times that a changed file was taken over.
        refusals: Times that one was not.

    Raises:
        ConfigurationError: If the file is wrong to begin with.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._signature = _signature(path)
        self.current = load_policy(path)
        self.problem: str | None = None
        self.reloads = 0
        self.refusals = 0

    def poll(self) -> bool:
        """Look at the file; whether ``current`` is a new one or ``problem`` another one since the last call."""
        signature = _signature(self.path)
        if signature == self._signature:
            return False
        self._signature = signature
        try:
            policy = load_policy(self.path)
        except ConfigurationError as error:
            self.refusals += 1
            self.problem = f"{error} The policy of before stays in force."
            return True
        changed = policy != self.current or self.problem is not None
        self.current, self.problem = policy, None
        self.reloads += 1
        return changed


def _signature(path: Path) -> _Signature:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
