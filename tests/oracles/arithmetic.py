"""Small functions in float64 that the oracles share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
State = Mapping[str, npt.NDArray[Any]]


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def layer_norm(x: Array, epsilon: float, gain: Array | None = None, bias: Array | None = None) -> Array:
    mean = sum(x.tolist()) / len(x)
    variance = sum((value - mean) ** 2 for value in x.tolist()) / len(x)
    y: Array = (x - mean) / math.sqrt(variance + epsilon)
    if gain is not None:
        y = y * gain
    if bias is not None:
        y = y + bias
    return y


def unit(x: Array, epsilon: float = 1e-6) -> Array:
    y: Array = x / max(math.sqrt(sum(value * value for value in x.tolist())), epsilon)
    return y


class Parameters:
    """A state dict in float64, by the names of its format."""

    def __init__(self, state: State) -> None:
        self._state = {name: np.asarray(value, dtype=np.float64) for name, value in state.items()}
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def __getitem__(self, name: str) -> Array:
        self.used.add(name)
        return self._state[name]

    def linear(self, name: str, x: Array) -> Array:
        """``nn.Linear``: a weight of outputs by inputs, and a bias."""
        y: Array = self[f"{name}.weight"] @ x + self[f"{name}.bias"]
        return y
