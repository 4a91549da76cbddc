"""Memory of attention on the GPU at hand: interval masks against masks that are stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.kernels.dense_attention import dense_attention
from perf.gpu_attention import HEADS, Problem
from perf.gpu_measure import DEVICE, Ceilings, Figure, peak_bytes


def memory(ceilings: Ceilings, is_small: bool, seed: int) -> Iterator[Figure]:
    """Peak bytes of one attention: intervals, a mask that is made but not needed, and all pairs materialised."""
    for length in (48,) if is_small else (2048, 8192):
        yield from _figures(Problem([(0, length, 0)], 2 if is_small else HEADS, 64, torch.bfloat16, seed), length)


def _figures(problem: Problem, length: int) -> Iterator[Figure]:
    out = torch.empty_like(problem.q)
    q, k, v = (part.transpose(0, 1) for part in (problem.q * problem.scale, problem.k, problem.v))

    def intervals() -> Tensor:
        settings = {"scale": problem.scale, "norm_length": problem.norm_length}
        return dense_attention(problem.q, problem.k, problem.v, out, problem.segments, **settings)

    def mask() -> Tensor:
        return torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril_()

    def materialised() -> Tensor:
        return (F.silu(q @ k.transpose(1, 2)) * mask().to(q.dtype)) @ v

    def both() -> tuple[Tensor, Tensor]:
        return mask(), intervals()

    base = 4 * problem.q.numel() * problem.q.itemsize  # q, k, v and the output, which all of them need
    runs = {"intervals": intervals, "intervals beside a mask": both, "all pairs materialised": materialised}
    least = None
    for name, run in runs.items():
        figure = Figure("memory", name, f"B 1 H {problem.heads} D 64 N {length}")
        found = peak_bytes(run)
        figure.note = "needs a GPU" if found is None else "with q, k, v and the output"
        if found is not None:
            figure.bytes = found + base
            least = least or figure.bytes
            figure.versus["intervals by bytes"] = figure.bytes / least
        yield figure
