"""From a foreign state dict to a network: every tensor is used, known to be of no use, or an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtgr.compat.base import ForeignModel
from mtgr.compat.tensors import ForeignTensors
from mtgr.compat.world import World
from mtgr.errors import ConfigurationError

_SHOWN = 4  # problems that an error names


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from.

    Attributes:
        names: Tensors of the checkpoint.
        make: The parameter out of them; of a single one, itself by default.
    """

    names: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Plan:
    """How a checkpoint becomes a network.

    Attributes:
        model: The network, its parameters not yet filled.
        world: The rows it reads and the items it knows.
        sources: Where each of its parameters and buffers comes from.
        unused: Names that are of no use in serving, as patterns, and why.
        notes: What was assumed.
    """

    model: ForeignModel
    world: World
    sources: Mapping[str, Source]
    unused: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Tensors of one kind in a report."""

    name: str
    tensors: int
    numbers: int


@dataclass(frozen=True)
class ConversionReport:
    """What was done with a checkpoint.

    Attributes:
        format: Its format.
        source: What was asked for.
        files: Files that were read.
        groups: Tensors that were used, by kind.
        unused: Tensors that were not, and why.
        notes: What was assumed.
        operations: What the network can do.
    """

    format: str
    source: str
    files: tuple[str, ...]
    groups: tuple[Group, ...]
    unused: Mapping[str, str]
    notes: tuple[str, ...]
    operations: tuple[str, ...]

    def table(self) -> str:
        """The report as text: a line a group, then what was not used and what was assumed."""
        rows = [("tensors of the checkpoint", "count", "numbers")]
        rows += [(group.name, str(group.tensors), f"{group.numbers:,}") for group in self.groups]
        used = sum(group.tensors for group in self.groups)
        rows.append(("used", str(used), f"{sum(group.numbers for group in self.groups):,}"))
        rows.append(("unused", str(len(self.unused)), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{self.source}: {self.format}, {', '.join(self.files)}; it can {' and '.join(self.operations)}."]
        lines += [
            f"  {name.ljust(widths[0])}  {count.rjust(widths[1])}  {numbers.rjust(widths[2])}".rstrip()
            for name, count, numbers in rows
        ]
        lines += [f"  unused: {name} ({reason})" for name, reason in self.unused.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values, for the converted checkpoint's record."""
        return {
            "format": self.format,
            "source": self.source,
            "files": list(self.files),
            "tensors": {group.name: group.tensors for group in self.groups},
            "unused": dict(self.unused),
            "notes": list(self.notes),
        }


def convert(name: str, source: str, tensors: ForeignTensors, plan: Plan) -> ConversionReport:
    """Fill the plan's network.

    Args:
        name: The format.
        source: What was asked for, for the report.
        tensors: What was read.
        plan: How they are to be used.

    Raises:
        ConfigurationError: If a tensor is missing, unexpected, of a wrong shape, or not finite.
    """
    problems: list[str] = []
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    for target, place in plan.model.state_dict().items():
        origin = plan.sources.get(target)
        if origin is None:
            raise AssertionError(f"the plan for {name} has no source for {target}")
        used |= set(origin.names)
        missing = [entry for entry in origin.names if entry not in tensors.values]
        if missing:
            problems.append(f"{missing[0]} is missing")
            continue
        try:
            made = origin.make(*(tensors.values[entry] for entry in origin.names)).to(place.dtype)
        except (RuntimeError, IndexError) as error:
            problems.append(f"{origin.names[0]} has a wrong shape ({' '.join(str(error).split())[:80]})")
            continue
        if made.shape != place.shape:
            found = list(tensors.values[origin.names[0]].shape) if origin.names else []
            problems.append(f"{', '.join(origin.names)} has shape {found}, which makes {list(made.shape)} instead of "
                            f"{list(place.shape)}")  # fmt: skip
        elif made.is_floating_point() and not bool(torch.isfinite(made).all()):
            problems.append(f"{', '.join(origin.names)} is not finite")
        else:
            state[target] = made.contiguous()
    unused: dict[str, str] = {}
    for entry in tensors.values:
        if entry in used:
            continue
        reason = next((reason for pattern, reason in plan.unused.items() if re.fullmatch(pattern, entry)), None)
        if reason is None:
            problems.append(f"{entry} is not known")
        else:
            unused[entry] = reason
    unused |= dict.fromkeys(tensors.ignored, "no tensor")
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ConfigurationError(
            f"{source} looks like {name}, but does not fit: {'; '.join(problems[:_SHOWN])}{more}. "
            "See docs/checkpoints.md for what is supported."
        )
    plan.model.load_state_dict(state)
    plan.model.eval()
    return ConversionReport(
        format=name,
        source=source,
        files=tensors.files,
        groups=_groups(used, tensors),
        unused=unused,
        notes=plan.notes,
        operations=plan.model.config.operations,
    )


def _groups(used: set[str], tensors: ForeignTensors) -> tuple[Group, ...]:
    """Names with their numbers left out, in order of first appearance."""
    counts: dict[str, list[int]] = {}
    for name, tensor in tensors.values.items():
        if name in used:
            entry = counts.setdefault(re.sub(r"\.\d+\.", ".*.", name), [0, 0])
            entry[0] += 1
            entry[1] += tensor.numel()
    return tuple(Group(name, *entry) for name, entry in counts.items())
