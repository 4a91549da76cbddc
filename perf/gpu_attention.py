"""Attention on the GPU at hand: right at ragged shapes, and how fast beside PyTorch's fused softmax attention."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtgr.kernels.compilation import parallel_compilation
from mtgr.kernels.dense_attention import dense_attention, dense_attention_reference, launch_of
from mtgr.kernels.dense_configs import DenseConfig, DenseKey, candidates, length_class, remember
from mtgr.kernels.dense_fp8 import QuantisedHeads, quantise
from mtgr.kernels.dense_segments import jagged_segments
from mtgr.kernels.dense_tuning import random_bias
from mtgr.kernels.dispatch import capability_of
from mtgr.kernels.launch import Launch
from perf.gpu_measure import DEVICE, Ceilings, Figure, failures, interleaved, largest_difference, time_of
from perf.gpu_pages import Pages, check_pages

FP8 = torch.float8_e4m3fn
HEADS = 8
REALTIME = 100
CANDIDATES = 256
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Problem:
    """Random q, k and v of sequences without padding, as columns of one projection.

    Args:
        sequences: Static tokens, context tokens and candidates of each.
        heads: H.
        head_size: D.
        dtype: Precision.
        seed: Of the numbers.
        has_bias: Whether logits get a relative bias.
    """

    def __init__(
        self,
        sequences: list[tuple[int, int, int]],
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        seed: int = 0,
        has_bias: bool = False,
    ) -> None:
        self.sequences, self.heads, self.head_size, self.dtype = sequences, heads, head_size, dtype
        static, context, candidate = (list(part) for part in zip(*sequences, strict=True))
        self.segments = jagged_segments(static, context, candidate, DEVICE)
        self.tokens = sum(context) + sum(candidate)
        generator = torch.Generator(DEVICE).manual_seed(seed)
        width = heads * head_size
        merged = torch.randn(self.tokens, 4 * width, generator=generator, device=DEVICE).to(dtype)
        _, self.v, self.q, self.k = (part.unflatten(-1, (heads, head_size)) for part in merged.split(width, dim=-1))
        self.scale, self.norm_length = head_size**-0.5, max(1, max(context))
        torch.manual_seed(seed)
        self.bias = random_bias(self.tokens, max(context) + 1, DEVICE) if has_bias else None

    def run(self, quantised: QuantisedHeads | None = None, config: DenseConfig | None = None) -> Tensor:
        """The kernel's answer, FP32, in memory that was full of NaN."""
        out = torch.full(self.q.shape, float("nan"), device=DEVICE)
        settings = {"scale": self.scale, "norm_length": self.norm_length}
        return dense_attention(
            self.q, self.k, self.v, out, self.segments, **settings, quantised=quantised, bias=self.bias, config=config
        )

    def first_head(self) -> Problem:
        """One sequence and one head of the same lengths."""
        return Problem(self.sequences[:1], 1, self.head_size, self.dtype, 1, self.bias is not None)

    def exact(self) -> Tensor:
        """The reference in FP32, TF32 off."""
        out = torch.full(self.q.shape, float("nan"), device=DEVICE)
        q, k, v = (part.float() for part in (self.q, self.k, self.v))
        settings = {"scale": self.scale, "norm_length": self.norm_length}
        return dense_attention_reference(q, k, v, out, self.segments, **settings, bias=self.bias)

    def plain(self, quantised: QuantisedHeads | None = None) -> Tensor:
        """PyTorch in the problem's own precision, or with FP8 operands: what the rule measures errors against."""
        out = torch.full(self.q.shape, float("nan"), device=DEVICE)
        settings = {"scale": self.scale, "norm_length": self.norm_length}
        if quantised is not None:
            return dense_attention_reference(
                self.q, self.k, self.v, out, self.segments, **settings, quantised=quantised
            )
        for (static, n, c), fields in zip(self.sequences, self.segments.sequences.tolist(), strict=True):
            rows, own = slice(fields[3], fields[3] + n), slice(fields[4], fields[4] + c)
            q, k, v = (part.transpose(0, 1) for part in (self.q * self.scale, self.k, self.v))
            tokens = torch.arange(n, device=DEVICE)
            visible = (tokens < (tokens + 1).clamp(min=static)[:, None]).to(self.dtype)
            to_context, to_own = self._native_bias(rows, own)
            context = (F.silu(q[:, rows] @ k[:, rows].transpose(1, 2) + to_context[:n]) * visible) @ v[:, rows]
            among = F.silu(q[:, own] @ k[:, rows].transpose(1, 2) + to_context[n:]) @ v[:, rows]
            among = among + F.silu((q[:, own] * k[:, own]).sum(-1, keepdim=True) + to_own) * v[:, own]
            out[rows] = context.transpose(0, 1).float() / self.norm_length
            out[own] = among.transpose(0, 1).float() / self.norm_length
        return out

    def _native_bias(self, rows: slice, own: slice) -> tuple[Tensor, Tensor]:
        """In the problem's own precision: [n + c, n] of a sequence's tokens to its context, and of one to itself."""
        n, c = rows.stop - rows.start, own.stop - own.start
        if self.bias is None:
            zero = torch.zeros((), dtype=self.dtype, device=DEVICE)
            return zero.expand(n + c, n), zero
        positions = torch.arange(n + c, device=DEVICE).clamp(max=n)[None]
        times = torch.cat([self.bias.times[rows], self.bias.times[own]])[None]
        bias = self.bias.between(positions, times, times[:, :n])[0]
        return bias.to(self.dtype), self.bias.own().to(self.dtype)

    @property
    def pairs(self) -> int:
        """Pairs of tokens that see each other, of one head."""
        total = 0
        for static, n, c in self.sequences:
            static = min(static, n)
            total += static * static + (n * (n + 1) - static * (static + 1)) // 2 + c * (n + 1)
        return total

    @property
    def flops(self) -> float:
        """Operations of both products over visible pairs."""
        return 4.0 * self.pairs * self.heads * self.head_size

    def moved(self, precision: str) -> float:
        """Bytes of q, k, v, the output and a bias's times, each once."""
        operands = 1 if precision == "fp8" else self.dtype.itemsize
        of_times = 0 if self.bias is None else 4
        return float(((3 * operands + self.dtype.itemsize) * self.heads * self.head_size + of_times) * self.tokens)

    def quantised(self) -> QuantisedHeads:
        """FP8 operands."""
        return quantise(self.q, self.k, self.v, self.segments)

    def key(self, precision: str) -> DenseKey:
        """What configurations are measured for."""
        operands = FP8 if precision == "fp8" else self.dtype
        length = length_class(self.segments.max_context)
        return DenseKey(self.head_size, operands, capability_of(DEVICE), length, self.bias is not None)

    def configs(self, precision: str) -> list[DenseConfig]:
        """Configurations worth measuring here."""
        return candidates(self.key(precision))

    def launches(self, precision: str) -> Callable[[DenseConfig], Launch]:
        """Launches of the kernel by configuration, all with one output."""
        quantised = self.quantised() if precision == "fp8" else None
        out = torch.empty_like(self.q)

        def launch(config: DenseConfig) -> Launch:
            settings = {"scale": self.scale, "norm_length": self.norm_length}
            tensors = (self.q, self.k, self.v, out, self.segments)
            return launch_of(*tensors, **settings, quantised=quantised, bias=self.bias, config=config)

        return launch


def check(ceilings: Ceilings, is_small: bool, seed: int) -> Iterator[Figure]:
    """Ragged shapes by DESIGN's rule, every candidate configuration; the part that is run under compute-sanitizer."""
    generator = np.random.default_rng(seed)
    longest, count = (60, 3) if is_small else (700, 5)
    sizes = (32, 64) if DEVICE.type == "cpu" else (64, 128, 256) if is_small else (32, 64, 96, 128, 256)
    cases = []
    dtypes = (torch.float32, torch.float16, torch.bfloat16, FP8)
    for head_size, dtype, has_bias in itertools.product(sizes, dtypes, (False, True)):
        is_fp8 = dtype == FP8
        if is_fp8 and (has_bias or 0 < capability_of(DEVICE) < 89):
            continue
        drawn = [tuple(int(x) for x in generator.integers(0, longest, 3)) for _ in range(count)]
        sequences = [(static, static + realtime, c) for static, realtime, c in drawn]
        problem = Problem(sequences, 2, head_size, torch.bfloat16 if is_fp8 else dtype, seed, has_bias)
        precision = _name(dtype)
        configs = problem.configs(precision)
        if precision in ("fp32", "fp16"):  # the same code as BF16 but for its type
            configs = [*configs[:1], *(one for one in configs if one.variant == "specialised")][:2]
        # On the CPU there is one way of computing it.
        cases.append((problem, precision, configs[:1] if DEVICE.type == "cpu" else configs))
    if DEVICE.type == "cuda":
        with parallel_compilation():
            for problem, precision, configs in cases:
                launch = problem.launches(precision)
                for config in configs:
                    launch(config).compile()
    for problem, precision, configs in cases:
        exact = problem.exact()
        quantised = problem.quantised() if precision == "fp8" else None
        # Sums of so many FP32 numbers differ by their order.
        least = 1e-5 * float(exact.abs().max())
        allowed = least if precision == "fp32" else 2 * largest_difference(problem.plain(quantised), exact)
        for config in configs:
            name = f"{precision}{' bias' * (problem.bias is not None)} {describe(config)}"
            figure = Figure("check", name, f"D {problem.head_size}, ragged")
            figure.allowed = allowed
            try:
                figure.error = largest_difference(problem.run(quantised, config), exact)
            except failures() as error:
                figure.note = f"does not run: {str(error).splitlines()[0][:200]}"
            yield figure
    yield from check_pages(ceilings, is_small, seed)


def compare(ceilings: Ceilings, is_small: bool, seed: int) -> Iterator[Figure]:
    """Causal and with MTGR's mask beside PyTorch's backends on causal softmax, in BF16 and FP8, and out of pages."""
    cases = [Case(*shape, is_small, seed) for shape in shapes(is_small)]
    with parallel_compilation():
        for case in cases:
            case.compile()
    for case in cases:
        yield from case.figures(ceilings)


def shapes(is_small: bool) -> list[tuple[int, int, int, int]]:
    """Batch, length, heads and head size of what is compared."""
    if is_small:
        return [(2, 48, 2, 32)]
    return [(batch, length, HEADS, size) for batch, length in ((4, 8192), (8, 2048)) for size in (128, 64, 256)]


class Case:
    """One shape with everything that is run on it.

    Args:
        batch: Sequences.
        length: Context tokens of each.
        heads: H.
        head_size: D.
        is_small: Whether to take few real-time tokens and candidates.
        seed: Of the numbers.
    """

    def __init__(self, batch: int, length: int, heads: int, head_size: int, is_small: bool, seed: int) -> None:
        self.shape, self.batch = f"B {batch} H {heads} D {head_size} N {length}", batch
        realtime, candidate = (8, 4) if is_small else (REALTIME, CANDIDATES)
        self.problems = {
            "causal": Problem([(0, length, 0)] * batch, heads, head_size, torch.bfloat16, seed),
            "mtgr": Problem([(length - realtime, length, candidate)] * batch, heads, head_size, torch.bfloat16, seed),
            "mtgr bias": Problem(
                [(length - realtime, length, candidate)] * batch, heads, head_size, torch.bfloat16, seed, has_bias=True
            ),
        }
        capability = capability_of(DEVICE)
        precisions = ["bf16"] + ["fp8"] * (capability == 0 or capability >= 89)
        self.kernels = [
            (mask, problem, precision)
            for (mask, problem), precision in itertools.product(self.problems.items(), precisions)
            if problem.bias is None or precision == "bf16"
        ]
        self.launches: dict[tuple[str, str], Callable[[DenseConfig], Launch]] = {}
        self.configs: dict[tuple[str, str], list[DenseConfig]] = {}
        if DEVICE.type == "cpu":
            return
        for mask, problem, precision in self.kernels:
            self.configs[mask, precision] = problem.configs(precision)
            self.launches[mask, precision] = problem.launches(precision)

    def compile(self) -> None:
        """Compile every candidate."""
        for name, launch in self.launches.items():
            for config in self.configs[name]:
                launch(config).compile()

    def figures(self, ceilings: Ceilings) -> Iterator[Figure]:
        """Choose the fastest configuration of each kernel, then time all in turn."""
        runs: dict[str, Callable[[], object]] = {}
        found: dict[str, Figure] = {}
        causal = self.problems["causal"]
        for name, backend in BACKENDS.items():
            figure = self._figure(f"softmax causal {name}", causal, "bf16", ceilings)
            run = _softmax(backend, causal, self.batch)
            try:
                run()
            except RuntimeError as error:
                figure.note = f"not here: {str(error).splitlines()[0][:80]}"
                yield figure
                continue
            runs[figure.name], found[figure.name] = run, figure
        for mask, problem, precision in self.kernels:
            figure = self._figure(f"silu {mask} {precision}", problem, precision, ceilings)
            launch = self.launches.get((mask, precision))
            config = None
            if launch is not None:
                times = {config: time_of(launch(config)) for config in self.configs[mask, precision]}
                config = min(times, key=times.__getitem__)
                remember(problem.key(precision), config)
                figure.note = describe(config)
                figure.tried = {describe(other): milliseconds for other, milliseconds in times.items()}
                figure.chosen = (problem.key(precision), config)
            figure.error, figure.allowed = _errors(problem, precision)
            runs[figure.name] = launch(config).run if launch and config else functools.partial(problem.run)
            found[figure.name] = figure
        masked = self.problems["mtgr"]
        figure = self._figure("silu mtgr paged bf16", masked, "bf16", ceilings)
        pages = Pages(masked, self.batch)
        figure.tried, figure.note = pages.tune()
        runs[figure.name], found[figure.name] = pages.run, figure
        small = masked.first_head()
        exact = small.exact()
        figure.error = largest_difference(Pages(small, 1).run(), exact)
        figure.allowed = 2 * largest_difference(small.plain(), exact)
        for name, samples in interleaved(runs).items():
            found[name].samples_ms = samples
        self._ratios(found)
        yield from found.values()

    def _figure(self, name: str, problem: Problem, precision: str, ceilings: Ceilings) -> Figure:
        floor = ceilings.floor_ms(problem.flops, problem.moved(precision), precision)
        peak = ceilings.flops[precision]
        return Figure("attention", name, self.shape, floor_ms=floor, flops=problem.flops, peak=peak)

    @staticmethod
    def _ratios(found: dict[str, Figure]) -> None:
        """Work a second against the others': the masks have unlike numbers of pairs."""
        for name, figure in found.items():
            if not name.startswith("silu"):
                continue
            for other in found.values():
                if other.name.startswith("softmax"):
                    figure.versus[f"{other.name.split()[-1]} by TFLOP/s"] = _work(figure) / _work(other)
            if "bias" in name:
                figure.versus["without bias"] = _work(figure) / _work(found[name.replace(" bias", "")])
            if name.endswith("fp8"):
                figure.versus["bf16"] = _work(figure) / _work(found[name.replace("fp8", "bf16")])
            if "paged" in name:
                figure.versus["dense"] = _work(figure) / _work(found[name.replace(" paged", "")])


def describe(config: DenseConfig) -> str:
    """A configuration in short."""
    ways = " in turn" * config.in_turn + " overlaps" * config.overlaps + " packed" * config.packed
    return f"{config.variant} {config.block_m}x{config.block_n}/{config.num_warps}/{config.num_stages}{ways}"


def _work(figure: Figure) -> float:
    return (figure.flops or 0.0) / (figure.p50 or float("inf"))


def _errors(problem: Problem, precision: str) -> tuple[float, float]:
    """Error and what is allowed, on one sequence and one head: the rest is the same work."""
    small = problem.first_head()
    quantised = small.quantised() if precision == "fp8" else None
    exact = small.exact()
    return (
        largest_difference(small.run(quantised), exact),
        2 * largest_difference(small.plain(quantised), exact),
    )


def _softmax(backend: SDPBackend, problem: Problem, batch: int) -> Callable[[], Tensor]:
    q, k, v = (
        part.unflatten(0, (batch, -1)).transpose(1, 2).contiguous() for part in (problem.q, problem.k, problem.v)
    )
    if DEVICE.type == "cpu":
        backend = SDPBackend.MATH

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", FP8: "fp8"}[dtype]
