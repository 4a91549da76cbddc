"""How stores encode a record: exact and compact, and damage is an error with a sentence."""

from __future__ import annotations

import numpy as np
import pytest

from mtgr.features.encoding import decode_record, encode_record
from mtgr.features.store import DamagedRecordError, UserRecord
from tests.unit.records import assert_equal, record


@pytest.mark.parametrize("events", [0, 1, 2000])
def test_encoding_round_trip(events: int) -> None:
    assert_equal(decode_record(encode_record(record(events))), record(events))


def test_encoding_of_extremes() -> None:
    ends = np.array([-(2**63), 2**63 - 1, 0])
    extreme = UserRecord({}, ends, np.array([-(2**31), 2**31 - 1, 0], dtype=np.int32), ends)
    assert_equal(decode_record(encode_record(extreme)), extreme)


@pytest.mark.parametrize("spread", [0, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32])
def test_encoding_at_the_edges_of_widths(spread: int) -> None:
    one = UserRecord({}, np.array([7, 7 + spread]), np.zeros(2, dtype=np.int32), np.array([-5, spread - 5]))
    assert_equal(decode_record(encode_record(one)), one)


def test_encoding_is_compact() -> None:
    generator = np.random.default_rng(0)
    times = np.sort(generator.integers(1_700_000_000, 1_700_000_000 + 10**8, 2000))
    usual = UserRecord({}, generator.integers(1, 60_000, 2000), generator.integers(0, 5, 2000).astype(np.int32), times)
    assert len(encode_record(usual)) / 2000 < 7.1


def test_another_version_is_refused_with_a_sentence() -> None:
    data = bytearray(encode_record(record(3)))
    data[4] = 2
    with pytest.raises(DamagedRecordError, match=r"has version 2, this release reads version 1; load the store again"):
        decode_record(bytes(data))


def test_every_cut_and_every_longer_record_is_damaged() -> None:
    data = encode_record(record(3))
    for length in range(len(data)):
        with pytest.raises(DamagedRecordError, match="damaged"):
            decode_record(data[:length])
    for wrong in (data + b"\x00", b"XXXX" + data[4:], b"\x80\x04" + data):
        with pytest.raises(DamagedRecordError, match="damaged"):
            decode_record(wrong)
