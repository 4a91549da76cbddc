"""Token rows as vLLM carries them: floats that hold bytes.

vLLM takes ready-made token embeddings of any width (``prompt_embeds``), in the model's precision. A byte is exact in
FP32, FP16 and BF16, so that rows of integers pass through as the bytes that their columns need. Two more bytes say how
many leading tokens of its sequence a token sees, and with that the mask.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtgr.config import StaticAttention
from mtgr.errors import InvalidRequestError
from mtgr.schema import FIRST_COLUMN, SLOT_COLUMN, TIME, TYPE_COLUMN, Schema, TokenType

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]

MAX_TOKENS = (1 << 16) - 1


class RowCodec:
    """Turns rows into bytes on the host and back on the device.

    Args:
        schema: Says how many bytes each column needs.

    Attributes:
        width: Bytes of a token.
    """

    def __init__(self, schema: Schema) -> None:
        sizes = [0] * schema.width
        sizes[TYPE_COLUMN] = len(TokenType)
        sizes[SLOT_COLUMN] = MAX_TOKENS
        for columns in (schema.event_columns, schema.candidate_columns):
            for index, name in enumerate(columns, start=FIRST_COLUMN):
                size = 1 << 31 if name == TIME else schema.column_size(name)
                sizes[index] = max(sizes[index], size)
        sizes[FIRST_COLUMN] = max(sizes[FIRST_COLUMN], schema.profile_size)
        counts = [max(size - 1, 0).bit_length() + 7 >> 3 for size in sizes]
        # One more column, after the row's own: what the token sees.
        counts.append(2)
        self.columns = schema.width
        self.width = sum(counts)
        self._bytes: Int64Array = np.concatenate([4 * column + np.arange(count) for column, count in enumerate(counts)])
        # For each of a column's four bytes, where it stands among the bytes carried; one past the last is always 0.
        places = np.full(4 * len(counts), self.width)
        places[self._bytes] = np.arange(self.width)
        self._places = torch.from_numpy(places)
        self._shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int32)

    @property
    def places(self) -> Int64Array:
        """Where each byte stands among those of a row, INT64 [width]; the last two are of the visible length."""
        return self._bytes

    def pack(self, rows: Int32Array, visible: Int32Array) -> UInt8Array:
        """Bytes of rows, UINT8 [n, width], row after row: those of a context tell it from any other.

        Args:
            rows: INT32 [n, W], every id in range.
            visible: INT32 [n], how many leading tokens of the sequence each token sees.
        """
        whole = np.concatenate([rows, visible[:, None]], axis=1, dtype=np.int32)
        # Nothing on a device reads the slots of candidates, which may go on beyond two bytes.
        whole[:, SLOT_COLUMN] = np.minimum(whole[:, SLOT_COLUMN], MAX_TOKENS)
        raw = np.ascontiguousarray(whole.astype("<i4", copy=False)).view(np.uint8)
        # An index would leave them column after column.
        packed: UInt8Array = raw.take(self._bytes, axis=1)
        return packed

    def decode(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Rows, INT32 [n, W], and visible lengths, INT32 [n], of ``pack``'s bytes: float [n, width] on any device."""
        if self._places.device != embeds.device:
            self._places, self._shifts = self._places.to(embeds.device), self._shifts.to(embeds.device)
        padded = torch.nn.functional.pad(embeds, (0, 1)).to(torch.int32)
        parts = padded[:, self._places].view(len(embeds), -1, 4) << self._shifts
        whole = parts.sum(dim=-1, dtype=torch.int32)
        return whole[:, : self.columns], whole[:, self.columns].contiguous()


def visible_lengths(
    context: Int32Array, num_candidates: int, static_attention: StaticAttention
) -> tuple[Int32Array, int]:
    """How many leading tokens each token of a request sees (the mask of ``mtgr.model.mask``), and the static tokens.

    Args:
        context: INT32 [n, W], without padding.
        num_candidates: Candidates that follow.
        static_attention: As in the model's config.

    Returns:
        INT32 [n + num_candidates], and the number of profile and history tokens.

    Raises:
        InvalidRequestError: If the context is empty or its tokens are not profile, history, real-time in this order
            with slots from 0 on.
    """
    types, slots = context[:, TYPE_COLUMN], context[:, SLOT_COLUMN]
    n = len(context)
    if n == 0 or (slots != np.arange(n)).any() or (np.diff(types) < 0).any() or not _in_context(types):
        raise InvalidRequestError(
            "context must hold profile, history and real-time rows in this order with slots 0, 1, 2 and so on."
        )
    static = int(np.searchsorted(types, TokenType.REALTIME))
    visible = np.arange(1, n + 1, dtype=np.int32)
    if static_attention == "full":
        visible[:static] = static
    return np.concatenate([visible, np.full(num_candidates, n, dtype=np.int32)]), static


def trimmed(rows: Int32Array) -> Int32Array:
    """Rows without the padding at their end."""
    valid = np.flatnonzero(rows[:, TYPE_COLUMN] != TokenType.PADDING)
    return rows[: valid[-1] + 1] if len(valid) else rows[:0]


def _in_context(types: npt.NDArray[np.int32]) -> bool:
    return int(types[0]) >= TokenType.PROFILE and int(types[-1]) <= TokenType.REALTIME
