"""A policy file that may change while the service runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mtgr.errors import ConfigurationError
from mtgr.routing.policy import Policy, load_policy

_Signature = tuple[int, int, int] | None


class PolicyFile:
    """The policy as last read without an error.

    A changed file is read once it has been the same for two looks: half of a file is often valid, and says something
    else. Called by one thread; ``current`` and ``problem`` may be read from others.

    Args:
        path: The file.
        check: Raises ConfigurationError for a policy that is valid in itself and does not fit, such as a weight of a
            task that the schema does not have. It may be set later, when what it looks at is loaded.

    Attributes:
        current: The policy.
        problem: Why the file as it is now is not in force, or None.
        reloads: Times that another policy was taken over.
        refusals: Times that a changed file was not.

    Raises:
        ConfigurationError: If the file is wrong to begin with.
    """

    def __init__(self, path: Path, check: Callable[[Policy], object] = lambda policy: None) -> None:
        self.path = path
        self.check = check
        self._seen = self._read = _signature(path)
        self.current = self._load()
        self.problem: str | None = None
        self.reloads = 0
        self.refusals = 0

    def poll(self) -> bool:
        """Look at the file; whether ``current`` or ``problem`` is another one than before."""
        before, self._seen = self._seen, _signature(self.path)
        if self._seen == self._read or self._seen != before:
            return False
        policy, problem = self.current, None
        try:
            policy = self._load()
        except ConfigurationError as error:
            problem = f"{error} The policy of before stays in force."
        if _signature(self.path) != self._seen:
            return False  # it was written to meanwhile
        self._read = self._seen
        news = policy != self.current or problem != self.problem
        self.reloads += policy != self.current
        self.refusals += problem is not None
        self.current, self.problem = policy, problem
        return news

    def _load(self) -> Policy:
        policy = load_policy(self.path)
        self.check(policy)
        return policy


def _signature(path: Path) -> _Signature:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
