"""Checks of a batch of rows before an engine takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.engines.rows import RowChecker
from mtgr.errors import InvalidRequestError
from mtgr.schema import SLOT_COLUMN, TYPE_COLUMN, TokenType

Rows = npt.NDArray[Any]


def check_batch(inputs: Mapping[str, Rows], checker: RowChecker) -> None:
    """Check shapes and ids.

    Args:
        inputs: ``context`` INT32 [B, n, W] and, to rank, ``candidates`` INT32 [B, k, W].
        checker: Of the schema.

    Raises:
        InvalidRequestError: If the rows have another width than the schema's, an id is out of range, or there is no
            context.
    """
    for name, rows in inputs.items():
        if rows.ndim != 3 or rows.shape[2] != checker.width:
            raise InvalidRequestError(
                f"{name} has shape {list(rows.shape)}; it must be [batch, tokens, {checker.width}]."
            )
    if "context" not in inputs or inputs["context"].shape[1] == 0:
        raise InvalidRequestError("context has no tokens; it must have at least one.")
    checker.check_context(inputs["context"])
    if "candidates" in inputs:
        if len(inputs["candidates"]) != len(inputs["context"]):
            raise InvalidRequestError(
                f"there are {len(inputs['context'])} contexts and {len(inputs['candidates'])} sets of candidates; "
                "send one set for each."
            )
        checker.check_candidates(inputs["candidates"])


def check_order(inputs: Mapping[str, Rows], max_positions: int) -> None:
    """Check what lets three lengths stand in for a mask: profile and history, real-time, padding; slots ascending.

    Args:
        inputs: Checked by ``check_batch``.
        max_positions: Size of the model's position table; candidates stand behind the context.

    Raises:
        InvalidRequestError: If rows stand in another order, or candidates have no position left.
    """
    for name, rows in inputs.items():
        types = rows[..., TYPE_COLUMN]
        valid = types != TokenType.PADDING
        if (valid[:, 1:] & ~valid[:, :-1]).any():
            raise InvalidRequestError(f"{name} has padding before a token; pad on the right.")
        is_candidate = types == TokenType.CANDIDATE
        if name == "candidates":
            if (valid & ~is_candidate).any():
                raise InvalidRequestError("candidates has a row that is no candidate; set its type to 4.")
            continue
        is_realtime = types == TokenType.REALTIME
        if (is_realtime[:, :-1] & valid[:, 1:] & ~is_realtime[:, 1:]).any() or is_candidate.any():
            raise InvalidRequestError("context must hold profile and history rows, then real-time rows.")
        if (valid & (rows[..., SLOT_COLUMN] != np.arange(rows.shape[1]))).any():
            raise InvalidRequestError("context must have slots 0, 1, 2 and so on.")
        if "candidates" in inputs and valid.sum(axis=1).max(initial=0) >= max_positions:
            raise InvalidRequestError(
                f"context has {max_positions} tokens, as many as the model has positions; candidates need one more."
            )
