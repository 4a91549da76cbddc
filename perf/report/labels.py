"""Words inside a panel where they cover no line, no mark, and no other word; left out where there is no such place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from perf.report.style import SIZE

Array: TypeAlias = npt.NDArray[np.float64]
Spot: TypeAlias = tuple[float, float]
Side: TypeAlias = tuple[float, float, str]
Box: TypeAlias = tuple[float, float, float, float]  # left, bottom, right, top

_WIDTH = 0.62  # of a character, in ems: a little more than the font's mean
_STEP = 2.0  # points between those that stand for a line
# To the left, to the right, above, and below a mark; above and below a line.
BESIDE = ((-7.0, 2.0, "right"), (7.0, -3.0, "left"), (0.0, 8.0, "center"), (0.0, -8.0 - SIZE, "center"))
ALONG = ((0.0, 5.0, "center"), (0.0, -4.0 - SIZE, "center"))


class Labels:
    """Places words in a panel whose limits and layout are settled; all lengths are points.

    Args:
        axes: The panel.
        lines: What must not be covered: corners [n, 2] of each line, in the panel's data.
    """

    def __init__(self, axes: Axes, lines: Sequence[npt.ArrayLike]) -> None:
        self._axes = axes
        self._scale = 72 / axes.figure.dpi
        self._taken = np.concatenate([self._along(np.asarray(line, dtype=np.float64)) for line in lines])
        self._boxes: list[Box] = []

    def place(self, text: str, spots: Sequence[Spot], color: str, sides: Sequence[Side] = BESIDE) -> bool:
        """Write a word at the first of the spots, given in the panel's data, that has room; False if none has."""
        size = SIZE - 1
        width = _WIDTH * size * len(text)
        for spot in spots:
            x, y = self._points(np.array([spot]))[0]
            for right, up, align in sides:
                left = x + right - {"left": 0.0, "center": width / 2, "right": width}[align]
                box = (left, y + up - 2, left + width, y + up + size)
                if not self._is_free(box):
                    continue
                self._boxes.append(box)
                self._axes.annotate(
                    text,
                    spot,
                    (right, up),
                    textcoords="offset points",
                    ha=align,
                    color=color,
                    fontsize=size,
                    annotation_clip=False,
                )
                return True
        return False

    def _is_free(self, box: Box) -> bool:
        frame = self._axes.get_window_extent()
        edges = [edge * self._scale for edge in (frame.x0, frame.y0, frame.x1, frame.y1)]
        if box[0] < edges[0] + 2 or box[1] < edges[1] + 2 or box[2] > edges[2] or box[3] > edges[3]:
            return False
        x, y = self._taken.T
        if ((x > box[0] - 3) & (x < box[2] + 3) & (y > box[1] - 2) & (y < box[3] + 2)).any():
            return False
        return all(
            box[2] < other[0] or box[0] > other[2] or box[3] < other[1] or box[1] > other[3] for other in self._boxes
        )

    def _along(self, line: Array) -> Array:
        """Points so dense along a line that no word falls between them."""
        corners = self._points(line)
        parts = [corners]
        for start, end in pairwise(corners):
            count = int(np.hypot(*(end - start)) / _STEP) + 1
            parts.append(start + (end - start) * np.linspace(0, 1, count)[:, None])
        return np.concatenate(parts)

    def _points(self, data: Array) -> Array:
        return np.asarray(self._axes.transData.transform(data), dtype=np.float64) * self._scale
