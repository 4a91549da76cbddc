"""The list of a step's tiles, on whichever implementation serves: PyTorch, or the interpreted Triton kernel."""

from __future__ import annotations

import pytest
import torch

from mtgr.kernels.paged_items import END as STOP
from mtgr.kernels.paged_items import (
    FIRST,
    HAS_OWN,
    NUM_KEYS,
    REQUEST,
    SEEN_BY_ALL,
    StepItems,
    list_items,
    new_items,
)

PADDING = 5


def step(lengths: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of requests with so many context tokens and candidates: where they start, what tokens see, who sees itself."""
    starts, visible, is_candidate = [0], [], []
    for context, candidates in lengths:
        starts.append(starts[-1] + context + candidates)
        visible += [*range(1, context + 1), *[context] * candidates]
        is_candidate += [False] * context + [True] * candidates
    # What stands behind the last request may be anything.
    visible += [2**30] * PADDING
    is_candidate += [True] * PADDING
    return (
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(visible, dtype=torch.int32),
        torch.tensor(is_candidate),
    )


@pytest.mark.parametrize("block_m", [64, 128, 192])
@pytest.mark.parametrize(
    "lengths",
    [
        [(300, 100)],
        [(128, 0), (0, 0), (1, 0), (0, 0), (0, 0), (64, 64), (0, 200), (0, 0)],
        [(1, 0)] * 5,
        [(7, 3)] * 150,
        [(0, 0)] * 3,
    ],
    ids=["one", "empty_among_them", "one_token_each", "more_than_a_block", "none"],
)
def test_every_token_is_in_one_tile(lengths: list[tuple[int, int]], block_m: int) -> None:
    starts, visible, is_candidate = step(lengths)
    items = list_items(starts, visible, is_candidate, block_m)
    count = int(items[0, 0])
    assert count == sum(-(-(context + candidates) // block_m) for context, candidates in lengths)
    assert count < len(items) == len(new_items(len(visible), len(lengths), block_m, visible.device))
    covered: list[int] = []
    for fields in items[1 : 1 + count].tolist():
        request, first, stop = fields[REQUEST], fields[FIRST], fields[STOP]
        assert (starts[request] <= first) & (first < stop) & (stop == starts[request + 1])
        assert (first - int(starts[request])) % block_m == 0
        tokens = range(first, min(first + block_m, stop))
        assert fields[NUM_KEYS] == visible[tokens].max()
        assert fields[HAS_OWN] == int(is_candidate[tokens].any())
        for part in range(block_m // 64):
            rows = tokens[64 * part : 64 * (part + 1)]
            assert fields[SEEN_BY_ALL + part] == (visible[rows].min() if rows else 2**31 - 1)
        covered += tokens
    assert sorted(covered) == list(range(int(starts[-1])))
    # The last come first.
    firsts = [fields[FIRST] for fields in items[1 : 1 + count].tolist()]
    assert firsts == sorted(firsts, reverse=True)


def test_layers_share_a_list() -> None:
    starts, visible, is_candidate = step([(100, 20)])
    items = StepItems()
    first = items.of(starts, visible, is_candidate, 128)
    assert items.of(starts, visible, is_candidate, 128) is first
    assert items.of(starts, visible, is_candidate, 64) is not first
    assert StepItems().of(starts, visible, is_candidate, 128) is not first
