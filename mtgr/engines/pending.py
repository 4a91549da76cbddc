"""Batches that were handed over to an engine."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]


class Pending(Protocol):
    """A batch that was handed over; whoever has it must wait for it, once.

    Attributes:
        ready: Whether there is nothing to wait for.
    """

    ready: bool

    def wait(self) -> Arrays:
        """Its outputs by name."""


class Done:
    """A batch whose outputs are there."""

    ready = True

    def __init__(self, outputs: Arrays) -> None:
        self._outputs = outputs

    def wait(self) -> Arrays:
        """Its outputs by name."""
        return self._outputs
