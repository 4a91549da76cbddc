"""Ways to compute attention under MTGR's mask side by side: checked on ragged shapes, then timed.

python -m perf.gpu_variants [--small] [--d64] [--d128] [--d256] [--dense] [--seed SEED]

Every way that is right is timed alone; then the first few of each kind are timed in turn, and the ratios that are aimed
at are printed: FP8 over BF16, paged over dense attention.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mtgr.kernels.compilation import parallel_compilation
from mtgr.kernels.configs import LaunchConfig
from mtgr.kernels.dense_attention import dense_attention
from mtgr.kernels.dense_configs import DenseConfig
from mtgr.kernels.dense_fp8 import QuantisedHeads
from mtgr.kernels.launch import Launch
from mtgr.kernels.paged_items import list_items
from perf import gpu_attention, gpu_pages
from perf.gpu_attention import CANDIDATES, HEADS, REALTIME, Problem
from perf.gpu_measure import (
    DEVICE,
    Ceilings,
    Figure,
    failures,
    interleaved,
    largest_difference,
    print_section,
    section_options,
    time_of,
)
from perf.gpu_pages import Pages, Step

# Batch and length, longest contexts last.
LENGTHS = ((8, 2048), (4, 8192))
SIZES = (128, 256, 64)

# What is aimed at.
FP8_OVER_BF16, PAGED_OVER_DENSE = 1.4, 0.9

# Of each kind, ways that are timed in turn.
_FINALISTS = 3

Kind = Literal["bf16", "fp8", "paged"]


@dataclass
class Way:
    """One configuration of one kind.

    Attributes:
        kind: What is computed.
        config: How.
        name: For the table.
        figure: Whether it is right.
    """

    kind: Kind
    config: Any
    name: str
    figure: Figure = field(default_factory=lambda: Figure("variants", "", ""))


class Size:
    """Everything that is run at one head size.

    Args:
        head_size: D.
        is_small: Whether to take tiny shapes.
        seed: Of the numbers.
        has_pages: Whether to run paged attention too.
    """

    def __init__(self, head_size: int, is_small: bool, seed: int, has_pages: bool = True) -> None:
        self.head_size = head_size
        longest = 60 if is_small else 1500
        parts = ((1.0, 0.9, 0.2), (0.0, 0.01, 0.0), (0.3, 0.5, 0.05), (0.2, 0.09, 0.17), (0.0, 0.26, 0.1))
        ragged = [(int(longest * s), int(longest * n), int(longest * c)) for s, n, c in parts]
        self.ragged = Problem(ragged, 2, head_size, torch.bfloat16, seed)
        self.step = Step(head_size, gpu_pages.BLOCK_SIZE, torch.bfloat16, longest // 4, seed)
        self.problems: dict[str, tuple[Problem, Pages]] = {}
        for batch, length in [(2, 48)] if is_small else LENGTHS:
            realtime, candidates = (8, 4) if is_small else (REALTIME, CANDIDATES)
            sequences = [(length - realtime, length, candidates)] * batch
            problem = Problem(sequences, 2 if is_small else HEADS, head_size, torch.bfloat16, seed)
            self.problems[f"B {batch} H {problem.heads} D {head_size} N {length}"] = problem, Pages(problem, batch)
        self.ways: list[Way] = []
        for precision in ("bf16", "fp8"):
            if precision == "fp8" and (head_size == 64 or 0 < self.ragged.key("bf16").capability < 89):
                continue
            for config in self.ragged.configs(precision):
                if _is_worth_it(config):
                    name = f"{precision} {gpu_attention.describe(config)}"
                    self.ways.append(Way("fp8" if precision == "fp8" else "bf16", config, name))
        for tile in gpu_pages.tiles(self.step.key) if has_pages else []:
            if _is_worth_it(tile):
                self.ways.append(Way("paged", tile, f"paged {gpu_pages.describe(tile)}"))
        self._dense: dict[tuple[int, Kind], Callable[[DenseConfig], Launch]] = {}

    def compile(self) -> None:
        """Compile every way, for ragged shapes and for those that are timed."""
        for way in self.ways:
            if way.kind == "paged":
                for launch in self.step.launches(way.config, torch.empty_like(self.step.q)):
                    launch.compile()
            for problem, pages in self.problems.values():
                self._launch(way, problem, pages).compile()

    def check(self) -> Iterator[Figure]:
        """By the rule: twice PyTorch's error in the same precision."""
        exact, paged = self.ragged.exact(), self.step.exact()
        quantised = self.ragged.quantised()
        allowed = {
            "bf16": 2 * largest_difference(self.ragged.plain(), exact),
            "fp8": 2 * largest_difference(self.ragged.plain(quantised), exact),
            "paged": 2 * torch.finfo(torch.bfloat16).eps * float(paged.abs().max()),
        }
        for way in self.ways:
            figure = Figure("variants", way.name, f"D {self.head_size}, ragged", allowed=allowed[way.kind])
            try:
                if way.kind == "paged":
                    figure.error = largest_difference(self.step.run(way.config, torch.bfloat16), paged)
                else:
                    found = self._attend(way, quantised if way.kind == "fp8" else None)
                    figure.error = largest_difference(found, exact)
            except failures() as error:
                figure.note = f"does not run: {str(error).splitlines()[0][:200]}"
            way.figure = figure
            yield figure

    def _attend(self, way: Way, quantised: QuantisedHeads | None) -> Tensor:
        """The ragged problem's answer, in BF16 as it is timed: another output would need another kernel."""
        problem = self.ragged
        out = torch.full(problem.q.shape, float("nan"), dtype=problem.dtype, device=DEVICE)
        settings = {"scale": problem.scale, "norm_length": problem.norm_length}
        tensors = (problem.q, problem.k, problem.v, out, problem.segments)
        return dense_attention(*tensors, **settings, quantised=quantised, config=way.config)

    def timed(self, ceilings: Ceilings) -> Iterator[Figure]:
        """Each way alone, the fastest of each kind first; then the first few in turn."""
        for shape, (problem, pages) in self.problems.items():
            ranked: dict[Kind, list[tuple[float, str]]] = {}
            launches: dict[str, Launch] = {}
            figures = []
            for way in self.ways:
                if not way.figure.holds:
                    continue
                launch = self._launch(way, problem, pages)
                milliseconds = time_of(launch)
                figure = self._figure(way.name, shape, problem, way.kind, ceilings)
                figure.samples_ms = [milliseconds]
                figures.append((way.kind, milliseconds, figure))
                if milliseconds < float("inf"):
                    launches[way.name] = launch
                    ranked.setdefault(way.kind, []).append((milliseconds, way.name))
            yield from (figure for _, _, figure in sorted(figures, key=lambda one: one[:2]))
            # What is timed alone, later and later on a hotter card, is not quite comparable: the first few run again.
            first = {kind: [name for _, name in sorted(times)[:_FINALISTS]] for kind, times in ranked.items()}
            samples = interleaved({name: launches[name].run for finalists in first.values() for name in finalists})
            found: dict[Kind, Figure] = {}
            for kind, finalists in first.items():
                best = min(finalists, key=lambda name: statistics.median(samples[name]))
                found[kind] = self._figure(f"BEST {kind}", shape, problem, kind, ceilings)
                found[kind].samples_ms, found[kind].note = samples[best], best
            yield from self._ratios(found)
            if "paged" in found:
                yield self._list(shape, pages)

    def _ratios(self, found: dict[Kind, Figure]) -> Iterator[Figure]:
        """The best of each kind with what they are measured against."""
        aims: dict[Kind, float] = {"fp8": FP8_OVER_BF16, "paged": PAGED_OVER_DENSE}
        for kind, figure in found.items():
            if kind in aims and "bf16" in found:
                aim = aims[kind]
                ratio = (found["bf16"].p50 or 0.0) / (figure.p50 or float("inf"))
                figure.versus[f"bf16 (aim {aim}: {'met' if ratio >= aim else 'missed'})"] = ratio
            yield figure

    def _list(self, shape: str, pages: Pages) -> Figure:
        """What the list of tiles costs a step once."""
        figure = Figure("variants", "list of tiles, once a step", shape)
        arguments = (pages.starts, pages.visible, pages.is_candidate, 128)
        figure.samples_ms = interleaved({"": lambda: list_items(*arguments)})[""]
        return figure

    def _figure(self, name: str, shape: str, problem: Problem, kind: Kind, ceilings: Ceilings) -> Figure:
        precision = "fp8" if kind == "fp8" else "bf16"
        floor = ceilings.floor_ms(problem.flops, problem.moved(precision), precision)
        peak = ceilings.flops[precision]
        return Figure("variants", name, shape, floor_ms=floor, flops=problem.flops, peak=peak)

    def _launch(self, way: Way, problem: Problem, pages: Pages) -> Launch:
        if way.kind == "paged":
            return pages.launch(way.config)
        key = (id(problem), way.kind)
        if key not in self._dense:
            self._dense[key] = problem.launches(way.kind)
        return self._dense[key](way.config)


def variants(
    ceilings: Ceilings, is_small: bool, seed: int, sizes: Sequence[int] = SIZES, has_pages: bool = True
) -> Iterator[Figure]:
    """All head sizes in turn."""
    for head_size in sizes:
        size = Size(head_size, is_small, seed, has_pages)
        if DEVICE.type == "cpu":
            yield Figure("variants", f"{len(size.ways)} ways that need a GPU", f"D {head_size}")
            continue
        started = time.monotonic()
        with parallel_compilation():
            size.compile()
        spent = f"compiled in {time.monotonic() - started:.0f} s"
        yield Figure("variants", f"{len(size.ways)} ways", f"D {head_size}", note=spent)
        yield from size.check()
        yield from size.timed(ceilings)


def _is_worth_it(config: DenseConfig | LaunchConfig) -> bool:
    """All but what lost by far on an H200: plain loads, and large tiles in warps that both copy and multiply."""
    return config.variant == "specialised" or (config.variant == "descriptors" and config.block_m == 64)


def main(arguments: list[str] | None = None) -> int:
    """Print the figures."""
    flags = {f"d{size}": f"heads of {size}; all sizes by default" for size in sorted(SIZES)}
    flags["dense"] = "no paged attention"
    options = section_options("perf.gpu_variants", __doc__, arguments, **flags)
    sizes = [size for size in SIZES if getattr(options, f"d{size}")]
    print_section(functools.partial(variants, sizes=sizes or SIZES, has_pages=not options.dense), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
