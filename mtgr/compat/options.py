"""Hyper-parameters that no tensor shows: given by ``mtgr.json``, the caller, or a model config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mtgr.errors import ConfigurationError


class Options:
    """Values that are taken one by one; what is left at the end was misspelt."""

    def __init__(self, *layers: Mapping[str, Any]) -> None:
        self._values: dict[str, Any] = {}
        for layer in layers:  # later ones count more
            self._values |= layer

    def integer(self, name: str, default: int | None, why: str = "") -> int:
        """A number; without a default it must be given.

        Raises:
            ConfigurationError: If it is missing or no integer.
        """
        value: int | None = self._values.pop(name, default)
        if value is None:
            raise ConfigurationError(
                f"give {name}: {why}. Write it into mtgr.json beside the checkpoint, or use --option {name}=..."
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigurationError(f"option {name} is {value!r}; it must be an integer from 0.")
        return value

    def number(self, name: str, default: float) -> float:
        """A number.

        Raises:
            ConfigurationError: If it is not one.
        """
        value = self._values.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigurationError(f"option {name} is {value!r}; it must be a number.")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false.

        Raises:
            ConfigurationError: If it is neither.
        """
        value = self._values.pop(name, default)
        if not isinstance(value, bool):
            raise ConfigurationError(f"option {name} is {value!r}; it must be true or false.")
        return value

    def text(self, name: str, default: str) -> str:
        """Text.

        Raises:
            ConfigurationError: If it is not.
        """
        value = self._values.pop(name, default)
        if not isinstance(value, str):
            raise ConfigurationError(f"option {name} is {value!r}; it must be text.")
        return value

    def names(self, name: str, default: tuple[str, ...]) -> tuple[str, ...]:
        """A list of texts.

        Raises:
            ConfigurationError: If it is not.
        """
        value = self._values.pop(name, list(default))
        if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
            raise ConfigurationError(f"option {name} is {value!r}; it must be a list of texts.")
        return tuple(value)

    def integers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list of integers from 0.

        Raises:
            ConfigurationError: If it is not.
        """
        value = self._values.pop(name, list(default))
        good = isinstance(value, list | tuple) and all(
            isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0 for entry in value
        )
        if not good:
            raise ConfigurationError(f"option {name} is {value!r}; it must be a list of integers from 0.")
        return tuple(value)

    def finish(self, format_name: str) -> None:
        """Complain of what nobody took.

        Raises:
            ConfigurationError: If something is left.
        """
        if self._values:
            raise ConfigurationError(f"{format_name} checkpoints have no option {min(self._values)!r}; remove it.")


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options out of command line arguments ``KEY=VALUE``; values are JSON, or else text.

    Raises:
        ConfigurationError: If one is not of this form.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ConfigurationError(f"--option {text}: write it as KEY=VALUE, such as num_heads=2.")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options
