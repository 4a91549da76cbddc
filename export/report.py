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
        state: What was done with the model, and why if it was not exported.
        manifest: Of the model; None if there is none in the repository.
        seconds: Time that the strategy's models took together; None where no time was spent, or on another line.
        directory: Where the artifact lies; the model's place in the repository by default.
    """

    strategy: str
    state: str
    manifest: Manifest | None = None
    seconds: float | None = None
    directory: Path | None = None


def table(lines: Sequence[Exported], model_repository: Path) -> str:
    """Aligned columns: strategy, model, precision, size on disk, largest error against PyTorch, seconds, state."""
    rows = [_HEADER, *(_cells(line, model_repository) for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )


def parity(manifest: Manifest) -> str:
    """What a manifest says of ranking: rank correlation and the change of AUC; empty if it says nothing."""
    words = []
    if "spearman" in manifest.parity:
        words.append(f"Spearman {manifest.parity['spearman']:.4f}")
    changes = [pair["artifact"] - pair["fp32"] for pair in manifest.parity.get("auc", {}).values()]
    if changes:
        words.append(f"AUC {max(changes, key=abs):+.4f}")
    if "forced" in manifest.details:
        words.append(f"forced, though {manifest.details['forced']}")
    return "; ".join(words)


def _cells(line: Exported, model_repository: Path) -> tuple[str, ...]:
    manifest = line.manifest
    described = ("-", "-", "-", "-")
    if manifest is not None:
        described = (
            manifest.model,
            manifest.precision,
            _size(line.directory or model_repository / manifest.model),
            _error(manifest),
        )
    return (
        line.strategy,
        *described,
        "-" if line.seconds is None else f"{line.seconds:.1f}",
        line.state + _way(manifest),
    )


def _way(manifest: Manifest | None) -> str:
    """In which way a plan was built, if not in the first."""
    if manifest is None or not manifest.details.get("left"):
        return ""
    return f" (built with {manifest.details['way']}, after {len(manifest.details['left'])} other ways)"


def _error(manifest: Manifest) -> str:
    if not manifest.parity:
        return "reference"
    error = manifest.parity.get("max_abs_error")
    return "not checked" if error is None else f"{error:.1e}"


def _size(directory: Path) -> str:
    size = float(sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()))
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
