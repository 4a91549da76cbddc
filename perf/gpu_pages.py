"""Paged attention on the GPU at hand: right at ragged shapes, and set beside the dense kernel on the same work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.kernels import configs
from mtgr.kernels.compilation import parallel_compilation
from mtgr.kernels.dispatch import capability_of
from mtgr.kernels.launch import Launch
from mtgr.kernels.paged_attention import StepItems, paged_attention, paged_attention_reference
from perf.gpu_measure import DEVICE, Ceilings, Figure, failures, largest_difference, time_of

if TYPE_CHECKING:
    from perf.gpu_attention import Problem

BLOCK_SIZE = 64


class Pages:
    """The keys and values of a problem's contexts in pages of a cache, in random order.

    Args:
        problem: Sequences of one length.
        batch: Their number.
    """

    def __init__(self, problem: Problem, batch: int) -> None:
        self.problem, size = problem, BLOCK_SIZE
        static, context, candidate = problem.sequences[0]
        blocks, per_sequence = -(-context // size), context + candidate
        heads, width = problem.heads, problem.head_size
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * per_sequence
        tokens = torch.arange(per_sequence, device=DEVICE)
        self.visible = torch.clamp(tokens + 1, min=static, max=context).to(torch.int32).repeat(batch)
        self.is_candidate = (tokens >= context).repeat(batch)
        self.table = torch.randperm(batch * blocks, device=DEVICE).to(torch.int32).view(batch, blocks)
        self.items = StepItems()
        self.out = torch.full(problem.q.shape, float("nan"), dtype=problem.dtype, device=DEVICE)
        merged = torch.cat([problem.k, problem.v], dim=-1).unflatten(0, (batch, per_sequence))[:, :context]
        padded = F.pad(merged, (0, 0, 0, 0, 0, blocks * size - context))
        cache = torch.empty(batch * blocks, heads, size, 2 * width, dtype=problem.dtype, device=DEVICE)
        cache[self.table.flatten().long()] = padded.reshape(batch * blocks, size, heads, -1).transpose(1, 2)
        self.cache = cache

    def run(self) -> Tensor:
        """One layer of a step that computes all of it; the list of tiles is made once for all layers."""
        settings = {"scale": self.problem.scale, "norm_length": self.problem.norm_length}
        return paged_attention(*self._tensors(), self.out, **settings, items=self.items)

    def launch(self, config: configs.LaunchConfig) -> Launch:
        """What attends, with one split; the list that it may read is there, as of a step's second layer."""
        from mtgr.kernels.triton_attention import attention_launches

        settings = {"scale": self.problem.scale, "norm_length": self.problem.norm_length, "bias": None}
        items = self.items.of(*self._tensors()[5:], config.block_m) if config.listed else None
        return attention_launches(*self._tensors(), self.out, **settings, config=config, items=items)[0]

    @property
    def key(self) -> configs.LaunchKey:
        """What configurations are measured for."""
        problem, tokens = self.problem, configs.token_class(self.problem.tokens)
        return configs.LaunchKey(problem.heads, problem.head_size, problem.dtype, BLOCK_SIZE, False, tokens)

    def tune(self) -> tuple[dict[str, float], str]:
        """Take the fastest tiles for this step: milliseconds of each, and the fastest's name; nothing on the CPU."""
        if DEVICE.type == "cpu":
            return {}, ""
        problem, key = self.problem, self.key
        launches = {config: self.launch(config) for config in tiles(key)}
        with parallel_compilation():
            for launch in launches.values():
                launch.compile()
        times = {config: time_of(launch) for config, launch in launches.items()}
        best = min(times, key=times.__getitem__)
        configs.remember(key, best)
        # The same tiles for the one head on which the error is measured.
        small = min(problem.tokens // len(problem.sequences), configs.TOKEN_CLASSES[-1])
        configs.remember(replace(key, num_heads=1, token_class=configs.token_class(small)), best)
        return {describe(config): time for config, time in times.items()}, describe(best)

    def _tensors(self) -> tuple[Tensor, ...]:
        problem = self.problem
        return (problem.q, problem.k, problem.v, self.cache, self.table, self.starts, self.visible, self.is_candidate)


class Step:
    """A step of ragged requests, some of them empty, with NaN in every slot of the cache that holds no key."""

    def __init__(self, head_size: int, block_size: int, dtype: torch.dtype, longest: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        heads, count = 2, 7
        cached, new, candidates = (generator.integers(0, longest, count) for _ in range(3))
        new[2], candidates[2], candidates[4] = 0, 0, 0
        contexts = cached + new
        self.block_size, self.head_size, self.dtype, self.heads = block_size, head_size, dtype, heads
        blocks = int(-(-contexts.max() // block_size)) + 1
        used = -(-contexts // block_size)
        table = generator.permutation(count * blocks).reshape(count, blocks).astype(np.int32)
        rows = [(n, k, c) for n, k, c in zip(new.tolist(), candidates.tolist(), contexts.tolist(), strict=True)]
        starts = np.cumsum([0] + [n + k for n, k, _ in rows]).astype(np.int32)
        static = (contexts * 0.7).astype(int)
        visible, is_candidate = [], []
        for (n, k, context), full in zip(rows, static.tolist(), strict=True):
            visible += [max(slot + 1, full) for slot in range(context - n, context)] + [context] * k
            is_candidate += [False] * n + [True] * k
        tokens = int(starts[-1]) + 3  # rows of padding behind the last request
        torch.manual_seed(seed)
        merged = torch.randn(tokens, 4 * heads * head_size, device=DEVICE).to(dtype)
        _, self.v, self.q, self.k = (p.unflatten(-1, (heads, head_size)) for p in merged.chunk(4, dim=-1))
        shape = (count * blocks, heads, block_size, 2 * head_size)
        self.cache = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
        for row, (pages, context) in enumerate(zip(used.tolist(), contexts.tolist(), strict=True)):
            for page in range(pages):
                filled = min(block_size, context - page * block_size)
                content = torch.randn(heads, filled, 2 * head_size, device=DEVICE)
                self.cache[int(table[row, page]), :, :filled] = content.to(dtype)
        pad = [0] * 3
        self.table, self.starts, self.visible = (
            torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (table, starts, [*visible, *pad])
        )
        self.is_candidate = torch.tensor([*is_candidate, *pad], dtype=torch.bool, device=DEVICE)
        self.key = configs.LaunchKey(heads, head_size, dtype, block_size, False, 4096)
        self.items = StepItems()
        self.settings = {"scale": head_size**-0.5, "norm_length": max(1, int(contexts.max()))}

    def launches(self, config: configs.LaunchConfig, out: Tensor) -> list[Launch]:
        """The kernels' launches."""
        from mtgr.kernels.triton_attention import attention_launches

        items = self.items.of(*self._tensors()[5:], config.block_m) if config.listed else None
        return attention_launches(*self._tensors(), out, **self.settings, bias=None, config=config, items=items)

    def run(self, config: configs.LaunchConfig, dtype: torch.dtype = torch.float32) -> Tensor:
        """The kernel's answer, in memory of a precision that was full of NaN, without the rows of no request."""
        out = torch.full(self.q.shape, float("nan"), dtype=dtype, device=DEVICE)
        for launch in self.launches(config, out):
            launch.run()
        behind = int(self.starts[-1])
        if not bool(out[behind:].isnan().all()):
            raise RuntimeError("rows behind the last request were written")
        return out[:behind]

    def exact(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The reference, in FP32."""
        tensors = [x.to(dtype).cpu() if x.is_floating_point() else x.cpu() for x in self._tensors()]
        out = torch.zeros(self.q.shape)
        paged_attention_reference(*tensors, out, **self.settings)
        return out[: int(self.starts[-1])].to(DEVICE)

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v, self.cache, self.table, self.starts, self.visible, self.is_candidate)


def check_pages(ceilings: Ceilings, is_small: bool, seed: int) -> Iterator[Figure]:
    """Ragged steps out of pages of several sizes, every candidate configuration, keys split up and not."""
    longest = 60 if is_small else 400
    if DEVICE.type == "cpu":
        return
    cases = [
        Step(head_size, block_size, dtype, longest, seed)
        for head_size in (64, 128, 256)
        for block_size, dtype in ((16, torch.bfloat16), (64, torch.bfloat16), (128, torch.float16))
    ]
    chosen = {
        case: [*tiles(case.key)[:1], *(one for one in tiles(case.key) if _is_checked(one, case))] for case in cases
    }
    with parallel_compilation():
        for case in cases:
            for config in chosen[case]:
                for launch in case.launches(config, torch.empty(case.q.shape, device=DEVICE)):
                    launch.compile()
    for case in cases:
        exact = case.exact()
        # Weights are rounded to the precision of values: half a unit in the last place of each.
        allowed = float(exact.abs().max()) * torch.finfo(case.dtype).eps * 2
        for config in chosen[case]:
            name = f"paged {str(case.dtype).removeprefix('torch.')} {describe(config)}"
            figure = Figure("check", name, f"D {case.head_size}, pages of {case.block_size}", allowed=allowed)
            try:
                figure.error = largest_difference(case.run(config), exact)
            except failures() as error:
                figure.note = f"does not run: {str(error).splitlines()[0][:200]}"
            yield figure


def tiles(key: configs.LaunchKey) -> list[configs.LaunchConfig]:
    """Configurations worth measuring here, with one split."""
    if capability_of(DEVICE) != 90:
        return configs.candidate_tiles(key)
    return [*configs.candidate_tiles(key), *configs.specialised_tiles(key)]


def _is_checked(config: configs.LaunchConfig, case: Step) -> bool:
    """Of one size of pages all ways of the specialised kernel, of the others one that does almost everything."""
    if config.variant == "pointers" or case.block_size == BLOCK_SIZE:
        return config.variant != "pointers"
    return config.listed and config.overlaps


def describe(config: configs.LaunchConfig) -> str:
    """A configuration in short."""
    ways = " in turn" * config.in_turn + " overlaps" * config.overlaps + " listed" * config.listed
    return f"{config.variant} {config.block_m}x{config.block_n}/{config.num_warps}/{config.num_stages}{ways}"
