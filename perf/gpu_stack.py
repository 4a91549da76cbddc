"""A stack of causal HSTU blocks beside a Transformer of equal width on PyTorch's fused attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from mtgr.kernels.dense_attention import dense_attention
from mtgr.kernels.dense_segments import jagged_segments
from mtgr.kernels.dense_tuning import warm_up_dense
from mtgr.kernels.linear import linear_silu
from mtgr.kernels.norm import gated_group_norm, group_norm
from perf.gpu_attention import BACKENDS
from perf.gpu_measure import DEVICE, Ceilings, Figure, interleaved, largest_difference

LAYERS = 8
DTYPE = torch.bfloat16
_EPSILON = 1e-6


def stack(ceilings: Ceilings, is_small: bool, seed: int) -> Iterator[Figure]:
    """Both stacks at length 8,192, and what an HSTU block's time consists of."""
    length, shapes = (64, [(64, 2)]) if is_small else (8192, [(512, 4), (1024, 8), (512, 8)])
    for width, heads in shapes:
        yield from _compare(width, heads, length, ceilings, seed)


class HSTU:
    """Blocks on the project's kernels, causal, one type of token.

    Args:
        width: d; U, V, Q and K have the same.
        heads: H.
        length: Tokens of the one sequence.
        generator: Source of the weights.
    """

    def __init__(self, width: int, heads: int, length: int, generator: torch.Generator) -> None:
        self.width, self.heads, self.length = width, heads, length
        self.segments = jagged_segments([0], [length], [0], DEVICE)
        self.types = torch.zeros(length, dtype=torch.int32, device=DEVICE)
        self.gain = torch.ones(1, width, dtype=DTYPE, device=DEVICE)
        self.bias = torch.zeros(1, width, dtype=DTYPE, device=DEVICE)
        self.layers = [
            (_weights(4 * width, width, generator), _weights(width, width, generator)) for _ in range(LAYERS)
        ]
        self.flops = LAYERS * (2.0 * 5 * width**2 * length + 2.0 * width * length * (length + 1))
        self.moved = LAYERS * 2.0 * (5 * width**2 + 2 * width * length)

    def run(self, x: Tensor) -> Tensor:
        """Float [length, d] of the same."""
        x = x.clone()
        for projection, output in self.layers:
            merged = self.project(self.normalise(x), projection)
            self.add(x, self.gate(self.attend(merged), merged), output)
        return x

    def normalise(self, x: Tensor) -> Tensor:
        """GroupLN."""
        return group_norm(x, self.types, self.gain, self.bias, _EPSILON)

    def project(self, x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        """U, V, Q and K of normalised tokens, float [length, 4 d]."""
        return linear_silu(x, *weights)

    def attend(self, merged: Tensor) -> Tensor:
        """A V / N."""
        _, v, q, k = (part.unflatten(-1, (self.heads, -1)) for part in merged.split(self.width, dim=-1))
        out = torch.empty(q.shape, dtype=DTYPE, device=DEVICE)
        scale = (self.width // self.heads) ** -0.5
        return dense_attention(q, k, v, out, self.segments, scale=scale, norm_length=self.length).flatten(1)

    def gate(self, attended: Tensor, merged: Tensor) -> Tensor:
        """GroupLN times U."""
        gate = merged[:, : self.width]
        return gated_group_norm(attended, self.types, self.gain, self.bias, _EPSILON, gate)

    def add(self, x: Tensor, gated: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        """Add the projection of what attention found."""
        return x.add_(F.linear(gated, *weights))

    def parts(self, x: Tensor) -> dict[str, Callable[[], object]]:
        """The steps of one block, each alone."""
        projection, output = self.layers[0]
        normal = self.normalise(x)
        merged = self.project(normal, projection)
        attended = self.attend(merged)
        gated = self.gate(attended, merged)
        to = x.clone()
        return {
            "GroupLN": lambda: self.normalise(x),
            "UVQK with SiLU": lambda: self.project(normal, projection),
            "UVQK, SiLU apart": lambda: linear_silu(normal, *projection, fused=False),
            "attention": lambda: self.attend(merged),
            "GroupLN times U": lambda: self.gate(attended, merged),
            "output and residual": lambda: self.add(to, gated, output),
        }

    def exact(self, x: Tensor) -> Tensor:
        """The same in FP32 and in PyTorch, one head and 1,024 queries at a time."""
        return _plain(x.float(), self, torch.float32)

    def plain(self, x: Tensor) -> Tensor:
        """The same in PyTorch in the precision of the weights."""
        return _plain(x.clone(), self, DTYPE)


def _plain(x: Tensor, network: HSTU, dtype: torch.dtype) -> Tensor:
    size = network.width // network.heads
    for projection, output in network.layers:
        normal = F.layer_norm(x.float(), (network.width,), eps=_EPSILON).to(dtype)
        merged = F.silu(F.linear(normal, *(part.to(dtype) for part in projection)))
        u, v, q, k = merged.split(network.width, dim=-1)
        attended = torch.empty_like(u)
        for head in range(network.heads):
            columns = slice(head * size, (head + 1) * size)
            for first in range(0, network.length, 1024):
                last = min(first + 1024, network.length)
                weights = F.silu(q[first:last, columns] * size**-0.5 @ k[:last, columns].T).tril_(first)
                attended[first:last, columns] = weights @ v[:last, columns]
        normal = F.layer_norm(attended.float() / network.length, (network.width,), eps=_EPSILON).to(dtype)
        x = x + F.linear(normal * u, *(part.to(dtype) for part in output))
    return x


class Transformer(nn.Module):
    """Blocks before whose parts LayerNorm stands, with an FFN of 4 d and GELU, causal.

    Args:
        width: d.
        heads: H.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "output": nn.Linear(width, width),
                    "ffn_norm": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Float [length, d] of the same."""
        for layer in self.layers:
            parts = layer["qkv"](layer["norm"](x)).unflatten(-1, (3, self.heads, -1))
            q, k, v = parts.permute(1, 2, 0, 3).unsqueeze(1)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["output"](attended[0].transpose(0, 1).flatten(1))
            x = x + layer["down"](F.gelu(layer["up"](layer["ffn_norm"](x))))
        return x


@torch.inference_mode()
def _compare(width: int, heads: int, length: int, ceilings: Ceilings, seed: int) -> Iterator[Figure]:
    shape = f"d {width} H {heads} N {length} L {LAYERS}"
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(length, width, generator=generator, device=DEVICE).to(DTYPE)
    warm_up_dense(heads, width // heads, DTYPE, batch=1, context=length, num_candidates=0, device=DEVICE)
    ours = HSTU(width, heads, length, generator)
    torch.manual_seed(seed)
    transformer = Transformer(width, heads).to(DEVICE, DTYPE)
    flops = LAYERS * (2.0 * 12 * width**2 * length + 2.0 * width * length * (length + 1))
    moved = LAYERS * 2.0 * (12 * width**2 + 2 * width * length)
    runs: dict[str, Callable[[], object]] = {"HSTU": lambda: ours.run(x)}
    figures = {"HSTU": _figure("HSTU", shape, ours.flops, ours.moved, ceilings)}
    # PyTorch's compiler decides on a backend when it compiles: it is asked for flash alone.
    others = [("eager", "flash"), ("eager", "cudnn"), ("compiled", "flash")]
    for name, backend in others[: None if DEVICE.type == "cuda" else 2]:
        run = torch.compile(transformer) if name == "compiled" else transformer
        key = f"Transformer {name}, {backend}"
        call = _with_backend(run, backend, x)
        try:
            call()
        except RuntimeError as error:
            print(f"   {key}: {str(error).splitlines()[0][:200]}", flush=True)
            continue
        runs[key], figures[key] = call, _figure(key, shape, flops, moved, ceilings)
    for name, samples in interleaved(runs).items():
        figures[name].samples_ms = samples
    hstu = figures["HSTU"]
    for name, figure in figures.items():
        if figure is not hstu and hstu.p50 and figure.p50:
            hstu.versus[name] = figure.p50 / hstu.p50
    exact = ours.exact(x)
    hstu.error = largest_difference(ours.run(x), exact)
    hstu.allowed = 2 * largest_difference(ours.plain(x), exact)
    yield from figures.values()
    of_linear = 2.0 * width**2 * length
    costs = {
        "GroupLN": (0.0, 2.0),
        "UVQK with SiLU": (4 * of_linear, 5.0),
        "UVQK, SiLU apart": (4 * of_linear, 5.0),
        "attention": (2.0 * width * length * (length + 1), 4.0),
        "GroupLN times U": (0.0, 3.0),
        "output and residual": (of_linear, 3.0),
    }
    for name, samples in interleaved(ours.parts(x)).items():
        of_part, rows = costs[name]
        figure = _figure(f"  of a block: {name}", shape, of_part, 2.0 * rows * width * length, ceilings)
        figure.samples_ms = samples
        yield figure


def _with_backend(run: Callable[[Tensor], Tensor], backend: str, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        if DEVICE.type == "cpu":
            return run(x)
        with sdpa_kernel(BACKENDS[backend]):
            return run(x)

    return call


def _figure(name: str, shape: str, flops: float, moved: float, ceilings: Ceilings) -> Figure:
    floor = ceilings.floor_ms(flops, moved, "bf16")
    return Figure("stack", name, shape, floor_ms=floor, flops=flops or None, peak=ceilings.flops["bf16"])


def _weights(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    weight = torch.randn(rows, columns, generator=generator, device=DEVICE) * columns**-0.5
    return weight.to(DTYPE), torch.zeros(rows, dtype=DTYPE, device=DEVICE)
