"""From rows to the bytes that vLLM carries, in one pass: checks, padding, mask and bytes.

What is wrong is found out by the functions that say so in a sentence (``mtgr.engines.rows``,
``mtgr.vllm_plugin.rows``); the loop only says that something is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mtgr.config import StaticAttention
from mtgr.engines.rows import RowChecker
from mtgr.errors import InvalidRequestError
from mtgr.features.native import INT, array, compiled
from mtgr.schema import FIRST_COLUMN, SLOT_COLUMN, TYPE_COLUMN, Schema, TokenType
from mtgr.vllm_plugin.rows import MAX_TOKENS, RowCodec, trimmed, visible_lengths

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]

_PADDING, _PROFILE, _REALTIME, _CANDIDATE = (
    int(kind) for kind in (TokenType.PADDING, TokenType.PROFILE, TokenType.REALTIME, TokenType.CANDIDATE)
)
_WRONG = -1


class RowReader:
    """Reads the rows of requests.

    Args:
        schema: The schema.
        max_positions: Size of the model's position table.
        static_attention: As in the model's config.
    """

    def __init__(self, schema: Schema, max_positions: int, static_attention: StaticAttention) -> None:
        self._profile_size = schema.profile_size
        self._static_attention = static_attention
        self._checker = RowChecker(schema, max_positions)
        self._codec = RowCodec(schema)
        self._sizes = {False: self._checker.context_sizes, True: self._checker.candidate_sizes}

    def context(self, rows: Int32Array) -> tuple[UInt8Array, int]:
        """A context without padding.

        Args:
            rows: INT32 [n, W].

        Returns:
            UINT8 [m, width], the bytes of ``RowCodec``, and the number of static tokens.

        Raises:
            InvalidRequestError: If rows are malformed.
        """
        self._check_shape("context", rows)
        packed = np.empty((len(rows), self._codec.width), dtype=np.uint8)
        found = self._read(rows, packed, visible=0)
        if found != _WRONG:
            count, static = divmod(found, MAX_TOKENS + 1)
            return packed[:count], static
        kept = trimmed(rows)
        self._checker.check_context(kept)
        visible, static = visible_lengths(kept, 0, self._static_attention)
        return self._codec.pack(kept, visible), static

    def candidates(self, rows: Int32Array, visible: int) -> UInt8Array:
        """Candidates without padding, as UINT8 [k, width].

        Args:
            rows: INT32 [k, W].
            visible: Tokens of their context.

        Raises:
            InvalidRequestError: If rows are malformed.
        """
        self._check_shape("candidates", rows)
        packed = np.empty((len(rows), self._codec.width), dtype=np.uint8)
        found = self._read(rows, packed, visible)
        if found != _WRONG:
            return packed[:found]
        kept = trimmed(rows)
        self._checker.check_candidates(kept)
        if (kept[:, TYPE_COLUMN] != TokenType.CANDIDATE).any():
            raise InvalidRequestError("candidates must hold candidate rows, padded at the end if at all.")
        return self._codec.pack(kept, np.full(len(kept), visible, dtype=np.int32))

    def _read(self, rows: Int32Array, packed: UInt8Array, visible: int) -> int:
        if rows.dtype != np.int32 or not rows.flags.c_contiguous or len(rows) > MAX_TOKENS:
            return _WRONG
        return int(
            _read_rows(
                rows,
                rows.view(np.uint8),
                self._sizes[visible > 0],
                self._profile_size,
                self._codec.places,
                visible,
                int(self._static_attention == "full"),
                packed,
            )
        )

    def _check_shape(self, name: str, rows: Int32Array) -> None:
        width = self._checker.width
        if rows.ndim != 2 or rows.shape[1] != width:
            raise InvalidRequestError(f"{name} has shape {list(rows.shape)}; it must be [tokens, {width}].")


@compiled(
    INT,
    array("int32", 2),
    array("uint8", 2),
    array("int64"),
    INT,
    array("int64"),
    INT,
    INT,
    array("uint8", 2, written=True),
)
def _read_rows(
    rows: Int32Array,
    raw: UInt8Array,
    sizes: Int64Array,
    profile_size: int,
    places: Int64Array,
    visible: int,
    is_full: int,
    packed: UInt8Array,
) -> int:
    """Candidates that see ``visible`` tokens, or with 0 a context; -1 if anything about them is not as it should be.

    Of candidates their number, of a context that times ``MAX_TOKENS`` + 1 and the number of its static tokens.
    """
    count, width = rows.shape
    while count and rows[count - 1, TYPE_COLUMN] == _PADDING:
        count -= 1
    limits = sizes.copy()
    limits[FIRST_COLUMN] = max(sizes[FIRST_COLUMN], profile_size)  # which of them holds depends on the row
    static = 0
    before = _PROFILE
    wrong = not visible and count == 0
    for index in range(count):
        kind = rows[index, TYPE_COLUMN]
        first_size = sizes[FIRST_COLUMN]
        if visible:
            wrong |= kind != _CANDIDATE
        else:
            wrong |= (kind < before) | (kind > _REALTIME) | (rows[index, SLOT_COLUMN] != index)
            before = kind
            if kind != _REALTIME:
                static = index + 1
            if kind == _PROFILE:
                first_size = profile_size
        wrong |= rows[index, FIRST_COLUMN] >= first_size
    # A loop of its own over whole rows, without branches, of which the compiler makes vector instructions.
    for index in range(count):
        for column in range(width):
            wrong |= (rows[index, column] < 0) | (rows[index, column] >= limits[column])
    if wrong:
        return _WRONG
    last = len(places) - 2  # the two bytes of visible lengths
    for index in range(count):
        for place in range(last):
            packed[index, place] = raw[index, places[place]]
        if visible and rows[index, SLOT_COLUMN] > MAX_TOKENS:
            for place in range(last):
                if places[place] // 4 == SLOT_COLUMN:
                    packed[index, place] = 255
        seen = visible
        if not visible:
            seen = static if is_full and index < static else index + 1
        packed[index, last] = seen & 255
        packed[index, last + 1] = seen >> 8
    return count if visible else count * (MAX_TOKENS + 1) + static
