"""GroupLN of a step against its equation in float64, and against the network's own module."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mtgr.kernels.dispatch import use_triton
from mtgr.kernels.linear import dequantise_rows
from mtgr.kernels.norm import (
    fp8_group_norm,
    fp8_residual_group_norm,
    gated_group_norm,
    group_norm,
    residual_group_norm,
)
from mtgr.model.norm import GroupLayerNorm
from mtgr.schema import TokenType

EPSILON = 1e-6
TOKENS = 13
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case:
    """Random inputs: rows whose mean is far from 0, types as a column of rows, a gate as a part of wider rows."""

    def __init__(self, width: int, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
        torch.manual_seed(width)
        self.x = (torch.randn(TOKENS, width) * torch.logspace(-2, 1, TOKENS)[:, None] + 3).to(x_dtype)
        self.types = torch.randint(len(TokenType), (TOKENS, 8), dtype=torch.int32)[:, 0]
        self.gain = torch.randn(len(TokenType), width).to(dtype)
        self.bias = torch.randn(len(TokenType), width).to(dtype)
        self.gate = torch.randn(TOKENS, 4 * width).to(dtype)[:, :width]

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        return self.x, self.types, self.gain, self.bias, EPSILON

    def expected(self) -> np.ndarray:
        x, gain, bias = (tensor.double().numpy() for tensor in (self.x, self.gain, self.bias))
        rows = []
        for row, kind in zip(x, self.types.tolist(), strict=True):
            variance = ((row - row.mean()) ** 2).mean()
            rows.append((row - row.mean()) / np.sqrt(variance + EPSILON) * gain[kind] + bias[kind])
        return np.stack(rows)


def residual(width: int, dtype: torch.dtype) -> tuple[Case, Tensor, Tensor]:
    """A case of a sum, x + update by PyTorch, and the two, x a part of wider rows."""
    case = Case(width, dtype, dtype)
    x, update = torch.randn(TOKENS, 3 * width).to(dtype)[:, :width], torch.randn(TOKENS, width).to(dtype)
    x.copy_(case.x)
    case.x = x + update
    return case, x, update


@pytest.mark.parametrize("width", [1, 32, 96, 768, 1000, 8192])
def test_single_precision(width: int) -> None:
    case = Case(width, torch.float32, torch.float32)
    expected = case.expected()
    # Rows stand at 3 with deviations from 0.01: FP32 keeps five digits of the smallest.
    tolerance = 2e-4
    got = group_norm(*case.arguments())
    gated = gated_group_norm(*case.arguments(), case.gate)
    assert got.dtype == gated.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(gated.numpy(), expected * case.gate.numpy(), rtol=0, atol=4 * tolerance)
    wide = torch.randn(TOKENS, 2 * width)
    wide[:, :width] = case.x
    strided = group_norm(wide[:, :width], *case.arguments()[1:])
    assert torch.equal(strided, got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.float32, None], ids=["from_single", "from_same"])
def test_low_precision(x_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    """No more than twice the error of the module in that precision; the kernel rounds once, the module thrice."""
    case = Case(512, x_dtype or dtype, dtype)
    expected = case.expected()
    module = GroupLayerNorm(512, EPSILON).to(dtype).requires_grad_(False)
    module.gain.copy_(case.gain)
    module.bias.copy_(case.bias)
    allowed = 2 * np.abs(module(case.x, case.types).double().numpy() - expected).max()
    got = group_norm(*case.arguments())
    assert got.dtype == dtype
    assert np.abs(got.double().numpy() - expected).max() <= allowed
    gate = case.gate.double().numpy()
    dense = (module(case.x, case.types) * case.gate).double().numpy()
    allowed = 2 * np.abs(dense - expected * gate).max()
    gated = gated_group_norm(*case.arguments(), case.gate)
    assert gated.dtype == dtype
    assert np.abs(gated.double().numpy() - expected * gate).max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_may_come_as_the_product_left_it(dtype: torch.dtype) -> None:
    case = Case(320, torch.float32, dtype)
    gate = torch.nn.functional.silu(case.gate.double()).numpy()
    expected = case.expected() * gate
    allowed = 1e-3 if dtype == torch.float32 else 2**-6 * np.abs(expected).max()
    got = gated_group_norm(*case.arguments(), case.gate, activates=True)
    assert np.abs(got.double().numpy() - expected).max() <= allowed
    rounded = dequantise_rows(fp8_group_norm(*case.arguments(), case.gate, by_row=True, activates=True))[:, :320]
    steps = np.maximum(np.abs(expected) / 16, np.abs(expected).max(axis=1, keepdims=True) / 448 / 1024)
    assert (np.abs(rounded.numpy() - expected) <= 1.01 * steps + allowed).all()


def test_pytorch_serves_the_module_to_the_bit() -> None:
    case = Case(96, torch.float32, torch.float32)
    module = GroupLayerNorm(96, EPSILON).requires_grad_(False)
    module.gain.copy_(case.gain)
    module.bias.copy_(case.bias)
    expected = module(case.x, case.types)
    got = group_norm(*case.arguments())
    if use_triton(case.x):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
    else:
        assert torch.equal(got, expected)
        assert torch.equal(gated_group_norm(*case.arguments(), case.gate), expected * case.gate)


def test_no_tokens() -> None:
    case = Case(64, torch.float32, torch.float32)
    assert group_norm(case.x[:0], case.types[:0], case.gain, case.bias, EPSILON).shape == (0, 64)


@pytest.mark.parametrize("width", [32, 768])
def test_what_is_normalised_may_be_shifted(width: int) -> None:
    case = Case(width, torch.float32, torch.float32)
    shift = torch.randn(width)
    shifted = group_norm(*case.arguments(), shift)
    case.x = case.x + shift
    torch.testing.assert_close(shifted, group_norm(*case.arguments()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [24, 160, 768])
@pytest.mark.parametrize("is_gated", [False, True])
def test_fp8(width: int, is_gated: bool) -> None:
    """Within a step of e4m3 of the exact result: numbers of four digits, the smallest steps 2^-9 of a block's scale."""
    case = Case(width, torch.float32, torch.float32)
    expected = case.expected() * (case.gate.numpy() if is_gated else 1.0)
    made = fp8_group_norm(*case.arguments(), case.gate if is_gated else None)
    assert made.data.shape == (TOKENS, -(-width // 128) * 128)
    found = dequantise_rows(made).numpy()
    assert (found[:, width:] == 0).all()
    scales = made.scales.repeat_interleave(128, dim=1)[:, :width].numpy()
    error = np.abs(found[:, :width] - expected)
    assert (error <= np.maximum(np.abs(expected) / 16, scales / 1024) * 1.001 + 1e-4).all()
    blocks = np.abs(np.pad(expected, ((0, 0), (0, -width % 128)))).reshape(TOKENS, -1, 128).max(axis=2)
    np.testing.assert_allclose(made.scales.numpy(), blocks / 448, rtol=1e-3)


def test_fp8_reaches_the_largest_number_and_never_passes_it() -> None:
    """A block's largest number, times the inverse of its scale, may be a little more than e4m3 holds."""
    case = Case(8192, torch.float32, torch.float32)
    made = fp8_group_norm(*case.arguments())
    assert (made.data.float().unflatten(1, (-1, 128)).abs().amax(dim=2) == 448).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 24, 160, 1000, 8192])
def test_residual(width: int, dtype: torch.dtype) -> None:
    """The stream is PyTorch's sum to the bit, and it is normalised as it was rounded."""
    case, x, update = residual(width, dtype)
    total, got = residual_group_norm(x, update, *case.arguments()[1:])
    assert total.dtype == got.dtype == dtype
    assert torch.equal(total, case.x)
    assert torch.equal(got, group_norm(*case.arguments()))
    module = GroupLayerNorm(width, EPSILON).to(dtype).requires_grad_(False)
    module.gain.copy_(case.gain)
    module.bias.copy_(case.bias)
    expected = case.expected()
    rounding = 2 * np.abs(module(case.x, case.types).double().numpy() - expected).max()
    assert np.abs(got.double().numpy() - expected).max() <= (2e-4 if dtype == torch.float32 else rounding)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 160, 768])
def test_fp8_residual(width: int, dtype: torch.dtype, by_row: bool) -> None:
    case, x, update = residual(width, dtype)
    total, made = fp8_residual_group_norm(x, update, *case.arguments()[1:], by_row=by_row)
    assert total.dtype == dtype
    assert torch.equal(total, case.x)
    alone = fp8_group_norm(*case.arguments(), by_row=by_row)
    assert made.by_row is by_row
    assert torch.equal(made.data.view(torch.uint8), alone.data.view(torch.uint8))
    assert torch.equal(made.scales, alone.scales)
    expected = case.expected()
    # PyTorch rounds to the precision of the model on its way.
    rounding = np.abs(group_norm(*case.arguments()).double().numpy() - expected)
    scales = made.scales.repeat_interleave(width if by_row else 128, dim=1)[:, :width].numpy()
    error = np.abs(dequantise_rows(made)[:, :width].numpy() - expected)
    assert (error <= np.maximum(np.abs(expected) / 16, scales / 1024) * 1.001 + 1.1 * rounding + 1e-4).all()


def test_a_residual_without_an_update_is_x() -> None:
    case = Case(160, torch.float32, torch.float32)
    total, got = residual_group_norm(case.x, None, *case.arguments()[1:])
    assert total is case.x
    assert torch.equal(got, group_norm(*case.arguments()))
    total, made = fp8_residual_group_norm(case.x, None, *case.arguments()[1:], by_row=True)
    assert total is case.x
    assert torch.equal(made.scales, fp8_group_norm(*case.arguments(), by_row=True).scales)


def test_a_residual_of_no_tokens() -> None:
    case, x, update = residual(160, torch.float32)
    arguments = x[:0], update[:0], case.types[:0], case.gain, case.bias, EPSILON
    assert [made.shape for made in residual_group_norm(*arguments)] == [(0, 160), (0, 160)]
    total, rows = fp8_residual_group_norm(*arguments)
    assert total.shape == (0, 160)
    assert rows.data.shape == (0, 256)
