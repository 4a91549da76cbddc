"""A line outside is told by the gaps between requests."""

from __future__ import annotations

from mtgr.features.pace import GAP_SECONDS, ROW, Pace


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


def come(pace: Pace, clock: Clock, count: int, gap: float, work: float = 0.0004) -> list[bool]:
    """What is said of each of some requests."""
    said = []
    for _ in range(count):
        clock.now += gap
        pace.begin()
        said.append(pace.hurried)
        clock.now += work
        pace.end()
    return said


def test_requests_without_a_gap_are_a_line_after_some() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert come(pace, clock, 1, 1.0) == [False]
    assert come(pace, clock, 40, GAP_SECONDS / 10) == [False] * (ROW - 1) + [True] * (41 - ROW)


def test_one_gap_ends_the_line() -> None:
    clock = Clock()
    pace = Pace(clock)
    come(pace, clock, 50, 0.0)
    assert pace.hurried
    assert come(pace, clock, 1, 2 * GAP_SECONDS) == [False]
    assert come(pace, clock, ROW - 1, 0.0) == [False] * (ROW - 1)


def test_slow_work_alone_is_no_line() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert not any(come(pace, clock, 100, 2 * GAP_SECONDS, work=0.05))
