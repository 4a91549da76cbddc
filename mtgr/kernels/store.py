"""Write what a step computed of its context tokens into the paged caches, and what nobody computes into its outputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mtgr.kernels.dispatch import use_triton


def store_keys_values(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Store keys and values, in the cache's precision.

    Args:
        k: Float [T, H, D], any strides with the last dimension contiguous.
        v: Float [T, H, D], likewise.
        cache: Float [num_blocks, H, block_size, 2 D], last dimension contiguous, changed in place.
        slots: INT64 [T], block * block_size + offset, each at most once; a token whose slot is negative is left out.
    """
    if k.shape[0] == 0:
        return
    if use_triton(k):
        from mtgr.kernels.triton_store import store_keys_values_launch

        store_keys_values_launch(k, v, cache, slots).run()
        return
    kept, blocks, offsets = _kept(slots, cache.shape[2])
    if len(blocks) == 0:  # all are candidates
        return
    head_size = k.shape[-1]
    cache[blocks, :, offsets, :head_size] = k[kept].to(cache.dtype)
    cache[blocks, :, offsets, head_size:] = v[kept].to(cache.dtype)


def activate_and_store(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Put queries, keys and values through SiLU, where they lie, and store keys and values as above.

    In one pass over what a block's product left, where SiLU and the store would each make their own. Keys and values
    that are stored are read from the cache from then on, and may stay in ``k`` and ``v`` as they are: on a GPU a
    quarter of the pass would go into changing them.

    Args:
        q: Float [T, H, D], like ``k`` and ``v``, changed in place.
        k: Float [T, H, D], changed in place where a token has no slot; else undefined between before and after SiLU.
        v: Float [T, H, D], likewise.
        cache: As of ``store_keys_values``.
        slots: As of ``store_keys_values``.
    """
    if q.shape[0] == 0:
        return
    if use_triton(q):
        from mtgr.kernels.triton_store import activate_and_store_launch

        activate_and_store_launch(q, k, v, cache, slots).run()
        return
    for part in (q, k, v):
        F.silu(part, inplace=True)
    store_keys_values(k, v, cache, slots)


def store_times(times: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Store times.

    Args:
        times: INT32 [T], seconds.
        cache: INT32 [num_blocks, block_size], changed in place.
        slots: INT64 [T], as ``store_keys_values`` takes them.
    """
    if times.shape[0] == 0:
        return
    if use_triton(times):
        from mtgr.kernels.triton_store import store_times_launch

        store_times_launch(times, cache, slots).run()
        return
    kept, blocks, offsets = _kept(slots, cache.shape[1])
    cache[blocks, offsets] = times[kept]


def clear_padding(rows: Tensor, query_start: Tensor) -> None:
    """Zero the rows behind a step's last request.

    Args:
        rows: Float [T, ...], contiguous, changed in place.
        query_start: INT32 [R + 1], contiguous, the last being the number of rows that are left as they are.
    """
    if rows.shape[0] == 0:
        return
    if use_triton(rows):
        from mtgr.kernels.triton_store import clear_padding_launch

        clear_padding_launch(rows, query_start).run()
        return
    rows[int(query_start[-1]) :] = 0


def _kept(slots: Tensor, block_size: int) -> tuple[Tensor | slice, Tensor, Tensor]:
    """Which tokens to store, and the block and offset of each."""
    stored = slots >= 0
    if bool(stored.all()):
        return slice(None), slots // block_size, slots % block_size
    kept = stored.nonzero().squeeze(1)
    slots = slots[kept]
    return kept, slots // block_size, slots % block_size
