"""Rows read in one loop: the same bytes, padding and errors as of the functions that go column by column."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mtgr.engines.row_reader import RowReader
from mtgr.engines.rows import RowChecker
from mtgr.errors import InvalidRequestError
from mtgr.schema import FIRST_COLUMN, SLOT_COLUMN, TIME, TYPE_COLUMN, TokenType
from mtgr.vllm_plugin.rows import MAX_TOKENS, RowCodec, trimmed, visible_lengths
from tests.unit.models import pad, random_user, small_schema

SCHEMA = small_schema()
POSITIONS = 2000
TIME_COLUMN = FIRST_COLUMN + SCHEMA.event_columns.index(TIME)


def refuses_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong in the loop is looked into column by column: here that alone would be a mistake."""

    def column_by_column(*arguments: object) -> None:
        pytest.fail("the loop did not take these rows")

    monkeypatch.setattr(RowChecker, "check_context", column_by_column)
    monkeypatch.setattr(RowChecker, "check_candidates", column_by_column)


@pytest.mark.parametrize("static_attention", ["full", "causal"])
@pytest.mark.parametrize(
    ("history", "realtime", "candidates"), [(0, 0, 1), (0, 7, 0), (9, 0, 40), (600, 90, 300), (1, 1, 1)]
)
def test_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, static_attention: str, history: int, realtime: int, candidates: int
) -> None:
    generator = np.random.default_rng(history + candidates)
    user = random_user(SCHEMA, generator, history=history, realtime=realtime, candidates=candidates)
    codec, reader = RowCodec(SCHEMA), RowReader(SCHEMA, POSITIONS, static_attention)  # type: ignore[arg-type]
    visible, static = visible_lengths(user.context, 0, static_attention)  # type: ignore[arg-type]
    count = len(user.context)
    refuses_the_loop(monkeypatch)
    for context, rows in ((user.context, user.candidates), (pad(user.context, 900), pad(user.candidates, 512))):
        packed, found = reader.context(context)
        assert found == static
        np.testing.assert_array_equal(packed, codec.pack(user.context, visible))
        seen = np.full(len(user.candidates), count, dtype=np.int32)
        np.testing.assert_array_equal(reader.candidates(rows, count), codec.pack(user.candidates, seen))


def test_slots_of_candidates_may_go_on_beyond_two_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    user = random_user(SCHEMA, np.random.default_rng(0), history=5, realtime=2, candidates=3)
    user.candidates[:, SLOT_COLUMN] = (MAX_TOKENS, MAX_TOKENS + 1, 1 << 30)
    refuses_the_loop(monkeypatch)
    found = RowReader(SCHEMA, POSITIONS, "full").candidates(user.candidates, 7)
    np.testing.assert_array_equal(found, RowCodec(SCHEMA).pack(user.candidates, np.full(3, 7, dtype=np.int32)))


def set_to(column: int, value: int, row: int = 3) -> Callable[[np.ndarray], None]:
    def change(rows: np.ndarray) -> None:
        rows[row, column] = value

    return change


def sentence_of(call: Callable[[], object]) -> str:
    """The error's, or nothing."""
    try:
        call()
    except InvalidRequestError as error:
        return str(error)
    return ""


def the_rule(context: np.ndarray) -> None:
    """What the functions say that go column by column."""
    RowChecker(SCHEMA, POSITIONS).check_context(context)
    visible_lengths(trimmed(context), 0, "full")


@pytest.mark.parametrize(
    "change",
    [
        *(set_to(column, -1) for column in range(SCHEMA.width)),
        *(set_to(column, np.iinfo(np.int32).max) for column in range(SCHEMA.width) if column != TIME_COLUMN),
        set_to(TYPE_COLUMN, TokenType.CANDIDATE),
        set_to(TYPE_COLUMN, TokenType.PADDING),
        set_to(TYPE_COLUMN, TokenType.REALTIME),
        set_to(TYPE_COLUMN, TokenType.PROFILE, row=-1),
        set_to(SLOT_COLUMN, 7),
        set_to(FIRST_COLUMN, SCHEMA.profile_size, row=0),
        set_to(FIRST_COLUMN, SCHEMA.num_items, row=-1),
        lambda rows: rows.fill(0),
    ],
)
def test_what_is_wrong_is_said_as_before(change: Callable[[np.ndarray], None]) -> None:
    user = random_user(SCHEMA, np.random.default_rng(1), history=20, realtime=4, candidates=6)
    reader = RowReader(SCHEMA, POSITIONS, "full")
    change(user.context)
    expected = sentence_of(lambda: the_rule(user.context))
    assert expected
    assert sentence_of(lambda: reader.context(user.context)) == expected


@pytest.mark.parametrize("column", range(SCHEMA.width))
@pytest.mark.parametrize("value", [-1, np.iinfo(np.int32).max])
def test_candidates_out_of_range_are_refused(column: int, value: int) -> None:
    user = random_user(SCHEMA, np.random.default_rng(2), history=3, realtime=0, candidates=6)
    user.candidates[2, column] = value
    is_free = column == SLOT_COLUMN or column >= FIRST_COLUMN + len(SCHEMA.candidate_columns)
    is_time = column == FIRST_COLUMN + SCHEMA.candidate_columns.index(TIME)
    reader = RowReader(SCHEMA, POSITIONS, "full")
    found = sentence_of(lambda: reader.candidates(user.candidates, 4))
    assert found == sentence_of(lambda: RowChecker(SCHEMA, POSITIONS).check_candidates(user.candidates))
    assert found or (value > 0 and (is_free or is_time))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((3, SCHEMA.width + 1), dtype=np.int32), "has shape"),
        (np.zeros(SCHEMA.width, dtype=np.int32), "has shape"),
        (np.ones((3, SCHEMA.width), dtype=np.int32), "padded at the end"),
    ],
)
def test_other_rows_are_no_candidates(rows: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        RowReader(SCHEMA, POSITIONS, "full").candidates(rows, 4)


def test_rows_of_another_layout_are_read_too() -> None:
    """As views, and as the wider numbers that NumPy makes by itself."""
    user = random_user(SCHEMA, np.random.default_rng(3), history=9, realtime=2, candidates=5)
    reader = RowReader(SCHEMA, POSITIONS, "full")
    expected = reader.context(user.context)[0], reader.candidates(user.candidates, 12)
    for change in (np.asfortranarray, lambda rows: rows.astype(np.int64)):
        found = reader.context(change(user.context))[0], reader.candidates(change(user.candidates), 12)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
