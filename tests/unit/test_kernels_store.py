"""Stores into paged caches: what is written, and that nothing else is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtgr.kernels.store import activate_and_store, clear_padding, store_keys_values, store_times

NUM_BLOCKS = 7


def random_slots(num_tokens: int, block_size: int, seed: int) -> Tensor:
    """Distinct slots in random order, a third of them left out."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(NUM_BLOCKS * block_size, generator=generator)[:num_tokens]
    slots[torch.randperm(num_tokens, generator=generator)[: num_tokens // 3]] = -1
    return slots


@pytest.mark.parametrize(
    ("num_heads", "head_size", "block_size", "dtype"),
    [
        (3, 48, 16, torch.float32),
        (2, 256, 32, torch.bfloat16),
        (8, 128, 16, torch.float16),
        (1, 32, 64, torch.float32),
        (70, 32, 16, torch.bfloat16),
    ],
)
def test_keys_and_values(num_heads: int, head_size: int, block_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_tokens, width = 37, num_heads * head_size
    merged = torch.randn(num_tokens, 4 * width, dtype=dtype)
    _, v, _, k = (part.unflatten(-1, (num_heads, head_size)) for part in merged.split(width, dim=-1))
    slots = random_slots(num_tokens, block_size, 1)
    # A cache of which every second layer belongs to others, as where layers share one allocation.
    shared = torch.full((NUM_BLOCKS, 2, num_heads, block_size, 2 * head_size), math.nan, dtype=dtype)
    expected = shared.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, block_size)
            expected[block, 1, :, offset, :head_size] = k[token]
            expected[block, 1, :, offset, head_size:] = v[token]
    store_keys_values(k, v, shared[:, 1], slots)
    assert not expected.isnan().all()
    torch.testing.assert_close(shared, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("num_heads", "head_size", "dtype"), [(3, 48, torch.float32), (20, 128, torch.bfloat16)])
def test_what_a_product_left_is_activated_where_it_lies(num_heads: int, head_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_tokens, width, block_size = 37, num_heads * head_size, 16
    merged = 3 * torch.randn(num_tokens, 4 * width).to(dtype)
    slots = random_slots(num_tokens, block_size, 1)
    activated = merged.clone()
    activated[:, width:] = torch.nn.functional.silu(merged[:, width:])
    caches = [torch.full((NUM_BLOCKS, num_heads, block_size, 2 * head_size), math.nan, dtype=dtype) for _ in range(2)]

    def parts(rows: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (num_heads, head_size)) for part in rows.split(width, dim=-1)]

    before = merged.clone()
    _, v, q, k = parts(merged)
    activate_and_store(q, k, v, caches[0], slots)
    step = torch.finfo(dtype).eps
    _, expected_v, expected_q, expected_k = parts(activated)
    store_keys_values(expected_k, expected_v, caches[1], slots)
    torch.testing.assert_close(caches[0], caches[1], rtol=4 * step, atol=step, equal_nan=True)
    torch.testing.assert_close(q, expected_q, rtol=4 * step, atol=step)
    assert 0 < (slots < 0).sum() < num_tokens
    _, v_before, _, k_before = parts(before)
    for changed, expected, was in ((k, expected_k, k_before), (v, expected_v, v_before)):
        unstored = slots < 0
        torch.testing.assert_close(changed[unstored], expected[unstored], rtol=4 * step, atol=step)
        # What is stored may stay as it was, but never anything else.
        far = (changed - expected).abs() > 4 * step * expected.abs() + step
        assert torch.equal(changed[far], was[far])
    torch.testing.assert_close(merged[:, :width], before[:, :width], rtol=0, atol=0)
    activate_and_store(q[:0], k[:0], v[:0], caches[0], slots[:0])


@pytest.mark.parametrize("num_tokens", [1, 300])
def test_times(num_tokens: int) -> None:
    block_size = 64
    times = torch.arange(5, 5 + 2 * num_tokens, dtype=torch.int32)[::2]
    slots = random_slots(num_tokens, block_size, 2)
    pages = torch.full((NUM_BLOCKS, 1, block_size, 2), -7, dtype=torch.int32)
    expected = pages.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // block_size, 0, slot % block_size, 0] = times[token]
    store_times(times, pages[:, 0, :, 0], slots)
    assert not torch.equal(expected, torch.full_like(pages, -7))
    assert torch.equal(pages, expected)


def test_nothing_to_store() -> None:
    cache = torch.full((NUM_BLOCKS, 2, 16, 64), math.nan)
    times = torch.full((NUM_BLOCKS, 16), -7, dtype=torch.int32)
    for num_tokens in (0, 4):
        k = torch.randn(num_tokens, 2, 32)
        slots = torch.full((num_tokens,), -1)
        store_keys_values(k, k, cache, slots)
        store_times(torch.arange(num_tokens, dtype=torch.int32), times, slots)
    assert cache.isnan().all()
    assert (times == -7).all()


@pytest.mark.parametrize(("num_tokens", "starts"), [(9, (0, 4, 4, 6)), (5, (0, 5)), (3, (0, 0)), (1, (0, 1, 1))])
def test_padding_is_cleared_and_nothing_else(num_tokens: int, starts: tuple[int, ...]) -> None:
    rows = torch.full((num_tokens, 3, 700), math.nan, dtype=torch.bfloat16)
    rows[: starts[-1]] = 2.0
    clear_padding(rows, torch.tensor(starts, dtype=torch.int32))
    assert (rows[: starts[-1]] == 2.0).all()
    assert (rows[starts[-1] :] == 0.0).all()
