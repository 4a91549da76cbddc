"""Which of several products serves a linear layer: measured at warm-up, for each shape's class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.kernels.compilation import parallel_compilation
from mtgr.kernels.dispatch import capability_of
from mtgr.kernels.launch import Launch
from mtgr.kernels.timing import graph_milliseconds

# ``library``: cuBLAS's product, in FP8 with scales by row, then SiLU. ``tiles``: one program a tile.
# ``persistent``: programs that stay.
Kind = Literal["library", "tiles", "persistent"]


@dataclass(frozen=True)
class LinearKey:
    """What a way was measured for.

    Attributes:
        rows_class: The next power of two of an input's rows.
        columns: Of the result, N.
        depth: Of the sum, K.
        dtype: Of the operands.
    """

    rows_class: int
    columns: int
    depth: int
    dtype: torch.dtype

    @classmethod
    def of(cls, rows: int, weight: Tensor) -> LinearKey:
        """Of a product with ``weight``, [N, K]."""
        return cls(1 << max(0, rows - 1).bit_length(), weight.shape[0], weight.shape[1], weight.dtype)


@dataclass(frozen=True)
class LinearWay:
    """How a product is made.

    Attributes:
        kind: Manner.
        tile: Rows and columns of a program's result, warps, and stages; None for the library's.
        is_halved: Whether ``persistent`` stores a tile in two parts.
    """

    kind: Kind
    tile: tuple[int, int, int, int] | None = None
    is_halved: bool = False


_PERSISTENT = (
    LinearWay("persistent", (128, 256, 8, 3), is_halved=True),
    LinearWay("persistent", (128, 256, 8, 4), is_halved=True),
    LinearWay("persistent", (128, 128, 8, 4), is_halved=True),
    LinearWay("persistent", (128, 128, 4, 4), is_halved=True),
)
_FP8_TILES = ((128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 3), (64, 128, 4, 4))

# From so many rows on cuBLAS was found faster in FP8 than the tiles, on an H200.
_LIBRARY_ROWS = 1024

_chosen: dict[LinearKey, LinearWay] = {}


def choose(key: LinearKey) -> LinearWay | None:
    """The way found fastest; None where nothing was measured."""
    return _chosen.get(key)


def remember(key: LinearKey, way: LinearWay) -> None:
    """Have ``choose`` return ``way`` for ``key`` from now on, in this process."""
    _chosen[key] = way


def ways(rows: int, weight: Tensor) -> list[LinearWay]:
    """What is worth measuring for SiLU(x W^T + b) in FP16 or BF16."""
    from mtgr.kernels.linear import STEP
    from mtgr.kernels.triton_linear import has_descriptors, tiles

    found = [LinearWay("library")]
    if weight.shape[1] % STEP == 0 and weight.dtype.itemsize == 2:
        descriptors = has_descriptors(weight.device)
        found += [LinearWay("tiles", tile) for tile in tiles(rows, descriptors, False)]
        if descriptors and weight.shape[0] % 8 == 0:
            found += _PERSISTENT
    return found


def silu_launch(way: LinearWay, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Launch:
    """The launch of a way that is not the library's, to be run or only compiled."""
    from mtgr.kernels.triton_linear import linear_launch
    from mtgr.kernels.triton_persistent import persistent_linear_launch

    assert way.tile is not None
    if way.kind == "persistent":
        return persistent_linear_launch(x, weight, bias, out, is_silu=True, tile=way.tile, is_halved=way.is_halved)
    return linear_launch(x, weight, bias, out, is_silu=True, tile=way.tile)


def library_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(x W^T + b) by PyTorch's product."""
    return F.silu(F.linear(x, weight, bias), inplace=not x.requires_grad)


def library_fp8(
    x: Tensor,
    weight: Tensor,
    x_scales: Tensor,
    weight_scales: Tensor,
    bias: Tensor,
    is_silu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """activation(x W^T + b) by PyTorch's product of FP8 operands with scales by row, on a GPU; [T, N] in ``dtype``.

    Args:
        x: e4m3 [T, K'], K' a multiple of 16.
        weight: e4m3 [N, K'], N a multiple of 16.
        x_scales: FP32 [T, 1].
        weight_scales: FP32 [N, 1].
        bias: Float [N].
        is_silu: Whether the activation is SiLU, or none.
        dtype: Of the result.
    """
    if not x.shape[0]:
        return torch.empty(0, weight.shape[0], dtype=dtype, device=x.device)
    # The product adds a bias of 16 bits alone.
    inside = bias.to(dtype) if dtype.itemsize == 2 else None
    out = torch._scaled_mm(x, weight.T, x_scales, weight_scales.view(1, -1), bias=inside, out_dtype=dtype)
    if inside is None:
        out += bias
    return F.silu(out, inplace=True) if is_silu else out


def fp8_by_row(rows: int, weight: Tensor) -> bool:
    """Whether FP8 products of so many rows take scales by row: as measured, else as found fastest on Hopper.

    Args:
        rows: T.
        weight: e4m3 [N, K'].
    """
    way = choose(LinearKey.of(rows, weight))
    if way is not None:
        return way.kind == "library"
    return rows >= _LIBRARY_ROWS and library_serves_fp8(weight.shape[0], weight.device)


def library_serves_fp8(outputs: int, device: torch.device) -> bool:
    """Whether an FP8 weight of so many rows is to have scales by row alone.

    That is on Hopper, where PyTorch's product of them took half the time of tiles with scales by block.
    """
    return capability_of(device) == 90 and _multiplies(outputs, device)


def has_library_fp8(weight: Tensor) -> bool:
    """Whether PyTorch multiplies FP8 operands with scales by row here, for a weight [N, K']; not while capturing."""
    return _multiplies(weight.shape[0], weight.device)


def _multiplies(outputs: int, device: torch.device) -> bool:
    return outputs % 16 == 0 and _has_scaled_product(device)


@cache
def _has_scaled_product(device: torch.device) -> bool:
    if capability_of(device) < 89:
        return False
    # FP32 whatever the default is: vLLM makes models with that of the model's precision, and scales are FP32.
    ones = torch.ones(16, 128, dtype=torch.float32, device=device).to(torch.float8_e4m3fn)
    scales = torch.ones(16, 1, dtype=torch.float32, device=device)
    try:
        library_fp8(ones, ones, scales, scales, scales[:, 0], False, torch.float16)
    except RuntimeError:  # of a PyTorch or a GPU without it
        return False
    return True


def tune_silu(rows: int, weight: Tensor, bias: Tensor) -> LinearWay | None:
    """Measure ``mtgr.kernels.linear.linear_silu`` for inputs of so many rows and remember the fastest way.

    Args:
        rows: T.
        weight: FP16 or BF16 [N, K].
        bias: Float [N].

    Returns:
        What is chosen from now on; None without a GPU, or where it was measured before.
    """
    key = LinearKey.of(rows, weight)
    if not weight.is_cuda or key in _chosen:
        return None
    with torch.cuda.device(weight.device):
        x = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
        out = torch.empty(rows, weight.shape[0], dtype=weight.dtype, device=weight.device)
        runs: dict[LinearWay, Callable[[], object]] = {}
        with parallel_compilation():
            for way in ways(rows, weight):
                if way.kind == "library":
                    runs[way] = lambda: library_silu(x, weight, bias)
                    continue
                launch = silu_launch(way, x, weight, bias, out)
                launch.compile()
                runs[way] = launch.run
        exact = library_silu(x, weight, bias)
        tolerance = 2.0**-5 * float(exact.abs().max())
        times = {}
        for way, run in runs.items():
            out.fill_(float("nan"))
            times[way] = graph_milliseconds(run)
            # A compiler's mistake must not be served: what is wrong is not chosen.
            if way.kind != "library" and not float((out - exact).abs().max()) <= tolerance:
                times[way] = float("inf")
        return _fastest(key, times)


def tune_fp8(
    rows: int, weight: Tensor, scales: Tensor, bias: Tensor, by_row: tuple[Tensor, Tensor] | None = None
) -> LinearWay | None:
    """The same for ``mtgr.kernels.linear.fp8_linear`` with a ``QuantisedWeight``'s numbers and scales.

    ``by_row`` has numbers and scales of the same weight by row: what the library's product takes, where there is one.
    """
    from mtgr.kernels.linear import QuantisedWeight, quantise_rows
    from mtgr.kernels.triton_linear import fp8_linear_launch

    key = LinearKey.of(rows, weight)
    if not weight.is_cuda or key in _chosen:
        return None
    with torch.cuda.device(weight.device):
        random = torch.randn(rows, weight.shape[1], device=weight.device)
        x = quantise_rows(random)
        out = torch.empty(rows, weight.shape[0], dtype=bias.dtype, device=weight.device)
        runs: dict[LinearWay, Callable[[], object]] = {}
        with parallel_compilation():
            for tile in _FP8_TILES:
                quantised = QuantisedWeight(weight, scales)
                launch = fp8_linear_launch(x, quantised, bias, out, is_silu=True, tile=tile)
                launch.compile()
                runs[LinearWay("tiles", tile)] = launch.run
        if by_row is not None and has_library_fp8(weight):
            wide = quantise_rows(random, by_row=True)
            data, of_rows = by_row
            runs[LinearWay("library")] = lambda: library_fp8(
                wide.data, data, wide.scales, of_rows, bias, True, bias.dtype
            )
        return _fastest(key, {way: graph_milliseconds(run) for way, run in runs.items()})


def _fastest(key: LinearKey, times: dict[LinearWay, float]) -> LinearWay:
    best = min(times, key=times.__getitem__)
    if times[best] < float("inf"):
        remember(key, best)
    return best
