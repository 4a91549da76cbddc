"""Checks of token rows before they reach an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.errors import InvalidRequestError
from mtgr.schema import FIRST_COLUMN, SLOT_COLUMN, TIME, TYPE_COLUMN, Schema, TokenType


class RowChecker:
    """Refuses rows with an id out of range: it would stop a GPU for every later request, not only for this one.

    Args:
        schema: The schema.
        max_positions: Size of the model's position table.
    """

    def __init__(self, schema: Schema, max_positions: int) -> None:
        self.width = schema.width
        self._profile_size = schema.profile_size
        context = _sizes(schema, schema.event_columns)
        context[SLOT_COLUMN] = max_positions
        self._context = _Limits(context)
        self._candidates = _Limits(_sizes(schema, schema.candidate_columns))

    @property
    def context_sizes(self) -> npt.NDArray[np.int64]:
        """How many ids each column of a context has, INT64 [W]; of profile tokens the first has other ones."""
        return self._context.sizes

    @property
    def candidate_sizes(self) -> npt.NDArray[np.int64]:
        """The same of candidates."""
        return self._candidates.sizes

    def check_context(self, rows: npt.NDArray[Any]) -> None:
        """Check context rows, INT [..., n, W].

        Raises:
            InvalidRequestError: If an id is out of range.
        """
        is_profile = rows[..., TYPE_COLUMN] == TokenType.PROFILE
        if self._context.hold(rows) and rows[..., FIRST_COLUMN][is_profile].max(initial=0) < self._profile_size:
            return
        limits = np.broadcast_to(self._context.sizes, rows.shape).copy()
        limits[..., FIRST_COLUMN][is_profile] = self._profile_size
        _check("context", rows, limits)

    def check_candidates(self, rows: npt.NDArray[Any]) -> None:
        """Check candidate rows, INT [..., k, W].

        Raises:
            InvalidRequestError: If an id is out of range.
        """
        if not self._candidates.hold(rows):
            _check("candidates", rows, np.broadcast_to(self._candidates.sizes, rows.shape))


class _Limits:
    """Sizes of columns, repeated for many rows: a batch is compared in one pass over memory.

    Args:
        sizes: INT64 [W].
    """

    def __init__(self, sizes: npt.NDArray[np.int64]) -> None:
        self.sizes = sizes
        self._repeated = sizes.astype(np.uint32)

    def hold(self, rows: npt.NDArray[Any]) -> bool:
        """Whether all ids are below; False also where that is not seen at once, as in rows of another layout."""
        if rows.dtype != np.int32 or not rows.flags.c_contiguous:
            return False
        flat = rows.reshape(-1).view(np.uint32)  # what is negative becomes large
        limits = self._repeated
        if flat.size > limits.size:
            limits = self._repeated = np.tile(self.sizes.astype(np.uint32), rows.size // len(self.sizes))
        return not (flat >= limits[: flat.size]).any()


def _sizes(schema: Schema, columns: tuple[str, ...]) -> npt.NDArray[np.int64]:
    sizes = np.full(schema.width, np.iinfo(np.int32).max, dtype=np.int64)
    for index, column in enumerate(columns, start=FIRST_COLUMN):
        if column != TIME:
            sizes[index] = schema.column_size(column)
    sizes[TYPE_COLUMN] = len(TokenType)
    return sizes


def _check(name: str, rows: npt.NDArray[Any], limits: npt.NDArray[np.int64]) -> None:
    wrong = (rows < 0) | (rows >= limits)
    if wrong.any():
        column = int(wrong.any(axis=tuple(range(rows.ndim - 1))).argmax())
        raise InvalidRequestError(f"{name} has an id out of range in column {column}; build rows with the schema.")
