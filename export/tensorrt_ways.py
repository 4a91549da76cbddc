"""The ways to a plan, in the order in which they are tried: TensorRT 8.6 does not build every graph that 10 and 11 do.

A product of attention with a single query is what 8.6 stops at, for batches of two and more (``Could not find any
implementation for node {ForeignNode[...]}``, beside ``mha_fusion.cpp: DCHECK(fc1_ && fc2_ && softmax_)``): presumably
it takes it for an attention with softmax. Ranking has none; retrieval has one, unless it is written otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from export.last_token import LastToken
from export.tensorrt_options import BuildOptions
from mtgr.errors import ConfigurationError
from mtgr.manifest import Manifest


@dataclass(frozen=True)
class Way:
    """One way to build a model's plan.

    Attributes:
        name: What the manifest and the table call it.
        last: How the graph computes its last token (``export.last_token``).
        split: Whether batch 1 has an optimization profile of its own.
        largest: Batch that the plan takes at most; None for what is asked for.
    """

    name: str
    last: LastToken = "products"
    split: bool = True
    largest: int | None = None

    def options(self, wanted: BuildOptions) -> BuildOptions:
        """Options of a build in this way."""
        largest = wanted.max_batch if self.largest is None else min(self.largest, wanted.max_batch)
        return replace(wanted, split=self.split, max_batch=largest)


PLAIN = Way("two profiles")
_RANK_8_6 = (PLAIN, Way("one profile", split=False))
_RETRIEVE_8_6 = (
    Way("last token by sums, two profiles", "sums"),
    Way("all tokens, two profiles", "rows"),
    Way("all tokens, one profile", "rows", split=False),
    Way("last token by sums, one profile", "sums", split=False),
    # The only one that was built with products: a lone request.
    Way("batch 1 alone", largest=1),
)


def ways_to(kind: Literal["rank", "retrieve"], legacy: bool) -> tuple[Way, ...]:
    """Ways to a plan that ranks or retrieves, with TensorRT 8.6 or with a later one."""
    if not legacy:
        return (PLAIN,)
    return _RANK_8_6 if kind == "rank" else _RETRIEVE_8_6


def build_first(ways: Sequence[Way], build: Callable[[Way], Manifest]) -> Manifest:
    """Build in the first way that leads to a plan.

    Args:
        ways: At least one.
        build: Builds in one way.

    Returns:
        The manifest, whose details name the way and why those before it were left.

    Raises:
        ConfigurationError: If none does: the last reason.
    """
    left: dict[str, str] = {}
    for way in ways:
        try:
            manifest = build(way)
        except ConfigurationError as error:
            left[way.name] = str(error)
            continue
        return replace(manifest, details={**manifest.details, "way": way.name, "left": left})
    tried = f" (tried: {'; '.join(left)})" if len(left) > 1 else ""
    raise ConfigurationError(f"{list(left.values())[-1].removesuffix('.')}{tried}.")
