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
        self._context = _sizes(schema, schema.event_columns)
        self._context[SLOT_COLUMN] = max_positions
        self._candidates = _sizes(schema, schema.candidate_columns)

    def check_context(self, rows: npt.NDArray[Any]) -> None:
        """Check context rows, INT [..., n, W].

        Raises:
            InvalidRequestError: If an id is out of range.
        """
        limits = np.broadcast_to(self._context, rows.shape).copy()
        limits[..., FIRST_COLUMN][rows[..., TYPE_COLUMN] == TokenType.PROFILE] = self._profile_size
        _check("context", rows, limits)

    def check_candidates(self, rows: npt.NDArray[Any]) -> None:
        """Check candidate rows, INT [..., k, W].

        Raises:
            InvalidRequestError: If an id is out of range.
        """
        _check("candidates", rows, np.broadcast_to(self._candidates, rows.shape))


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
