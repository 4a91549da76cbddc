"""The table that an export ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtgr.manifest import Manifest

_HEADER = ("strategy", "model", "precision", "size", "max error", "seconds", "state")


@dataclass(frozen=True)
class Exported:
    """One line.

    Attributes:
        strategy: The strategy.
        state: ``installed``, or why not.
        manifest: Of a model that was made.
        seconds: Time that the strategy's models took together.
    """

    strategy: str
    state: str
    manifest: Manifest | None = None
    seconds: float = 0.0


def table(lines: Sequence[Exported], model_repository: Path) -> str:
    """Aligned columns: strategy, model, precision, size on disk, largest error against PyTorch, seconds, state."""
    rows = [_HEADER, *(_cells(line, model_repository) for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )


def _cells(line: Exported, model_repository: Path) -> tuple[str, ...]:
    manifest = line.manifest
    if manifest is None:
        return (line.strategy, "-", "-", "-", "-", "-", line.state)
    error = manifest.parity.get("max_abs_error")
    return (
        line.strategy,
        manifest.model,
        manifest.precision,
        _size(model_repository / manifest.model),
        "reference" if error is None else f"{error:.1e}",
        f"{line.seconds:.1f}",
        line.state,
    )


def _size(directory: Path) -> str:
    size = float(sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
