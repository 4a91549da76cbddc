"""Which tiles of queries a step of paged attention has: a list made once a step, which all of its layers read.

A tile is up to ``block_m`` tokens of one request. How many a step has is known on the GPU alone; the list has room for
as many as its numbers of tokens and requests allow, so that nothing waits and a graph can capture it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mtgr.kernels.dispatch import use_triton

# Columns: request, first token, end of the request's tokens, keys that any query sees, whether a query sees itself, and
# for each 64 queries of the tile, up to three times, the keys that all of them see.
FIELDS = 8
REQUEST, FIRST, END, NUM_KEYS, HAS_OWN, SEEN_BY_ALL = range(6)

# Queries of a warpgroup.
PART = 64

_NONE = 2**31 - 1


def new_items(num_tokens: int, num_requests: int, block_m: int, device: torch.device) -> Tensor:
    """Room for the list: INT32 [1 + tiles at most, FIELDS]; the number of tiles comes first."""
    return torch.empty(1 + num_tokens // block_m + num_requests, FIELDS, dtype=torch.int32, device=device)


def list_items(query_start: Tensor, visible: Tensor, is_candidate: Tensor, block_m: int) -> Tensor:
    """The step's tiles, the last first: candidates see most and come early. Arguments are ``paged_attention``'s."""
    items = new_items(len(visible), len(query_start) - 1, block_m, visible.device)
    if use_triton(visible):
        from mtgr.kernels.triton_items import list_items_launch

        list_items_launch(query_start, visible, is_candidate, items, block_m).run()
        return items
    starts = query_start.tolist()
    found = []
    for request, (start, end) in enumerate(pairwise(starts)):
        for first in range(start, end, block_m):
            tile = slice(first, min(first + block_m, end))
            parts = [visible[at : min(at + PART, tile.stop)] for at in range(first, first + block_m, PART)]
            by_all = [int(part.min()) if len(part) else _NONE for part in parts]
            own = int(is_candidate[tile].bool().any())
            fields = [request, first, end, int(visible[tile].max()), own, *by_all]
            found.append([*fields, *[0] * (FIELDS - len(fields))])
    items[0, 0] = len(found)
    if found:
        items[1 : 1 + len(found)] = torch.tensor(found[::-1], dtype=torch.int32)
    return items


class StepItems:
    """The lists of one step, each made when the first layer asks for it."""

    def __init__(self) -> None:
        self._lists: dict[int, Tensor] = {}

    def of(self, query_start: Tensor, visible: Tensor, is_candidate: Tensor, block_m: int) -> Tensor:
        """``list_items``, made once."""
        if block_m not in self._lists:
            self._lists[block_m] = list_items(query_start, visible, is_candidate, block_m)
        return self._lists[block_m]
