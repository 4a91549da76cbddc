"""A user's state at the moment of a request: what candidate rows are built from, beside the items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtgr.data.tasks import SESSION_GAP_SECONDS
from mtgr.errors import ConfigurationError
from mtgr.features.catalog import ItemCatalog, strength_of
from mtgr.features.native import INT, NONE, array, compiled, group
from mtgr.schema import Schema

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]

STATE_VERSION = 5
NEVER = -1  # stands for a time that does not exist
_HEADER = 10
_SEEN = 5  # numbers of each item that the user had an event with
_DIGIT_BITS = 8
_DIGITS = 1 << _DIGIT_BITS
_INT32_MAX = np.iinfo(np.int32).max


@dataclass(frozen=True)
class CandidateState:
    """What candidate rows need to know of a user at one moment.

    Attributes:
        request_time: Unix seconds.
        first_time: Unix seconds of the first event, or ``NEVER``.
        last_time: Unix seconds of the last event, or ``NEVER``.
        num_events: Events so far.
        num_liked: Liked events so far.
        num_sessions: Sessions so far.
        session_events: Events of the last session.
        context_length: Tokens of the context: the first candidate's slot.
        category_events: INT64 [G], events with items of each category.
        category_liked: INT64 [G], liked ones among them.
        seen_items: INT64 [M], internal ids of items the user had an event with, ascending.
        seen_times: INT64 [M], unix seconds of the last event with each.
        seen_events: INT64 [M], events with each.
        seen_surprise: INT64 [M, 2], how much stronger the actions on each were than is usual for it, summed.
    """

    request_time: int
    first_time: int
    last_time: int
    num_events: int
    num_liked: int
    num_sessions: int
    session_events: int
    context_length: int
    category_events: Int64Array
    category_liked: Int64Array
    seen_items: Int64Array
    seen_times: Int64Array
    seen_events: Int64Array
    seen_surprise: Int64Array

    def to_array(self, epoch: int) -> Int32Array:
        """The state as the INT32 ``candidate_state`` tensor; times become seconds since ``epoch``."""
        header = (
            STATE_VERSION,
            self.request_time,
            self.first_time,
            self.last_time,
            self.num_events,
            self.num_liked,
            self.num_sessions,
            self.session_events,
            self.context_length,
            len(self.category_events),
        )
        by_category = (self.category_events, self.category_liked)
        seen = (self.seen_items, self.seen_times, self.seen_events, self.seen_surprise.reshape(-1))
        whole = np.concatenate((header, *by_category, *seen), dtype=np.int64)
        packed = np.empty(len(whole), dtype=np.int32)
        _pack(whole, epoch, packed)
        return packed

    @classmethod
    def from_array(cls, tensor: Int32Array, epoch: int) -> CandidateState:
        """Read a tensor written by ``to_array``.

        Raises:
            ConfigurationError: If the tensor is of another version or damaged.
        """
        if len(tensor) < _HEADER or tensor[0] != STATE_VERSION:
            raise ConfigurationError("candidate_state is of another version; restart the server with one release.")
        num_categories = int(tensor[_HEADER - 1])
        rest = len(tensor) - _HEADER - 2 * num_categories
        if num_categories < 0 or rest < 0 or rest % _SEEN:
            raise ConfigurationError("candidate_state has a wrong length; restart the server with one release.")
        values = np.empty(len(tensor), dtype=np.int64)
        _unpack(np.ascontiguousarray(tensor), epoch, values)
        request_time, first_time, last_time, *counts = values[1 : _HEADER - 1].tolist()
        num_events, num_liked, num_sessions, session_events, context_length = counts
        seen, count = values[_HEADER + 2 * num_categories :], rest // _SEEN
        return cls(
            request_time,
            first_time,
            last_time,
            num_events,
            num_liked,
            num_sessions,
            session_events,
            context_length,
            values[_HEADER : _HEADER + num_categories],
            values[_HEADER + num_categories : _HEADER + 2 * num_categories],
            seen[:count],
            seen[count : 2 * count],
            seen[2 * count : 3 * count],
            seen[3 * count :].reshape(count, 2),
        )


def build_candidate_state(
    schema: Schema,
    catalog: ItemCatalog,
    items: Int64Array,
    actions: Int32Array,
    times: Int64Array,
    request_time: int,
    context_length: int,
) -> CandidateState:
    """The state after a user's events.

    Args:
        schema: The schema.
        catalog: The items.
        items: INT64 [E], internal ids of all of the user's events, ascending in time.
        actions: INT32 [E], actions from 0.
        times: INT64 [E], unix seconds.
        request_time: Unix seconds.
        context_length: Tokens of the user's context.
    """
    counts, by_category, seen_items, seen_times, seen_events, seen_surprise = _summed(
        items,
        np.ascontiguousarray(actions, dtype=np.int32),
        times,
        catalog.categories,
        catalog.expected,
        schema.liked_action,
        schema.num_actions,
    )
    return CandidateState(
        request_time,
        int(times[0]) if len(times) else NEVER,
        int(times[-1]) if len(times) else NEVER,
        len(items),
        *counts,
        context_length,
        by_category[0],
        by_category[1],
        seen_items,
        seen_times,
        seen_events,
        seen_surprise,
    )


def event_surprise(schema: Schema, catalog: ItemCatalog, items: Int64Array, actions: Int32Array) -> Int64Array:
    """INT64 [E, 2]: how much stronger each action is than is usual for its item, in 1 / ``STRENGTH``."""
    surprise = np.empty((len(items), 2), dtype=np.int64)
    _fill_surprise(items, np.ascontiguousarray(actions, dtype=np.int32), catalog.expected, schema.num_actions, surprise)
    return surprise


def session_counts(times: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Sessions up to each event, and the events of its session up to it.

    Args:
        times: INT64 [E], unix seconds, ascending.

    Returns:
        INT64 [E] and INT64 [E], both counted from 1.
    """
    sessions, events = np.empty((2, len(times)), dtype=np.int64)
    _count_sessions(times, sessions, events)
    return sessions, events


@compiled(NONE, array("int64"), array("int64", written=True), array("int64", written=True))
def _count_sessions(times: Int64Array, sessions: Int64Array, events: Int64Array) -> None:
    for index in range(len(times)):
        if index == 0 or times[index] - times[index - 1] > SESSION_GAP_SECONDS:
            sessions[index] = 1 if index == 0 else sessions[index - 1] + 1
            events[index] = 1
        else:
            sessions[index], events[index] = sessions[index - 1], events[index - 1] + 1


@compiled(NONE, array("int64"), array("int32"), array("int32", 2), INT, array("int64", 2, written=True))
def _fill_surprise(
    items: Int64Array, actions: Int32Array, expected: Int32Array, num_actions: int, surprise: Int64Array
) -> None:
    for index in range(len(items)):
        by_rank, top = strength_of(actions[index], num_actions)
        surprise[index, 0] = by_rank - expected[items[index], 0]
        surprise[index, 1] = top - expected[items[index], 1]


@compiled(array("int64", written=True), array("int64"))
def _by_item(items: Int64Array) -> Int64Array:
    """Indices that sort the items, equal ones in their order: digit by digit, quicker for ids than to compare."""
    order, other = np.arange(len(items)), np.empty(len(items), dtype=np.int64)
    largest = np.int64(0)
    for item in items:
        largest = max(largest, item)
    shift = 0
    while largest >> shift:
        starts = np.zeros(_DIGITS + 1, dtype=np.int64)
        for item in items:
            starts[((item >> shift) & (_DIGITS - 1)) + 1] += 1
        starts = np.cumsum(starts)
        for index in order:
            digit = (items[index] >> shift) & (_DIGITS - 1)
            other[starts[digit]] = index
            starts[digit] += 1
        order, other = other, order
        shift += _DIGIT_BITS
    return order


_WRITTEN, _WRITTEN_2 = array("int64", written=True), array("int64", 2, written=True)


@compiled(
    group(group(INT, INT, INT), _WRITTEN_2, _WRITTEN, _WRITTEN, _WRITTEN, _WRITTEN_2),
    array("int64"),
    array("int32"),
    array("int64"),
    array("uint8", 2),
    array("int32", 2),
    INT,
    INT,
)
def _summed(
    items: Int64Array,
    actions: Int32Array,
    times: Int64Array,
    categories: UInt8Array,
    expected: Int32Array,
    liked_action: int,
    num_actions: int,
) -> tuple[tuple[int, int, int], Int64Array, Int64Array, Int64Array, Int64Array, Int64Array]:
    """Liked events, sessions, events of the last one; sums by category, and by item."""
    num_events, num_categories = len(items), categories.shape[1]
    by_category = np.zeros((2, num_categories), dtype=np.int64)
    num_liked = 0
    for index in range(num_events):
        liked = int(actions[index] >= liked_action)
        num_liked += liked
        for category in range(num_categories):
            flag = np.int64(categories[items[index], category])
            by_category[0, category] += flag
            by_category[1, category] += flag * liked

    order = _by_item(items)
    count = 0
    for place in range(num_events):
        count += int(place == 0 or items[order[place]] != items[order[place - 1]])
    seen_items, seen_times = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    seen_events, seen_surprise = np.zeros(count, dtype=np.int64), np.zeros((count, 2), dtype=np.int64)
    surprise = np.empty((num_events, 2), dtype=np.int64)
    _fill_surprise(items, actions, expected, num_actions, surprise)
    at = -1
    for place in range(num_events):
        event = order[place]
        if at < 0 or items[event] != seen_items[at]:
            at += 1
            seen_items[at] = items[event]
        seen_times[at] = times[event]  # the last of an item is the latest
        seen_events[at] += 1
        seen_surprise[at] += surprise[event]

    sessions, session_events = np.zeros(num_events + 1, dtype=np.int64), np.zeros(num_events + 1, dtype=np.int64)
    _count_sessions(times, sessions, session_events)
    last = max(num_events - 1, 0)
    counts = (num_liked, sessions[last], session_events[last])
    return counts, by_category, seen_items, seen_times, seen_events, seen_surprise


@compiled(group(INT, INT), INT, INT)
def _times_of_items(length: int, num_categories: int) -> tuple[int, int]:
    """Where a packed state has the times of the items that the user knows, and how many they are."""
    count = (length - _HEADER - 2 * num_categories) // _SEEN
    return _HEADER + 2 * num_categories + count, count


@compiled(NONE, array("int64"), INT, array("int32", written=True))
def _pack(values: Int64Array, epoch: int, packed: Int32Array) -> None:
    start, count = _times_of_items(len(values), values[_HEADER - 1])
    for index in range(len(values)):
        value = values[index]
        if (1 <= index <= 3 or start <= index < start + count) and value != NEVER:
            # An earlier time than the epoch is kept as the epoch: rows clip it the same way.
            value = min(max(value - epoch, 0), _INT32_MAX)
        packed[index] = value


@compiled(NONE, array("int32"), INT, array("int64", written=True))
def _unpack(packed: Int32Array, epoch: int, values: Int64Array) -> None:
    start, count = _times_of_items(len(packed), packed[_HEADER - 1])
    for index in range(len(packed)):
        value = np.int64(packed[index])
        if (1 <= index <= 3 or start <= index < start + count) and value != NEVER:
            value += epoch
        values[index] = value
