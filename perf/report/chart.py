"""What a chart is, before it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from perf.report.style import Draw


@dataclass(frozen=True)
class Table:
    """Numbers in rows; the first cell of a row names it.

    Attributes:
        head: Titles of the columns, with units.
        rows: Cells, ready to read.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A chart with its words and numbers.

    Attributes:
        name: In file names and anchors.
        title: What it shows.
        caption: How to read it, and what it leaves out.
        description: What it says, for those who do not see it.
        draw: Draws it; None where there is nothing to draw.
        missing: Why there is nothing to draw.
        table: The same numbers.
    """

    name: str
    title: str
    caption: str
    description: str = ""
    draw: Draw | None = None
    missing: str = ""
    table: Table = field(default_factory=lambda: Table((), ()))


def number(value: float | None, digits: int = 3) -> str:
    """To so many significant digits, without an exponent; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:#.{digits}g}".rstrip(".")


def callers(level: float) -> str:
    """A number of callers in words."""
    return f"{level:g} caller" if level == 1 else f"{level:g} callers"


def few(levels: Sequence[float], most: int = 3) -> list[float]:
    """The first, the last, and what lies evenly between them."""
    if len(levels) <= most:
        return list(levels)
    return [levels[round(index * (len(levels) - 1) / (most - 1))] for index in range(most)]
