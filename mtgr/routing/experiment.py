"""Experiments: users divided over arms, by weight, the same user always into the same arm."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass

from mtgr.errors import ConfigurationError
from mtgr.routing.strategies import AUTO, STRATEGIES

DEFAULT_ARM = "default"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")


@dataclass(frozen=True)
class Arm:
    """One side of an experiment.

    Attributes:
        name: Its name; a label of metrics, and an output of the door.
        weight: Its share of the users, in proportion to the other arms' weights; 0 lets nobody in.
        strategy: What serves its users; ``auto`` leaves the choice open.
        version: Version directory of the engines' models; None is the latest.
    """

    name: str
    weight: float = 1.0
    strategy: str = AUTO
    version: int | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: If one is out of range.
        """
        _check_name("arm", self.name)
        if self.name == DEFAULT_ARM:
            raise ConfigurationError(f"arm {self.name}: this name is of those who are in no arm; choose another one.")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigurationError(f"arm {self.name}: weight is {self.weight}; it must be 0 or more.")
        if self.strategy not in (AUTO, *STRATEGIES):
            raise ConfigurationError(
                f"arm {self.name}: strategy is {self.strategy!r}; it must be one of {', '.join((AUTO, *STRATEGIES))}."
            )
        if self.version is not None and self.version < 1:
            raise ConfigurationError(f"arm {self.name}: version is {self.version}; it must be at least 1.")


@dataclass(frozen=True)
class Shadow:
    """An arm that is called but not returned, to see how far its scores are from those that are.

    Attributes:
        strategy: What is called.
        share: Part of the requests, 0 to 1.
        version: Version directory of the engines' models; None is the latest.
    """

    strategy: str
    share: float
    version: int | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: If one is out of range.
        """
        if self.strategy not in STRATEGIES:
            raise ConfigurationError(
                f"shadow: strategy is {self.strategy!r}; it must be one of {', '.join(STRATEGIES)}."
            )
        if not 0 <= self.share <= 1:
            raise ConfigurationError(f"shadow: share is {self.share}; it must be between 0 and 1.")
        if self.version is not None and self.version < 1:
            raise ConfigurationError(f"shadow: version is {self.version}; it must be at least 1.")


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared.

    Attributes:
        name: Its name; another one divides the users anew.
        arms: Two or more.
    """

    name: str
    arms: tuple[Arm, ...]

    def __post_init__(self) -> None:
        """Check that the arms can be told apart and somebody gets in.

        Raises:
            ConfigurationError: If not.
        """
        _check_name("experiment", self.name)
        names = [arm.name for arm in self.arms]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigurationError(f"experiment {self.name}: it needs two or more arms of different names.")
        if not any(arm.weight > 0 for arm in self.arms):
            raise ConfigurationError(f"experiment {self.name}: no arm has a weight above 0.")

    def assign(self, user_id: str) -> Arm:
        """The user's arm.

        Weighted rendezvous hashing (Schindelhauer and Schomaker, 2005): every arm draws a number for the user, and the
        smallest one in proportion to the weight wins. When a weight changes, users move to or from that arm alone: as
        few as possible. When several do, and shares differ by d in total variation, at most 2d / (1 + d) of the users
        move, which cannot be improved on without knowing the old weights (Bavarian et al., 2016).
        """
        return min((arm for arm in self.arms if arm.weight > 0), key=lambda arm: self._draw(arm, user_id))

    def arm(self, name: str) -> Arm | None:
        """The arm of this name, or None."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def _draw(self, arm: Arm, user_id: str) -> float:
        return -math.log(uniform(self.name, arm.name, user_id)) / arm.weight


def uniform(*parts: str) -> float:
    """A number in (0, 1] that depends on nothing but the texts."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return (int.from_bytes(digest[:8], "big") + 1) / 2.0**64


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{what} {name!r}: a name must be 1 to 40 letters, digits, dots, dashes or underscores, and begin with a "
            "letter or digit."
        )
