"""The ways to a plan, in the order in which they are tried: TensorRT 8.6 does not build every graph that 10 and 11 do.

A product of attention with a single query is what 8.6 stops at, for batches of two and more (``Could not find any
implementation for node {ForeignNode[...]}``, beside ``mha_fusion.cpp: DCHECK(fc1_ && fc2_ && softmax_)``): presumably
it takes it for an attention with softmax. Ranking has none; retrieval has one, unless it is written otherwise. The
other difference is that queries and keys are the same tokens, which blank candidates change.

On an H200 both ways to retrieve were built and agreed, with sums the quicker one.

Its fp16 is a permission. Either layers that the typed graph keeps in fp32 are pinned, or the graph in fp32 is built
with the permission for all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from export.last_token import LastToken
from export.tensorrt_options import BuildOptions, Precision
from mtgr.errors import ConfigurationError
from mtgr.manifest import Manifest

Kind = Literal["rank", "retrieve"]


@dataclass(frozen=True)
class Way:
    """One way to build a model's plan.

    Attributes:
        name: What the manifest and the table call it.
        last: How the graph computes its last token (``export.last_token``).
        split: Whether batch 1 has an optimization profile of its own.
        largest: Batch that the plan takes at most; None for what is asked for.
        free: Whether any layer may be in 16 bits, whatever the graph says.
    """

    name: str
    last: LastToken = "products"
    split: bool = True
    largest: int | None = None
    free: bool = False

    def source(self, precision: Precision) -> Precision:
        """Precision of the graph that a plan is built of."""
        return "fp32" if self.free and precision == "fp16" else precision

    def options(self, wanted: BuildOptions) -> BuildOptions:
        """Options of a build in this way."""
        largest = wanted.max_batch if self.largest is None else min(self.largest, wanted.max_batch)
        return replace(wanted, split=self.split, max_batch=largest, free=self.free)


PLAIN = Way("two profiles")
FREE = Way("16 bits anywhere, two profiles", free=True)
ONE = Way("one profile", split=False)
FREE_ONE = Way("16 bits anywhere, one profile", split=False, free=True)
SUMS = Way("last token by sums, two profiles", "sums")
ROWS = Way("all tokens, two profiles", "rows")
COMPANY_ALONE = Way("beside blank candidates, batch 1 alone", "company", largest=1)
COMPANY = Way("beside blank candidates, two profiles", "company")
COMPANY_ONE = Way("beside blank candidates, one profile", "company", split=False)
FREE_COMPANY = Way("16 bits anywhere, beside blank candidates, two profiles", "company", free=True)
FREE_COMPANY_ONE = Way("16 bits anywhere, beside blank candidates, one profile", "company", split=False, free=True)
# The only one that was built with products: a lone request.
ALONE = Way("batch 1 alone", largest=1)

_8_6: dict[Kind, tuple[Way, ...]] = {
    "rank": (PLAIN, FREE, ONE, FREE_ONE),
    "retrieve": (SUMS, COMPANY, FREE_COMPANY, ROWS, COMPANY_ONE, ALONE),
}
WAYS = {way.name: way for way in (*_8_6["rank"], *_8_6["retrieve"], FREE_COMPANY_ONE, COMPANY_ALONE)}


def ways_to(kind: Kind, legacy: bool, precision: Precision = "fp32") -> tuple[Way, ...]:
    """Ways to a plan that ranks or retrieves, with TensorRT 8.6 or with a later one."""
    if not legacy:
        return (PLAIN,)
    ways = [way for way in _8_6[kind] if precision != "fp32" or not way.free]
    # On an H200 an fp16 plan of pinned layers took 4 to 6 times as long as a free one, and both agreed.
    return tuple(sorted(ways, key=lambda way: not way.free)) if precision == "fp16" else tuple(ways)


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
