"""Linear layers of a block: with SiLU in the product's epilogue, and in FP8 (e4m3).

    y = activation(x W^T + b)

An FP8 weight has one scale for each 128 x 128 of its numbers, an FP8 input one for each 128 of a token's: a loud token
or channel takes the small numbers of its own block alone. Sums are FP32; each block of 128 products is scaled there.
Or each row of both has one scale, by which the finished sum is multiplied: that is what cuBLAS's product takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.errors import ConfigurationError
from mtgr.kernels.dense_fp8 import LARGEST
from mtgr.kernels.dispatch import use_triton
from mtgr.kernels.linear_tuning import LinearKey, choose, library_fp8, library_silu, silu_launch

# Numbers along a row, and rows of a weight, that share a scale.
BLOCK = 128

# The product's own tiles along the summed dimension; other widths take PyTorch's product.
STEP = 64


@dataclass(frozen=True, eq=False)
class QuantisedRows:
    """FP8 rows: of an input, one scale for each 128 numbers of a row, or for the row.

    Attributes:
        data: e4m3 [T, K'], K' the next multiple of 128, zeros behind K.
        scales: FP32 [T, K' / 128]; by row [T, 1].
        by_row: Whether a row has one scale.
    """

    data: Tensor
    scales: Tensor
    by_row: bool = False


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """An FP8 weight, one scale for each 128 x 128 numbers, or for each row, which is an output's channel.

    Attributes:
        data: e4m3 [N, K'], K' the next multiple of 128, zeros behind K.
        scales: FP32 [ceil(N / 128), K' / 128]; by row [N, 1].
        by_row: Whether a row has one scale; inputs must be alike.
    """

    data: Tensor
    scales: Tensor
    by_row: bool = False


def linear_silu(x: Tensor, weight: Tensor, bias: Tensor, *, fused: bool | None = None) -> Tensor:
    """SiLU(x W^T + b), float [T, N], in the precision of the weight.

    Args:
        x: Float [T, K], contiguous.
        weight: Float [N, K], contiguous.
        bias: Float [N].
        fused: Whether one kernel makes it all. By default what ``mtgr.kernels.linear_tuning`` has measured does on a
            GPU, and where it has not, one kernel if ``is_fused`` says so.
    """
    way = choose(LinearKey.of(x.shape[0], weight)) if fused is None and use_triton(x) else None
    if way is not None and way.kind != "library":
        out = torch.empty(x.shape[0], weight.shape[0], dtype=weight.dtype, device=x.device)
        if x.shape[0]:
            silu_launch(way, x, weight, bias, out).run()
        return out
    if way is not None:
        return library_silu(x, weight, bias)
    if fused is None:
        fused = use_triton(x) and is_fused(weight)
    if not fused:
        return library_silu(x, weight, bias)
    from mtgr.kernels.triton_linear import linear_launch

    out = torch.empty(x.shape[0], weight.shape[0], dtype=weight.dtype, device=x.device)
    if x.shape[0]:
        linear_launch(x, weight, bias, out, is_silu=True).run()
    return out


def is_fused(weight: Tensor) -> bool:
    """Whether fusing SiLU is worth a product of our own.

    A pass of its own over the result costs about 4 N bytes a token, the product 2 N K operations. On Hopper the pass
    is more than a quarter of the product up to K = 1,024; a vendor's product is at most about that much faster.
    """
    return weight.dtype.itemsize == 2 and weight.shape[1] <= 1024 and weight.shape[1] % STEP == 0


def quantise_weight(weight: Tensor, *, by_row: bool = False) -> QuantisedWeight:
    """FP8 of a weight, float [N, K]."""
    if weight.ndim != 2:
        raise ConfigurationError(f"FP8 weight: the shape is {list(weight.shape)}; it must be [N, K].")
    rows, columns = weight.shape
    if by_row:
        made = _rows_by_row(weight.detach())
        return QuantisedWeight(made.data, made.scales, by_row=True)
    padded = F.pad(weight.detach().float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # [N / 128, 128, K / 128, 128]
    scales = _scales(blocks.abs().amax(dim=(1, 3)))
    data = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:rows]
    return QuantisedWeight(data.to(torch.float8_e4m3fn).contiguous(), scales)


def quantise_rows(x: Tensor, *, by_row: bool = False) -> QuantisedRows:
    """FP8 of rows, float [T, K], the last dimension contiguous."""
    tokens, columns = x.shape
    if use_triton(x):
        from mtgr.kernels.triton_linear import quantise_rows_launch

        made = empty_rows(tokens, columns, x.device, by_row=by_row)
        if tokens:
            quantise_rows_launch(x, made).run()
        return made
    if by_row:
        return _rows_by_row(x)
    padded = F.pad(x.float(), (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = _scales(padded.abs().amax(dim=2))
    return QuantisedRows((padded / scales[..., None]).flatten(1).to(torch.float8_e4m3fn), scales)


def empty_rows(tokens: int, columns: int, device: torch.device, *, by_row: bool = False) -> QuantisedRows:
    """Room for the FP8 rows of [T, K]."""
    blocks = -(-columns // BLOCK)
    return QuantisedRows(
        torch.empty(tokens, blocks * BLOCK, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(tokens, 1 if by_row else blocks, dtype=torch.float32, device=device),
        by_row,
    )


def fp8_linear(
    x: Tensor | QuantisedRows,
    weight: QuantisedWeight,
    bias: Tensor,
    *,
    is_silu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """activation(x W^T + b) of FP8 operands, float [T, N].

    Args:
        x: Float [T, K], or what ``quantise_rows`` made of it.
        weight: What ``quantise_weight`` made; with scales by row cuBLAS makes the product.
        bias: Float [N].
        is_silu: Whether the activation is SiLU, or none.
        dtype: Of the result; the bias's by default.

    Raises:
        ConfigurationError: If the widths of x and the weight differ, or only one has scales by row.
    """
    rows = x if isinstance(x, QuantisedRows) else quantise_rows(x, by_row=weight.by_row)
    if rows.by_row != weight.by_row:
        raise ConfigurationError("FP8 linear: x and the weight must both have scales by row, or neither.")
    if rows.data.shape[1] != weight.data.shape[1]:
        raise ConfigurationError(
            f"FP8 linear: x has {rows.data.shape[1]} columns with padding and the weight {weight.data.shape[1]}; "
            "they must be equal."
        )
    if weight.by_row and rows.data.is_cuda:
        return library_fp8(rows.data, weight.data, rows.scales, weight.scales, bias, is_silu, dtype or bias.dtype)
    out = torch.empty(rows.data.shape[0], weight.data.shape[0], dtype=dtype or bias.dtype, device=rows.data.device)
    if weight.by_row or not use_triton(out):
        product = dequantise_rows(rows) @ dequantise_weight(weight).T + bias.float()
        return out.copy_(F.silu(product) if is_silu else product)
    from mtgr.kernels.triton_linear import fp8_linear_launch

    if out.shape[0]:
        way = choose(LinearKey.of(out.shape[0], weight.data))
        fp8_linear_launch(rows, weight, bias, out, is_silu=is_silu, tile=way.tile if way else None).run()
    return out


def dequantise_rows(rows: QuantisedRows) -> Tensor:
    """FP32 [T, K'] that FP8 rows stand for."""
    return rows.data.float() * (rows.scales if rows.by_row else rows.scales.repeat_interleave(BLOCK, dim=1))


def dequantise_weight(weight: QuantisedWeight) -> Tensor:
    """FP32 [N, K'] that an FP8 weight stands for."""
    if weight.by_row:
        return weight.data.float() * weight.scales
    scales = weight.scales.repeat_interleave(BLOCK, dim=0)[: weight.data.shape[0]]
    return weight.data.float() * scales.repeat_interleave(BLOCK, dim=1)


def _rows_by_row(x: Tensor) -> QuantisedRows:
    """FP8 rows with one scale each, by PyTorch."""
    scales = _scales(x.float().abs().amax(dim=1, keepdim=True))
    data = F.pad(x.float() / scales, (0, -x.shape[1] % BLOCK)).to(torch.float8_e4m3fn)
    return QuantisedRows(data, scales, by_row=True)


def _scales(largest: Tensor) -> Tensor:
    return largest.clamp(min=1e-12) / LARGEST
