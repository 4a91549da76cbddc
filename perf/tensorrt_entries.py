"""The plans that are built and timed on a GPU, what matters most first, and the requests that they answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from export.last_token import LastToken
from export.tensorrt_options import Precision
from export.tensorrt_ways import ways_to

Kind = Literal["rank", "retrieve"]
Lengths = Literal["dynamic", "fixed", "b1", "b8"]
"""Axes that vary: all; the batch alone, at lengths of ``BUCKET``; or none, so that a CUDA graph holds it best."""

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
        precision: Of weights and activations.
        preset: Of the network; ``-bias`` behind it for relative biases.
        lengths: Which axes vary, the first that TensorRT builds.
        cublas: Whether 8.6 may take its products from a cuBLAS that the host has.
    """

    kind: Kind
    precision: Precision
    preset: str
    lengths: tuple[Lengths, ...] = ("dynamic",)
    cublas: bool = False

    @property
    def graph(self) -> str:
        """What its graphs are called."""
        return f"{self.preset}-{self.kind}-{self.precision}"

    @property
    def name(self) -> str:
        """What it is called."""
        varying = "" if self.lengths[0] == "dynamic" else f"-{self.lengths[0]}"
        return self.graph + varying + ("-cublas" if self.cublas else "")

    def graphs(self) -> Iterator[tuple[str, Lengths, LastToken]]:
        """The graphs that it may be built from."""
        for lengths in self.lengths:
            ways = ways_to(self.kind, legacy=True)[: None if lengths == "dynamic" else 1]
            for last in dict.fromkeys(way.last for way in ways):
                yield self.graph, lengths, last


DYNAMIC_OR_FIXED: tuple[Lengths, ...] = ("dynamic", "fixed")
PLANS = (
    Wanted("rank", "fp16", "large", DYNAMIC_OR_FIXED),
    Wanted("rank", "fp16", "large", ("b8",)),
    Wanted("retrieve", "fp32", "small"),
    Wanted("retrieve", "fp16", "small"),
    Wanted("rank", "fp16", "small", DYNAMIC_OR_FIXED),
    Wanted("rank", "fp16", "large", ("b8",), cublas=True),
    Wanted("rank", "fp16", "large", ("b1",)),
    Wanted("rank", "fp32", "small"),
    Wanted("rank", "fp16", "small", ("b8",)),
    Wanted("rank", "fp16", "small", ("b1",)),
    Wanted("retrieve", "fp16", "large"),
    Wanted("retrieve", "fp32", "large"),
    Wanted("rank", "fp16", "large", cublas=True),
    Wanted("rank", "fp32", "large"),
    Wanted("rank", "int8", "small"),
    Wanted("rank", "int8", "large"),
    Wanted("rank", "fp16", "small-bias", DYNAMIC_OR_FIXED),
    Wanted("retrieve", "int8", "small"),
    Wanted("retrieve", "int8", "large"),
)
TINY_PLANS = (
    *(Wanted(kind, precision, "tiny") for kind in ("rank", "retrieve") for precision in ("fp32", "fp16", "int8")),
    Wanted("rank", "fp16", "tiny", ("b1",)),
    Wanted("rank", "fp16", "tiny", ("fixed",)),
)


def folder_of(work: Path, preset: str) -> Path:
    """Where the checkpoint of a preset lies."""
    return work / "checkpoints" / preset


def graph_of(work: Path, graph: str, lengths: str, last: LastToken = "products") -> Path:
    """Where a graph lies; plans may share it."""
    return work / graph / (lengths if last == "products" else f"{lengths}-{last}") / "model.onnx"
