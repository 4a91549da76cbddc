"""Norms and stores of a step on a GPU against PyTorch on the host, at ragged shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtgr.kernels.norm import fp8_residual_group_norm, residual_group_norm
from mtgr.kernels.store import activate_and_store, clear_padding

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU here.")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 1000, 8192])
@pytest.mark.parametrize("tokens", [1, 77])
def test_a_residual_is_added_and_normalised(tokens: int, width: int, dtype: torch.dtype) -> None:
    x, update = numbers(0, tokens, 2 * width, dtype=dtype)[:, :width], numbers(1, tokens, width, dtype=dtype)
    gain, bias = numbers(2, 5, width, dtype=dtype), numbers(3, 5, width, dtype=dtype)
    types = torch.randint(5, (tokens, 8), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
    tensors = [part.cuda() for part in (x, update)]
    kinds, scale, shift = types.cuda()[:, 0], gain.cuda(), bias.cuda()
    total, normal = residual_group_norm(*tensors, kinds, scale, shift, 1e-6)
    assert torch.equal(total.cpu(), x + update)
    wide = [part.float() for part in (x + update, gain, bias)]
    exact = residual_group_norm(wide[0], None, types[:, 0], wide[1], wide[2], 1e-6)[1]
    step = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(normal.cpu().float(), exact, rtol=4 * step, atol=4 * step * float(exact.abs().max()))
    for by_row in (False, True):
        total, rounded = fp8_residual_group_norm(*tensors, kinds, scale, shift, 1e-6, by_row=by_row)
        assert torch.equal(total.cpu(), x + update)
        size = rounded.data.shape[1] // rounded.scales.shape[1]
        spread = rounded.data.float() * rounded.scales.repeat_interleave(size, dim=1)
        largest = exact.abs().amax(dim=1, keepdim=True)
        assert ((spread.cpu()[:, :width] - exact).abs() <= exact.abs() / 16 + largest / 448).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "size"), [(3, 48), (2, 256), (64, 128)])
def test_keys_and_values_are_activated_and_stored(heads: int, size: int, dtype: torch.dtype) -> None:
    tokens, block, width = 37, 16, heads * size
    merged = 3 * numbers(0, tokens, 4 * width, dtype=dtype)
    slots = torch.randperm(4 * block, generator=torch.Generator().manual_seed(1))[:tokens]
    slots[::3] = -1
    cache = torch.full((4, heads, block, 2 * size), 7.0, dtype=dtype)

    def parts(rows: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (heads, size)) for part in rows.split(width, dim=-1)]

    on_gpu, stored = merged.cuda(), cache.cuda()
    for rows, pages, places in ((merged, cache, slots), (on_gpu, stored, slots.cuda())):
        _, v, q, k = parts(rows)
        activate_and_store(q, k, v, pages, places)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(stored.cpu(), cache, rtol=4 * step, atol=step)
    chosen = torch.stack([part[slots < 0] for part in parts(on_gpu.cpu())])
    torch.testing.assert_close(
        chosen, torch.stack([part[slots < 0] for part in parts(merged)]), rtol=4 * step, atol=step
    )
    torch.testing.assert_close(parts(on_gpu.cpu())[2], parts(merged)[2], rtol=4 * step, atol=step)


def test_padding_is_cleared() -> None:
    rows = torch.full((11, 3, 40), float("nan"), device="cuda")
    clear_padding(rows, torch.tensor([0, 4, 7], dtype=torch.int32, device="cuda"))
    assert rows[:7].isnan().all()
    assert not rows[7:].any()
