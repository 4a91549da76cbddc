"""How charts look: one palette for pictures and, by CSS variables, for the page in light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave

WIDE, NARROW = 660.0, 264.0  # points: a page's column, and a telephone's
SIZE = 9.0  # of text, in points

# CSS variable: color on a light page, color on a dark one. Series have at least 3:1 against either page's background.
PALETTE = {
    "paper": ("#ffffff", "#15181c"),
    "ink": ("#1f2328", "#e8eaed"),
    "muted": ("#59636e", "#a5adb8"),
    "grid": ("#dfe3e8", "#31363d"),
    "baseline": ("#6c7480", "#a3abb7"),
    "onnx": ("#0072b2", "#5fb4ee"),
    "tensorrt": ("#00805c", "#35c79a"),
    "vllm": ("#c9540a", "#ff9a52"),
    "auto": ("#8e44ad", "#cf9cf0"),
    "direct-onnx": ("#3b8ec2", "#8fcdf5"),
    "stage-intake": ("#b98a00", "#f0c63c"),
    "stage-features": ("#7a9a1e", "#b4d45a"),
    "stage-wait": ("#8fa3b8", "#6f849b"),
    "stage-compute": ("#0a5fa5", "#58a6f0"),
    "stage-engine": ("#5b84ad", "#7fa8d4"),
    "stage-rest": ("#a0699b", "#d59bd0"),
    "limit": ("#c0272d", "#ff7b7b"),
}
_VARIABLES = {light: name for name, (light, _) in PALETTE.items()}
MARKERS = {"baseline": "s", "onnx": "o", "tensorrt": "^", "vllm": "D", "auto": "P", "direct_onnx": "v"}

_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": SIZE,
    "axes.titlesize": SIZE + 0.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": SIZE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
    "xtick.labelsize": SIZE - 0.5,
    "ytick.labelsize": SIZE - 0.5,
    "legend.frameon": False,
    "legend.fontsize": SIZE - 0.5,
    "svg.fonttype": "none",  # text stays text: it can be searched, and follows the page's font
    "text.parse_math": False,
}


@dataclass
class Canvas:
    """Where a chart draws.

    Attributes:
        figure: The figure.
        narrow: Whether it is a telephone's: panels stand below one another.
    """

    figure: Figure
    narrow: bool

    def panels(self, count: int, height: float, most: int = 3) -> list[Axes]:
        """Axes beside one another, ``most`` in a row, each ``height`` points high."""
        columns = 1 if self.narrow else min(count, most)
        rows = -(-count // columns)
        self.figure.set_size_inches((NARROW if self.narrow else WIDE) / 72, rows * height / 72)
        grid = self.figure.subplots(rows, columns, squeeze=False)
        cells = list(grid.flat)
        for cell in cells[count:]:
            cell.remove()
        return cells[:count]


Draw = Callable[[Canvas], None]


def color(name: str) -> str:
    """The light color of a strategy or of a part of the palette."""
    return PALETTE[name.replace("_", "-")][0]


def drawn_svg(draw: Draw, name: str, narrow: bool) -> str:
    """A chart as SVG markup to stand in a page: its colors are variables, its ids its own."""
    buffer = io.StringIO()
    key = f"{name}-{'narrow' if narrow else 'wide'}"
    with _figure(draw, narrow, key) as figure:
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    markup = buffer.getvalue()
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup, flags=re.DOTALL)
    markup = re.sub(r'\bid="', f'id="{key}-', markup)
    markup = re.sub(r'((?:xlink:)?href="|url\()#', rf"\1#{key}-", markup)
    markup = re.sub(r"#[0-9a-f]{6}\b", lambda found: _variable(found[0]), markup)
    head, rest = markup.split(">", 1)
    # Scaled by the page, spoken of by the figure around it.
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + rest


def drawn_png(draw: Draw, title: str) -> bytes:
    """The same chart as a picture on white, 2 pixels a point; away from its page it carries its title."""

    def head(canvas: Canvas) -> None:
        canvas.figure.set_size_inches(WIDE / 72, 2.2 * SIZE / 72)
        canvas.figure.text(0.005, 0.5, title, va="center", fontsize=SIZE + 2, fontweight="bold")

    parts = []
    for part in (head, draw):
        buffer = io.BytesIO()
        with _figure(part, False, title) as figure:
            figure.savefig(buffer, format="png", dpi=144, facecolor=color("paper"))
        buffer.seek(0)
        parts.append(imread(buffer))
    whole = io.BytesIO()
    imsave(whole, np.concatenate(parts), format="png", metadata={"Software": "matplotlib"})
    return whole.getvalue()


def css_variables(dark: bool) -> str:
    """The palette as declarations."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in PALETTE.items())


def mark(artist: Any, name: str) -> None:
    """Name what carries data, so that it can be found in the page."""
    artist.set_gid(f"mark-{name}")


@contextmanager
def _figure(draw: Draw, narrow: bool, salt: str) -> Iterator[Figure]:
    tints = {
        "text.color": color("ink"),
        "axes.labelcolor": color("ink"),
        "axes.edgecolor": color("muted"),
        "xtick.color": color("muted"),
        "ytick.color": color("muted"),
        "xtick.labelcolor": color("ink"),
        "ytick.labelcolor": color("ink"),
        "grid.color": color("grid"),
        "svg.hashsalt": salt,  # the same run gives the same page
    }
    settings: Any = _SETTINGS | tints  # its keys are known to matplotlib alone
    with mpl.rc_context(settings):
        figure = Figure(layout="constrained")
        draw(Canvas(figure, narrow))
        yield figure


def _variable(value: str) -> str:
    return f"var(--{_VARIABLES[value]})" if value in _VARIABLES else value
