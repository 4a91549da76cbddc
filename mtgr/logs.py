"""Events as lines of JSON, or of text for readers, with a bound on everything: length, size of values, repeats."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

Clock = Callable[[], float]
Write = Callable[[bytes], object]

# Writes to a pipe up to this size are never mixed with those of other processes (PIPE_BUF on Linux).
MAX_LINE_BYTES = 4096
MAX_TEXT = 512
_MAX_FIELDS = 32
_MAX_EVENTS = 256
_OTHER = "other events"


class Level(IntEnum):
    """How much an event matters."""

    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40


class EventLog:
    """Writes one line per event; safe for threads.

    Fields are numbers, truth values and short texts. Arrays, lists and mappings are described and never spelled out, so
    that no user's features get into a log by mistake; ids do. Of one event at most ``burst`` lines are written within
    ``seconds``, and the next line says how many were dropped. Only debugging is not limited.

    Args:
        level: Least important level that is written.
        as_json: Whether lines are JSON objects.
        write: Takes a whole line; standard error by default, which the server's log collects.
        clock: Gives unix seconds.
        burst: Lines of one event.
        seconds: Time that the burst is counted over.
    """

    def __init__(
        self,
        level: Level | str = Level.INFO,
        as_json: bool = True,
        write: Write | None = None,
        clock: Clock = time.time,
        burst: int = 10,
        seconds: float = 1.0,
    ) -> None:
        self.level = Level[level.upper()] if isinstance(level, str) else level
        self.as_json = as_json
        self.dropped = 0
        self._write = write or _write_stderr
        self._clock = clock
        self._burst = burst
        self._seconds = seconds
        self._lock = threading.Lock()
        self._repeats: dict[str, _Repeats] = {}

    def enabled(self, level: Level) -> bool:
        """Whether events of this level are written, for fields that cost something to compute."""
        return level >= self.level

    def debug(self, event: str, **fields: Any) -> None:
        """What explains the way of one request."""
        self.log(Level.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """What happens in the normal course of things."""
        self.log(Level.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """What somebody should look at."""
        self.log(Level.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """What is broken."""
        self.log(Level.ERROR, event, fields)

    def log(self, level: Level, event: str, fields: Mapping[str, Any]) -> None:
        """Write an event, unless it is below the level or was written too often just now."""
        if level < self.level:
            return
        now = self._clock()
        with self._lock:
            key = event if event in self._repeats or len(self._repeats) < _MAX_EVENTS else _OTHER
            repeats = self._repeats.setdefault(key, _Repeats(now))
            if now - repeats.since >= self._seconds or now < repeats.since:
                repeats.since, repeats.lines = now, 0
            if repeats.lines >= self._burst and level > Level.DEBUG:
                repeats.dropped += 1
                self.dropped += 1
                return
            repeats.lines += 1
            dropped, repeats.dropped = repeats.dropped, 0
        line = self._line(now, level, event, {**fields, "dropped": dropped} if dropped else fields)
        self._emit(line)

    def flush(self) -> None:
        """Say of events that have not come again how often they were dropped; to be called once in a while."""
        now = self._clock()
        with self._lock:
            over = [(event, one) for event, one in self._repeats.items() if now - one.since >= self._seconds]
            counts = {event: one.dropped for event, one in over if one.dropped}
            for _, one in over:
                one.dropped = 0
        for event, dropped in counts.items():
            self._emit(self._line(now, Level.WARNING, "events_dropped", {"of": event, "dropped": dropped}))

    def _emit(self, line: bytes) -> None:
        with suppress(OSError):  # nobody reads the log any more: no reason to fail a request
            self._write(line)

    def _line(self, now: float, level: Level, event: str, fields: Mapping[str, Any]) -> bytes:
        values: dict[str, Any] = {"time": _moment(now), "level": level.name.lower(), "event": _text(event)}
        taken = set(values)
        for name, value in list(fields.items())[:_MAX_FIELDS]:
            name = _text(name)
            values[f"{name}_" if name in taken else name] = _plain(value)
        line = self._format(values)
        while len(line) > MAX_LINE_BYTES:
            longest = max((name for name in values if name not in taken), key=lambda name: len(str(values[name])))
            values[longest] = f"{str(values[longest])[: len(str(values[longest])) // 2]}..."
            if len(values[longest]) <= 4:
                del values[longest]
            line = self._format(values)
        return line

    def _format(self, values: Mapping[str, Any]) -> bytes:
        if self.as_json:
            return (json.dumps(values) + "\n").encode("ascii")
        moment, level, event, *rest = values.items()
        fields = "".join(f" {_shown(name)}={_shown(value)}" for name, value in rest)
        return f"{moment[1]} {level[1].upper():7} {_shown(event[1])}{fields}\n".encode("ascii")


class _Repeats:
    """How often an event was written since a moment, and not written since its last line."""

    def __init__(self, since: float) -> None:
        self.since = since
        self.lines = 0
        self.dropped = 0


def _plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()  # NumPy's and torch's numbers
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        # JSON has no words for what is not finite.
        return round(float(value), 9) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return int(value) if abs(value) < 2**63 else _text(hex(value))
    if isinstance(value, bytes):
        return _text(value[:MAX_TEXT].decode("utf-8", "backslashreplace"))
    if isinstance(value, str | BaseException):
        return _text(value)
    if hasattr(value, "shape"):
        return _text(f"{type(value).__name__} {getattr(value, 'dtype', '')} {value.shape}")
    return f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__


def _text(value: object) -> str:
    """At most ``MAX_TEXT`` characters, all of them characters: half a surrogate pair is none."""
    try:
        text = str(value)
    except Exception as error:  # noqa: BLE001 - an error's own text may be broken
        text = f"{type(value).__name__} without a text ({type(error).__name__})"
    text = text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
    return text.encode("utf-8", "backslashreplace").decode()


def _shown(value: Any) -> str:
    """For a line of text: as it is where it is one plain word, quoted otherwise, so that no value forges a field."""
    text = value if isinstance(value, str) else json.dumps(value)
    plain = text.isascii() and text.isprintable() and text and not set(text) & set(' "=\\')
    return text if plain else json.dumps(text)


def _moment(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _write_stderr(line: bytes) -> None:
    os.write(sys.stderr.fileno(), line)
