"""Optimization profiles of a TensorRT plan, from the table of buckets that the router pads to.

Two profiles: one for a lone request, which is tuned at batch 1, and one for the batches that the router merges, tuned
at a middle size. A plan that had to be good at both with one profile would be tuned for neither; there is one where
TensorRT builds no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtgr.errors import ConfigurationError
from mtgr.routing.buckets import CANDIDATE_BUCKETS, CONTEXT_BUCKETS, bucket

Shape = tuple[int, ...]
Range = tuple[int, int, int]  # smallest, tuned for, largest

MAX_BATCH = 32
MIN_LONGEST = 1024  # context tokens that every plan takes: the config's warm-up and graph specs go up to here
_SINGLE: Range = (1, 1, 1)
_TUNED_BATCH = 8
_TUNED = {"context": 512, "candidates": 256}
_BUCKETS = {"context": CONTEXT_BUCKETS, "candidates": CANDIDATE_BUCKETS}


@dataclass(frozen=True)
class Profile:
    """The shapes that one optimization profile serves.

    Attributes:
        shapes: Input name to its smallest shape, the one it is tuned for, and its largest, each [B, length, W].
    """

    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


def bucket_profiles(
    inputs: Mapping[str, Sequence[int]], max_context: int, max_batch: int = MAX_BATCH, split: bool = True
) -> tuple[Profile, ...]:
    """Profiles of a graph: batch 1, and batch 2 to ``max_batch``; or one for all of them.

    Axes that are fixed in the graph stay what they are: a graph of one bucket has profiles over its batch only, one
    of a fixed batch too needs no profile at all.

    Args:
        inputs: ``context`` [B, n, W] and, for ranking, ``candidates`` [B, k, W]; -1 for axes that vary.
        max_context: Tokens of the longest context, which the schema knows.
        max_batch: The config's ``max_batch_size``.
        split: Whether batch 1 has a profile of its own.

    Raises:
        ConfigurationError: If the graph has inputs that no bucket is known for, or a batch cannot be that large.
    """
    for name, dims in inputs.items():
        if name not in _BUCKETS or len(dims) != 3 or dims[2] < 1:
            raise ConfigurationError(
                f"the graph's input {name} {list(dims)} is not rows of tokens; export it with `python -m export`."
            )
    if max_batch < 1:
        raise ConfigurationError(f"max_batch is {max_batch}; it must be at least 1.")
    if all(size != -1 for dims in inputs.values() for size in dims):
        return ()
    batches = [_SINGLE]
    if max_batch > 1 and any(dims[0] == -1 for dims in inputs.values()):
        tuned = min(_TUNED_BATCH, max_batch)
        batches = [_SINGLE, (2, tuned, max_batch)] if split else [(1, tuned, max_batch)]
    return tuple(
        Profile({name: _shapes(dims, batch, _lengths(name, max_context)) for name, dims in inputs.items()})
        for batch in batches
    )


def _lengths(name: str, max_context: int) -> Range:
    buckets = _BUCKETS[name]
    longest = max(MIN_LONGEST, bucket(max_context, buckets)) if name == "context" else buckets[-1]
    return buckets[0], min(_TUNED[name], longest), longest


def _shapes(dims: Sequence[int], batch: Range, length: Range) -> tuple[Shape, Shape, Shape]:
    def at(index: int) -> Shape:
        free = (batch[index], length[index], dims[2])
        return tuple(given if size == -1 else size for size, given in zip(dims, free, strict=True))

    return at(0), at(1), at(2)
