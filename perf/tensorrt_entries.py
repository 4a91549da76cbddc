"""The plans that are built and timed on a GPU, what matters most first, and the requests that they answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from export import tensorrt_ways as ways
from export.last_token import LastToken
from export.tensorrt_options import Precision
from export.tensorrt_ways import Kind, Way

Lengths = Literal["dynamic", "fixed", "b1", "b8"]
"""Axes that vary: all; the batch alone, at lengths of ``BUCKET``; or none, so that a CUDA graph holds it best."""
Try = tuple[Lengths, Way]

BUCKET = (512, 256)  # context and candidates that are timed, and those of graphs of fixed lengths
# Batch, context and candidates: lone and merged requests, the shortest, and what is longer than the bucket.
SHAPES = {
    "b1": (1, *BUCKET),
    "b8": (8, *BUCKET),
    "b3-ragged": (3, 384, 64),
    "b1-shortest": (1, 64, 16),
    "b32-short": (32, 128, 16),
    "b2-long": (2, 1024, 1024),
}
TIMED = ("b1", "b8")
STATIC = {"b1": 1, "b8": 8}


@dataclass(frozen=True)
class Wanted:
    """One plan that is wanted.

    Attributes:
        kind: What it does.
        precision: Of the plan.
        preset: Of the network; ``-bias`` behind it for relative biases.
        tries: Lengths and ways, in the order in which they are tried.
        label: What tells it from others of its preset, kind and precision; they are built side by side, as one that
            was tried after another would begin too late.
    """

    kind: Kind
    precision: Precision
    preset: str
    tries: tuple[Try, ...]
    label: str = ""

    @property
    def family(self) -> str:
        """What it shares with others of its preset, kind and precision."""
        return f"{self.preset}-{self.kind}-{self.precision}"

    @property
    def name(self) -> str:
        """What it is called."""
        return self.family + (f"-{self.label}" if self.label else "")

    def graphs(self) -> Iterator[tuple[str, Lengths, LastToken]]:
        """The graphs that it may be built from."""
        for lengths, way in self.tries:
            yield title_of(self.preset, self.kind, self.precision, way), lengths, way.last


def dynamic(*tried: Way) -> tuple[Try, ...]:
    """Ways with lengths that vary."""
    return tuple(("dynamic", way) for way in tried)


_FREE: tuple[Try, ...] = (*dynamic(ways.FREE, ways.FREE_ONE), ("fixed", ways.FREE))
_TYPED = dynamic(ways.PLAIN, ways.ONE)
_COMPANY = dynamic(ways.COMPANY, ways.COMPANY_ONE, ways.COMPANY_ALONE)
_FREE_COMPANY = dynamic(ways.FREE_COMPANY, ways.FREE_COMPANY_ONE)
_OTHERS = dynamic(ways.SUMS, ways.ROWS)
PLANS = (
    # Large networks take longest, so they begin first.
    Wanted("rank", "fp16", "large", _FREE),
    Wanted("retrieve", "fp32", "large", _COMPANY),
    Wanted("retrieve", "fp16", "large", _FREE_COMPANY),
    Wanted("rank", "fp16", "large", _TYPED, "typed"),
    Wanted("rank", "int8", "large", _TYPED),
    Wanted("rank", "fp32", "large", _TYPED),
    Wanted("rank", "fp16", "large", (("b8", ways.FREE),), "b8"),
    Wanted("retrieve", "fp32", "large", _OTHERS, "others"),
    Wanted("rank", "fp16", "small", _FREE),
    Wanted("retrieve", "fp32", "small", _COMPANY),
    Wanted("retrieve", "fp16", "small", _FREE_COMPANY),
    Wanted("rank", "int8", "large", dynamic(ways.FREE, ways.FREE_ONE), "fp16"),
    Wanted("rank", "fp16", "small", _TYPED, "typed"),
    Wanted("rank", "fp32", "small", _TYPED),
    Wanted("rank", "int8", "small", _TYPED),
    Wanted("retrieve", "fp32", "small", _OTHERS, "others"),
    Wanted("rank", "fp16", "small", (("b8", ways.FREE),), "b8"),
    Wanted("rank", "int8", "small", dynamic(ways.FREE, ways.FREE_ONE), "fp16"),
    Wanted("retrieve", "fp16", "small", dynamic(ways.COMPANY, ways.SUMS), "typed"),
    Wanted("rank", "fp16", "large", (("b1", ways.FREE),), "b1"),
    Wanted("retrieve", "fp16", "large", dynamic(ways.COMPANY, ways.SUMS), "typed"),
    Wanted("retrieve", "int8", "small", dynamic(ways.COMPANY, ways.SUMS)),
    Wanted("retrieve", "int8", "large", dynamic(ways.COMPANY, ways.SUMS)),
    Wanted("rank", "fp16", "small", (("b1", ways.FREE),), "b1"),
    Wanted("rank", "fp16", "small-bias", _TYPED),
)
TINY_PLANS = (
    Wanted("rank", "fp16", "tiny", _FREE),
    Wanted("rank", "fp16", "tiny", _TYPED, "typed"),
    Wanted("rank", "fp32", "tiny", _TYPED),
    Wanted("rank", "int8", "tiny", _TYPED),
    Wanted("rank", "fp16", "tiny", (("b1", ways.FREE),), "b1"),
    Wanted("rank", "fp16", "tiny", (("fixed", ways.PLAIN),), "fixed"),
    Wanted("retrieve", "fp32", "tiny", _COMPANY),
    Wanted("retrieve", "fp16", "tiny", dynamic(ways.FREE_COMPANY, ways.SUMS)),
    Wanted("retrieve", "int8", "tiny", dynamic(ways.ROWS)),
)


def title_of(preset: str, kind: Kind, precision: Precision, way: Way) -> str:
    """What a graph is called; plans may share it."""
    return f"{preset}-{kind}-{way.source(precision)}"


def folder_of(work: Path, preset: str) -> Path:
    """Where the checkpoint of a preset lies."""
    return work / "checkpoints" / preset


def graph_of(work: Path, title: str, lengths: str, last: LastToken = "products") -> Path:
    """Where a graph lies."""
    return work / "graphs" / title / (lengths if last == "products" else f"{lengths}-{last}") / "model.onnx"
