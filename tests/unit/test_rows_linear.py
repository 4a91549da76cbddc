"""Linear layers of wanted rows alone, against PyTorch's.

Runs on whichever implementation serves: PyTorch, and the Triton kernel where Triton's interpreter is on, as the last
test has it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.kernels.dispatch import use_triton
from mtgr.kernels.rows_linear import rows_linear
from tests.interpreted import NO_TRITON, run_interpreted

SENTINEL = 77.0
ROWS = 16  # of a tile
TILE = (ROWS, 32, 4, 2)


def masks(tokens: int) -> dict[str, Tensor]:
    """Nobody, everybody, the last rows, the ends of requests, one row amid a tile."""
    generator = torch.Generator().manual_seed(tokens)
    some = torch.zeros(tokens, dtype=torch.bool)
    last, one = some.clone(), some.clone()
    last[-5:] = True
    one[tokens // 2] = True
    for end in torch.randint(1, tokens + 1, (3,), generator=generator).tolist():
        some[max(0, end - 3) : end] = True
    return {"none": torch.zeros_like(some), "all": torch.ones_like(some), "last": last, "one": one, "some": some}


def case(tokens: int, depth: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + depth)
    x = torch.randn(tokens, depth, generator=generator).to(dtype)
    weight = (torch.randn(columns, depth, generator=generator) * depth**-0.5).to(dtype)
    return x, weight, torch.randn(columns, generator=generator).to(dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor, is_silu: bool) -> Tensor:
    y = F.linear(x.double(), weight.double(), bias.double())
    return F.silu(y) if is_silu else y


def assert_close(actual: Tensor, expected: Tensor) -> None:
    # In the interpreter BF16 is cut off, not rounded; PyTorch rounds before SiLU and after.
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mask", ["none", "all", "last", "one", "some"])
@pytest.mark.parametrize(("tokens", "depth", "columns"), [(75, 64, 96), (48, 100, 70), (7, 37, 33), (600, 72, 32)])
@pytest.mark.parametrize("is_silu", [False, True])
def test_wanted_rows_are_right_and_other_tiles_are_left(
    tokens: int, depth: int, columns: int, is_silu: bool, mask: str
) -> None:
    """More tiles of rows than a group has, too. What nobody wants holds NaN, which gets nowhere."""
    x, weight, bias = case(tokens, depth, columns, torch.bfloat16)
    wanted = masks(tokens)[mask]
    expected = exact(x, weight, bias, is_silu)
    x[~wanted] = float("nan")
    out = torch.full((tokens, columns), SENTINEL, dtype=x.dtype)
    if use_triton(x):
        from mtgr.kernels.triton_linear import linear_launch

        linear_launch(x, weight, bias, out, is_silu=is_silu, tile=TILE, wanted=wanted).run()
        tiles = F.pad(wanted, (0, -tokens % ROWS)).unflatten(0, (-1, ROWS)).any(dim=1)
        computed = tiles.repeat_interleave(ROWS)[:tokens]
        assert (out[~computed] == SENTINEL).all()
        assert out[computed & ~wanted].isnan().all()
    else:
        out = rows_linear(x, weight, bias, wanted, is_silu=is_silu)
    assert_close(out[wanted], expected[wanted])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_layers_under_one_mask(dtype: torch.dtype) -> None:
    """The second takes from the first whatever stands in rows that nobody wants."""
    x, weight, bias = case(300, 40, 136, dtype)
    _, second, shift = case(300, 136, 24, dtype)
    wanted = torch.zeros(300, dtype=torch.bool)
    wanted[10:20] = wanted[290:] = True
    x[~wanted] = float("inf")
    inner = rows_linear(x, weight, bias, wanted, is_silu=True)
    got = rows_linear(inner, second, shift, wanted, is_silu=False)
    assert got.dtype == dtype
    assert got.shape == (300, 24)
    assert_close(got[wanted], exact(exact(x, weight, bias, True), second, shift, False)[wanted])


def test_no_tokens() -> None:
    x, weight, bias = case(1, 64, 32, torch.bfloat16)
    assert rows_linear(x[:0], weight, bias, torch.ones(0, dtype=torch.bool), is_silu=True).shape == (0, 32)


def test_interpreted() -> None:
    """All of the above on the kernel."""
    if use_triton(torch.empty(0)):
        return
    pytest.importorskip("triton", reason=NO_TRITON)
    assert run_interpreted(Path(__file__)) > 40
