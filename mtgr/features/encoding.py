"""A user record as bytes: a versioned header, the profile, and one column of integers each for items, actions, times.

Layout, little-endian: magic ``MTGU``, version UINT16, two bytes of zeros, length of the profile UINT32, events E
UINT32; the profile as UTF-8 JSON; then three columns, each a smallest value INT64, a width UINT8 (1, 2, 4, or 8 bytes),
and E unsigned integers of that width that are added to it (frame of reference). A typical event takes 7 bytes, not 20.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.features.store import DamagedRecordError, UserRecord

MAGIC = b"MTGU"
VERSION = 1

_HEADER = struct.Struct("<4sHHII")
_COLUMN = struct.Struct("<qB")
_DTYPES = {width: np.dtype(f"<u{width}") for width in (1, 2, 4, 8)}


def encode_record(record: UserRecord) -> bytes:
    """Bytes of a record; ``stale`` is not stored."""
    profile = json.dumps(dict(record.profile), ensure_ascii=False, separators=(",", ":")).encode()
    header = _HEADER.pack(MAGIC, VERSION, 0, len(profile), len(record.items))
    columns = (_encode_column(array) for array in (record.items, record.actions, record.times))
    return b"".join([header, profile, *columns])


def decode_record(data: bytes) -> UserRecord:
    """The record of bytes written by ``encode_record``.

    Raises:
        DamagedRecordError: If they are of another version, cut off, or no record at all.
    """
    if len(data) < _HEADER.size:
        raise _damaged(f"it has {len(data)} bytes")
    magic, version, _, profile_length, num_events = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise _damaged("it does not begin as a record does")
    if version != VERSION:
        raise DamagedRecordError(
            f"this user's record in the feature store has version {version}, this release reads version {VERSION}; "
            "load the store again with `python -m mtgr.features load`."
        )
    offset = _HEADER.size + profile_length
    try:
        profile = json.loads(data[_HEADER.size : offset])
        items, offset = _decode_column(data, offset, num_events, np.int64)
        actions, offset = _decode_column(data, offset, num_events, np.int32)
        times, offset = _decode_column(data, offset, num_events, np.int64)
    except (ValueError, KeyError, struct.error) as error:
        raise _damaged(str(error)) from error
    if offset != len(data) or not isinstance(profile, dict):
        raise _damaged(f"it has {len(data)} bytes instead of {offset}")
    return UserRecord(profile, items, actions, times)


def _encode_column(array: npt.NDArray[Any]) -> bytes:
    values = array.astype(np.int64)
    base = int(values.min()) if len(values) else 0
    # Differences of any two INT64 fit into UINT64, where subtraction wraps around to the right result.
    offsets = values.view(np.uint64) - np.int64(base).view(np.uint64)
    largest = int(offsets.max()) if len(values) else 0
    width = next(width for width in _DTYPES if largest < 1 << (8 * width))
    return _COLUMN.pack(base, width) + offsets.astype(_DTYPES[width]).tobytes()


def _decode_column(data: bytes, offset: int, length: int, dtype: type[np.integer[Any]]) -> tuple[npt.NDArray[Any], int]:
    base, width = _COLUMN.unpack_from(data, offset)
    offset += _COLUMN.size
    offsets = np.frombuffer(data, _DTYPES[width], count=length, offset=offset).astype(np.uint64)
    values = (offsets + np.int64(base).view(np.uint64)).view(np.int64)
    return values.astype(dtype, copy=False), offset + length * int(width)


def _damaged(detail: str) -> DamagedRecordError:
    return DamagedRecordError(
        f"this user's record in the feature store is damaged ({detail}); write it again with "
        "`python -m mtgr.features load`."
    )
