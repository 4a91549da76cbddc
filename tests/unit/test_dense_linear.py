"""Linear layers with SiLU and in FP8 against their equation in float64.

Runs on whichever implementation serves: PyTorch, and the Triton kernels under Triton's interpreter.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.errors import ConfigurationError
from mtgr.kernels.dispatch import use_triton
from mtgr.kernels.linear import (
    BLOCK,
    dequantise_rows,
    dequantise_weight,
    fp8_linear,
    is_fused,
    linear_silu,
    quantise_rows,
    quantise_weight,
)

Float64Array = npt.NDArray[np.float64]


class Case:
    """Rows of very different loudness, a weight with one loud channel, a bias."""

    def __init__(self, tokens: int, depth: int, columns: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(tokens + depth)
        self.x = (torch.randn(tokens, depth) * torch.logspace(-1, 1, tokens)[:, None]).to(dtype)
        weight = torch.randn(columns, depth) * depth**-0.5
        weight[:, 3] *= 20.0
        self.weight, self.bias = weight.to(dtype), torch.randn(columns).to(dtype)

    def expected(self, is_silu: bool = True) -> Float64Array:
        x, weight, bias = (part.double().numpy() for part in (self.x, self.weight, self.bias))
        y = x @ weight.T + bias
        return y / (1.0 + np.exp(-y)) if is_silu else y


def worst(actual: Tensor, expected: Float64Array) -> float:
    return float(np.abs(actual.double().numpy() - expected).max())


@pytest.mark.parametrize(("tokens", "depth", "columns"), [(7, 64, 96), (150, 192, 200), (1, 128, 24)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_silu(tokens: int, depth: int, columns: int, dtype: torch.dtype) -> None:
    """No more than twice the error of a product and a SiLU in that precision: the kernel rounds once."""
    case = Case(tokens, depth, columns, dtype)
    expected = case.expected()
    allowed = 2 * worst(F.silu(F.linear(case.x, case.weight, case.bias)), expected)
    if use_triton(case.x) and dtype == torch.bfloat16:
        # The interpreter cuts off what BF16 has no place for instead of rounding it.
        allowed += float(np.abs(expected).max()) * torch.finfo(dtype).eps
    got = linear_silu(case.x, case.weight, case.bias)
    assert got.dtype == dtype
    assert is_fused(case.weight)
    assert 0 < worst(got, expected) <= allowed


def test_single_precision_and_wide_layers_take_the_vendors_product() -> None:
    case = Case(5, 64, 32)
    assert not is_fused(case.weight)
    assert not is_fused(torch.empty(8, 8192, dtype=torch.bfloat16))
    assert not is_fused(torch.empty(8, 96, dtype=torch.bfloat16))
    assert worst(linear_silu(case.x, case.weight, case.bias), case.expected()) < 2e-5


def test_no_tokens() -> None:
    case = Case(5, 64, 32, torch.bfloat16)
    assert linear_silu(case.x[:0], case.weight, case.bias).shape == (0, 32)
    assert fp8_linear(case.x[:0], quantise_weight(case.weight), case.bias).shape == (0, 32)


@pytest.mark.parametrize(("rows", "columns"), [(96, 100), (130, 256), (256, 384)])
def test_weights_in_blocks(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    weight[0, 0] = 300.0
    made = quantise_weight(weight)
    assert made.data.shape == (rows, -(-columns // BLOCK) * BLOCK)
    assert made.scales.shape == (-(-rows // BLOCK), -(-columns // BLOCK))
    got = dequantise_weight(made)
    assert (got[:, columns:] == 0).all()
    steps = made.scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns] * 2.0**-10
    assert ((got[:, :columns] - weight).abs() <= weight.abs() * 2.0**-4 + steps).all()
    # The loud number is alone in costing its block small ones.
    if rows > BLOCK:
        assert made.scales[1:].max() < made.scales[0, 0] / 50


def test_rows_in_blocks() -> None:
    case = Case(37, 200, 8)
    wide = torch.randn(37, 300)
    wide[:, :200] = case.x
    made = quantise_rows(wide[:, :200])
    torch.testing.assert_close(made.scales[:, 0], case.x[:, :BLOCK].abs().amax(1) / 448, rtol=1e-6, atol=0)
    got = dequantise_rows(made)[:, :200]
    steps = made.scales.repeat_interleave(BLOCK, 1)[:, :200] * 2.0**-10
    assert ((got - case.x).abs() <= case.x.abs() * 2.0**-4 + steps).all()
    assert (made.data[:, 200:].float() == 0).all()


@pytest.mark.parametrize(("tokens", "depth", "columns"), [(150, 256, 200), (7, 96, 130), (66, 128, 64)])
@pytest.mark.parametrize("is_silu", [False, True])
def test_fp8(tokens: int, depth: int, columns: int, is_silu: bool) -> None:
    """The kernel adds to the rounding of operands nothing but that of its result."""
    case = Case(tokens, depth, columns)
    weight, rows = quantise_weight(case.weight), quantise_rows(case.x)
    product = dequantise_rows(rows).double() @ dequantise_weight(weight).double().T + case.bias.double()
    operands = (F.silu(product) if is_silu else product).numpy()
    got = fp8_linear(case.x, weight, case.bias, is_silu=is_silu)
    assert worst(got, operands) <= 1e-4
    expected = case.expected(is_silu)
    assert 0.003 < np.linalg.norm(got.double().numpy() - expected) / np.linalg.norm(expected) < 0.06
    low = fp8_linear(rows, weight, case.bias.bfloat16(), is_silu=is_silu)
    assert low.dtype == torch.bfloat16
    assert worst(low, operands) <= np.abs(operands).max() * 2.0**-7


def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="must be equal"):
        fp8_linear(torch.randn(3, 256), quantise_weight(torch.randn(8, 64)), torch.zeros(8))
    with pytest.raises(ConfigurationError, match=r"must be \[N, K\]"):
        quantise_weight(torch.randn(8))


def test_what_serves() -> None:
    """Under the interpreter these tests are of the kernels, else of PyTorch."""
    import os

    assert use_triton(torch.empty(0)) == (os.environ.get("TRITON_INTERPRET") == "1")
