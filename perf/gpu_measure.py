"""Time, floor and error of GPU work: what every figure of ``perf.gpu`` consists of."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtgr.kernels.dispatch import capability_of
from mtgr.kernels.launch import Launch
from mtgr.kernels.timing import graph_milliseconds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Operations of one timed piece are captured so many times, and the piece replayed so many times.
_CAPTURED, _REPLAYS = 5, 11


@dataclass(frozen=True)
class Ceilings:
    """What the card at hand reaches, measured: no kernel can do better.

    Attributes:
        flops: Operations a second of a large matrix product, by precision: fp32 (without TF32), bf16, fp8.
        bandwidth: Bytes a second of a large copy, those read and those written.
    """

    flops: dict[str, float]
    bandwidth: float

    def floor_ms(self, flops: float, moved: float, precision: str) -> float:
        """Milliseconds that operations and bytes take at best, the longer of the two."""
        return 1e3 * max(flops / self.flops[precision], moved / self.bandwidth)


@dataclass
class Figure:
    """One measurement.

    Attributes:
        section: Of ``perf.gpu``.
        name: What ran.
        shape: On what.
        samples_ms: Raw times; empty where only an error or memory was measured.
        floor_ms: Least time, by ``Ceilings``; None where there is none.
        flops: Operations that had to be done.
        peak: Operations a second of the ceiling.
        error: Largest absolute difference from the FP32 reference; None where there is none.
        allowed: What DESIGN's rule allows.
        bytes: Peak memory, where that was measured.
        versus: Ratio to another figure of the same section by its name: its time over this one's.
        note: What a reader must know.
        tried: Milliseconds of each configuration.
        chosen: What was taken, by the key that it is remembered by.
    """

    section: str
    name: str
    shape: str
    samples_ms: list[float] = dataclasses.field(default_factory=list)
    floor_ms: float | None = None
    flops: float | None = None
    peak: float | None = None
    error: float | None = None
    allowed: float | None = None
    bytes: int | None = None
    versus: dict[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""
    tried: dict[str, float] = dataclasses.field(default_factory=dict)
    chosen: Any = None

    @property
    def p50(self) -> float | None:
        """Median time in milliseconds."""
        return statistics.median(self.samples_ms) if self.samples_ms else None

    @property
    def holds(self) -> bool | None:
        """Whether the error is within the rule; None without an error."""
        return None if self.error is None or self.allowed is None else self.error <= self.allowed

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, with what follows from them."""
        p50, values = self.p50, dataclasses.asdict(self)
        values["chosen"] = None if self.chosen is None else [repr(part) for part in self.chosen]
        values["p50_ms"] = p50
        values["ratio_to_floor"] = p50 / self.floor_ms if p50 and self.floor_ms else None
        values["tflops"] = self.flops / p50 / 1e9 if p50 and self.flops else None
        values["share_of_peak"] = 1e12 * values["tflops"] / self.peak if values["tflops"] and self.peak else None
        values["holds"] = self.holds
        return values

    def line(self) -> str:
        """One line of a table."""
        values = self.to_dict()
        parts = [f"   {self.name:<34} {self.shape:<32}"]
        if values["p50_ms"] is not None:
            parts.append(f"{values['p50_ms']:9.3f} ms")
        if values["ratio_to_floor"] is not None:
            parts.append(f"floor {self.floor_ms:8.3f}  x{values['ratio_to_floor']:<6.2f}")
        if values["tflops"] is not None:
            parts.append(f"{values['tflops']:7.1f} TFLOP/s")
        if values["share_of_peak"] is not None:
            parts.append(f"{values['share_of_peak']:6.1%}")
        if self.bytes is not None:
            parts.append(f"{self.bytes / 2**20:9.1f} MiB")
        if self.error is not None:
            verdict = "" if self.holds is None else (" ok" if self.holds else " TOO LARGE")
            allowed = "" if self.allowed is None else f" of {self.allowed:.1e}"
            parts.append(f"error {self.error:.1e}{allowed}{verdict}")
        parts += [f"{ratio:.2f}x {name}" for name, ratio in self.versus.items()]
        return "  ".join(parts) + (f"  ({self.note})" if self.note else "")


# Given the ceilings, whether shapes are to be tiny, and the seed.
Section = Callable[[Ceilings, bool, int], Iterator[Figure]]


def section_options(
    module: str, description: str | None, arguments: list[str] | None, **flags: str
) -> argparse.Namespace:
    """Options of a command that prints one section: ``small``, ``seed``, and ``flags``, each with what it means.

    From then on products of FP32 are not made in TF32.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--small", action="store_true", help="tiny shapes, as a test runs them on the CPU")
    for name, meaning in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    parser.add_argument("--seed", type=int, default=0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return parser.parse_args(arguments)


def print_section(section: Section, options: argparse.Namespace) -> None:
    """Print each figure as soon as it is there."""
    for figure in section(measure_ceilings(options.small), options.small, options.seed):
        print(figure.line(), flush=True)


def milliseconds(run: Callable[[], object], *, captured: bool = True, replays: int = _REPLAYS) -> list[float]:
    """Times of ``run``, one sample a replay.

    On a GPU by its own clock and, if ``captured``, out of a CUDA graph, so that the host's launches do not count. On
    the CPU one sample by the wall's clock: enough to see that it runs.
    """
    return next(iter(interleaved({"": run}, captured=captured, replays=replays).values()))


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, captured: bool = True, replays: int = _REPLAYS
) -> dict[str, list[float]]:
    """``milliseconds`` of several, in turn: what changes on the machine in the meantime changes for all."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    if DEVICE.type == "cpu":
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            samples[name].append(1e3 * (time.perf_counter() - start))
        return samples
    ready = {name: _replayed(run, captured) for name, run in runs.items()}
    for _ in range(replays):
        for name, (replay, count) in ready.items():
            start_event, stop_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start_event.record()
            replay()
            stop_event.record()
            torch.cuda.synchronize()
            samples[name].append(start_event.elapsed_time(stop_event) / count)
    return samples


def _replayed(run: Callable[[], object], captured: bool) -> tuple[Callable[[], object], int]:
    """``run`` warmed up and, if asked, captured several times over: what to call, and how many runs that is."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    if not captured:
        return run, 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CAPTURED):
            run()
    graph.replay()
    return graph.replay, _CAPTURED


def time_of(launch: Launch) -> float:
    """Milliseconds of a launch; infinite if it does not run here."""
    try:
        return graph_milliseconds(launch.run)
    except failures() as error:
        print(f"   does not run: {launch.options}: {str(error).splitlines()[0][:200]}", flush=True)
        return float("inf")


def failures() -> tuple[type[Exception], ...]:
    """What one configuration may fail with, without ending the run."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return RuntimeError, ValueError, AssertionError
    return RuntimeError, ValueError, AssertionError, TritonError


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Memory that ``run`` takes beyond what is allocated before; None on the CPU, which does not tell."""
    if DEVICE.type == "cpu":
        run()
        return None
    run()  # workspaces are kept and must not count
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_ceilings(is_small: bool) -> Ceilings:
    """Rates of the largest products and copies that are quick to make."""
    size = 128 if is_small else 8192
    flops = {}
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
        flops[name] = _rate(lambda a=a, b=b: a @ b, 2.0 * size**3)
    flops["fp16"] = flops["bf16"]
    flops["fp8"] = flops["bf16"]
    if capability_of(DEVICE) >= 89:
        a, b = (torch.randn(size, size, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=DEVICE)
        flops["fp8"] = _rate(lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16), 2.0 * size**3)
    count = 1 << (16 if is_small else 30)
    source, target = (torch.empty(count, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return Ceilings(flops, _rate(lambda: target.copy_(source), 2.0 * count))


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference; infinite where something is no number."""
    difference = (found.double() - wanted.double()).abs().max().item()
    return difference if difference == difference else float("inf")


def _rate(run: Callable[[], object], amount: float) -> float:
    """Amount a second, by the fastest sample."""
    return 1e3 * amount / min(milliseconds(run))
