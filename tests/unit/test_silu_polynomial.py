"""The polynomial that stands for SiLU where weights are rounded to e4m3."""

from __future__ import annotations

import pytest
import torch

from mtgr.kernels.silu_polynomial import BOUND, COEFFICIENTS, pair_of_halves, silu_of_double

# Every number of FP16 that is finite, and numbers between.
BITS = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
NUMBERS = torch.cat([BITS[BITS.isfinite()].double(), torch.linspace(-30, 30, 200_001).double()])
# Twice, and times a factor, is still in range.
SMALL = NUMBERS[NUMBERS.abs() < 1000]


def exact(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(2 * x)


@pytest.mark.parametrize("factor", [1.0, 16.0, 9.37, 0.113])
def test_error_is_a_fraction_of_that_of_e4m3(factor: float) -> None:
    error = (silu_of_double(SMALL, factor).double() / factor - exact(SMALL)).abs()
    bound = SMALL.abs().clamp(max=1)
    # FP16 rounds factor and result to within 2^-11 each, and what is below 2^-14 in steps of 2^-24.
    allowed = 0.022 * bound + 2**-10 * exact(SMALL).abs() + 2**-23 / factor
    assert bool((error <= allowed).all())
    normal = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    error = (silu_of_double(normal, factor).double() / factor - exact(normal)) / exact(normal).square().mean().sqrt()
    assert float(error.square().mean().sqrt()) < 0.005


def test_far_numbers() -> None:
    x = torch.tensor([0.0, -0.0, 20.0, -20.0, 448.0, -60000.0, float("inf"), float("nan")])
    found = silu_of_double(x)
    assert found[:2].tolist() == [0.0, 0.0]
    assert found[2:5].sub(torch.tensor([40.0, 0.0, 896.0])).abs().max() < 0.01
    assert abs(float(found[5])) < 0.01
    assert found[6].isinf()
    assert found[7].isnan()


def test_constants_are_numbers_of_fp16() -> None:
    for number in (BOUND, *COEFFICIENTS):
        assert float(torch.tensor(number).half()) == number
    assert pair_of_halves(-1.0) == "0xbc00bc00"
    assert pair_of_halves(1.5) == "0x3e003e00"
