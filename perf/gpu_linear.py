"""Linear layers of a block on the GPU at hand: the project's products beside cuBLAS, in half precision and FP8.

python -m perf.gpu_linear [--small] [--tiles] [--seed SEED]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.kernels.compilation import parallel_compilation
from mtgr.kernels.dispatch import use_triton
from mtgr.kernels.linear import QuantisedRows, QuantisedWeight, fp8_linear, linear_silu, quantise_rows, quantise_weight
from mtgr.kernels.norm import gated_group_norm, group_norm
from perf.gpu_measure import (
    DEVICE,
    Ceilings,
    Figure,
    largest_difference,
    milliseconds,
    print_section,
    section_options,
)

# Tokens, width in, width out: what a block of presets large, small and 8b makes of a batch.
SHAPES = ((8 * 1356, 768, 3072), (8 * 1356, 768, 768), (8 * 1356, 512, 2048), (2304, 8192, 32768))

# Rows and columns of a program's result, warps, and stages: all are tried on the first two shapes.
TILES = ((128, 256, 8, 3), (128, 256, 8, 4), (128, 128, 8, 4), (128, 128, 4, 4), (64, 256, 4, 4), (256, 128, 8, 3))
PERSISTENT = (
    ((128, 256, 8, 3), True, True), ((128, 256, 8, 3), True, False), ((128, 256, 8, 4), True, True),
    ((128, 256, 8, 3), False, True), ((128, 128, 8, 4), True, True), ((128, 128, 4, 4), True, True),
)  # fmt: skip
FP8_TILES = ((128, 128, 8, 3), (128, 128, 4, 4), (64, 128, 4, 4), (128, 128, 8, 4), (64, 128, 4, 3))


def linear(ceilings: Ceilings, is_small: bool, seed: int, every_tile: bool = False) -> Iterator[Figure]:
    """Products with SiLU, each as the engine makes it and as PyTorch does; on request by every tile."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for tokens, depth, width in ((72, 96, 160),) if is_small else SHAPES:
        x = torch.randn(tokens, depth, generator=generator, device=DEVICE)
        weight = torch.randn(width, depth, generator=generator, device=DEVICE) * depth**-0.5
        bias = torch.randn(width, generator=generator, device=DEVICE)
        exact = F.silu(F.linear(x, weight, bias))
        shape = f"{tokens} x {depth} -> {width}"
        flops = 2.0 * tokens * depth * width
        x, weight, bias = (part.bfloat16() for part in (x, weight, bias))
        rounded_weight = quantise_weight(weight)
        rounded = quantise_rows(x)
        row_scaled = quantise_rows(x, by_row=True), quantise_weight(weight, by_row=True)
        native = F.silu(F.linear(x, weight, bias))
        target = torch.randn(tokens, width, device=DEVICE).bfloat16()
        paths: dict[str, tuple[str, Callable[[], Tensor | None], bool]] = {
            "cublas": ("bf16", lambda x=x, w=weight, b=bias: F.linear(x, w, b), False),
            "cublas, silu": ("bf16", lambda x=x, w=weight, b=bias: F.silu(F.linear(x, w, b), inplace=True), True),
            "fused silu": ("bf16", lambda x=x, w=weight, b=bias: linear_silu(x, w, b), True),
            "cublas, added": ("bf16", lambda t=target, x=x, w=weight, b=bias: t.add_(F.linear(x, w, b)), False),
            "cublas adds": ("bf16", lambda t=target, x=x, w=weight: t.addmm_(x, w.T), False),
            "fp8 silu": ("fp8", lambda x=x, w=rounded_weight, b=bias: fp8_linear(x, w, b, is_silu=True), True),
            "fp8 silu, rounded before": (
                "fp8", lambda x=rounded, w=rounded_weight, b=bias: fp8_linear(x, w, b, is_silu=True), True,
            ),
            "fp8 by rows, silu": (
                "fp8", lambda x=row_scaled[0], w=row_scaled[1], b=bias: fp8_linear(x, w, b, is_silu=True), True,
            ),
        }  # fmt: skip
        paths |= _scaled(x, weight, tokens)
        if every_tile and use_triton(x) and (is_small or (tokens, depth, width) in SHAPES[:2]):
            paths |= _tiles(x, weight, bias, rounded, rounded_weight)
        for name, (precision, run, is_comparable) in paths.items():
            moved = (1.0 if precision == "fp8" else 2.0) * depth * (tokens + width) + 2.0 * tokens * width
            figure = Figure(
                "linear", name, shape, [], ceilings.floor_ms(flops, moved, precision), flops, ceilings.flops[precision]
            )
            try:
                found = run()
                if is_comparable and found is not None:
                    figure.error = largest_difference(found, exact)
                    if precision == "bf16":
                        figure.allowed = 2 * largest_difference(native, exact)
                figure.samples_ms = milliseconds(run)
            except Exception as error:  # noqa: BLE001 - what does not run here must not stop the others
                figure.note = f"not here: {str(error).splitlines()[0][:90]}"
            yield figure
        yield from _norms(target, ceilings, shape)


def _norms(x: Tensor, ceilings: Ceilings, shape: str) -> Iterator[Figure]:
    """GroupLN, bound by memory: a row is read and written, gated one row more is read."""
    tokens, width = x.shape
    types = (torch.arange(tokens, device=DEVICE) % 5).to(torch.int32)
    gain, bias = (torch.randn(5, width, device=DEVICE).bfloat16() for _ in range(2))
    wide = x.float()
    gate = torch.randn(tokens, 4 * width, device=DEVICE).bfloat16()[:, :width]
    for name, numbers, run in (
        ("group norm", 4, lambda: group_norm(x, types, gain, bias, 1e-6)),
        ("gated group norm of fp32", 8, lambda: gated_group_norm(wide, types, gain, bias, 1e-6, gate)),
    ):
        floor = ceilings.floor_ms(0, float(numbers) * tokens * width, "bf16")
        yield Figure("linear", name, shape.partition(" ")[0] + f" x {width}", milliseconds(run), floor)


def _scaled(x: Tensor, weight: Tensor, tokens: int) -> dict[str, tuple[str, Callable[[], Tensor | None], bool]]:
    """CuBLAS's FP8 products: one scale a row, and one for each 128 (x) and 128 x 128 (weight)."""
    left, right = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    width, depth = weight.shape
    by_row = torch.ones(tokens, 1, device=DEVICE), torch.ones(1, width, device=DEVICE)
    # Scales of x by 128 stand column by column.
    by_block = (
        torch.ones(-(-depth // 128), tokens, device=DEVICE).T,
        torch.ones(-(-depth // 128), -(-width // 128), device=DEVICE),
    )

    def product(scales: tuple[Tensor, Tensor], fast: bool) -> Tensor:
        return torch._scaled_mm(left, right.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return {
        "cublas fp8 by rows": ("fp8", lambda: product(by_row, False), False),
        "cublas fp8 by rows, fast": ("fp8", lambda: product(by_row, True), False),
        "cublas fp8 by blocks": ("fp8", lambda: product(by_block, False), False),
    }


def _tiles(
    x: Tensor, weight: Tensor, bias: Tensor, rounded: QuantisedRows, rounded_weight: QuantisedWeight
) -> dict[str, tuple[str, Callable[[], Tensor | None], bool]]:
    from mtgr.kernels.triton_linear import fp8_linear_launch, has_descriptors, linear_launch

    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=DEVICE)
    launches = {
        f"tile {tile}": ("bf16", linear_launch(x, weight, bias, out, is_silu=True, tile=tile)) for tile in TILES
    } | {
        f"fp8 tile {tile}": ("fp8", fp8_linear_launch(rounded, rounded_weight, bias, out, is_silu=True, tile=tile))
        for tile in FP8_TILES
    }
    if has_descriptors(x.device):
        from mtgr.kernels.triton_persistent import persistent_linear_launch

        for tile, is_halved, flatten in PERSISTENT:
            name = f"persistent {tile}{' halves' * is_halved}{' flat' * flatten}"
            settings = {"tile": tile, "is_halved": is_halved, "flatten": flatten}
            launches[name] = "bf16", persistent_linear_launch(x, weight, bias, out, is_silu=True, **settings)
    with parallel_compilation():
        for _, launch in launches.values():
            launch.compile()
    return {name: (precision, launch.run, False) for name, (precision, launch) in launches.items()}


def main(arguments: list[str] | None = None) -> int:
    """Print the figures."""
    options = section_options("perf.gpu_linear", __doc__, arguments, tiles="also by every tile worth measuring")
    print_section(functools.partial(linear, every_tile=options.tiles), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
