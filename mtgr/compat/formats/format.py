"""What a format is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtgr.compat.convert import Plan
from mtgr.compat.options import Options
from mtgr.compat.tensors import ForeignTensors
from mtgr.errors import ConfigurationError

MAX_VALUES = 65_536  # of a contextual feature: the schema names each of them


@dataclass(frozen=True)
class Format:
    """One public format.

    Attributes:
        name: What reports call it.
        marks: Patterns that a name of its tensors begins with, each of them.
        plan: How tensors and options become a network.
    """

    name: str
    marks: tuple[str, ...]
    plan: Callable[[ForeignTensors, Options], Plan]

    def matches(self, names: Iterable[str]) -> bool:
        """Whether these are the names of such a checkpoint."""
        known = list(names)
        return all(any(re.match(mark, name) for name in known) for mark in self.marks)


def transposed(tensor: Tensor) -> Tensor:
    """A weight stored inputs first, as ``nn.Linear`` holds it."""
    return tensor.T


def split_heads(width: int, num_heads: int, what: str) -> int:
    """Width of one head.

    Raises:
        ConfigurationError: If the heads do not divide it.
    """
    if num_heads < 1 or width < 1 or width % num_heads:
        raise ConfigurationError(f"option num_heads is {num_heads}, which does not divide the {what} width {width}.")
    return width // num_heads


def with_reserved_rows(table: Tensor, first_item: int, num_items: int) -> Tensor:
    """Rows for the internal ids: two that are reserved get the checkpoint's row 0, then its items in order."""
    return torch.cat([table[:1], table[:1], table[first_item : first_item + num_items]])


def table_of_profile(tables: list[Tensor]) -> Tensor:
    """Rows for the ids of the profile column: zeros for the reserved ids and for each field's unknown value."""
    zeros = tables[0].new_zeros(1, tables[0].shape[1])
    return torch.cat([zeros, zeros, *(part for table in tables for part in (zeros, table))])


def contextual_sizes(options: Options, names: tuple[str, ...], rows: list[int]) -> tuple[int, ...]:
    """How many values of each contextual feature are served: all, or as many as the option says.

    Raises:
        ConfigurationError: If there are too many, or an option asks for more than there are.
    """
    sizes = options.integers("contextual_sizes", tuple(rows))
    if len(sizes) != len(rows):
        raise ConfigurationError(f"option contextual_sizes has {len(sizes)} numbers for {len(rows)} features.")
    for name, size, available in zip(names, sizes, rows, strict=True):
        if not 1 <= size <= available:
            raise ConfigurationError(f"option contextual_sizes: {name} has {available} values, not {size}.")
        if size > MAX_VALUES:
            raise ConfigurationError(
                f"{name} has {size} values, more than the {MAX_VALUES} that a profile field may have; say with the "
                "option contextual_sizes how many of each feature are in use."
            )
    return sizes


def served_items(options: Options, available: int) -> int:
    """How many items are served: all, or as many as the option says.

    Raises:
        ConfigurationError: If the option asks for more than there are.
    """
    count = options.integer("num_items", available)
    if not 1 <= count <= available:
        raise ConfigurationError(f"option num_items is {count}; the checkpoint has {available} items.")
    return count
