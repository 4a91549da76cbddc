"""SiLU attention of HSTU over a paged cache of keys and values.

    out[t] = ( sum_{j < visible[t]} silu(q_t . k_j * scale + bias[t, j]) v_j
               + [t is a candidate] silu(q_t . k_t * scale + bias[t, t]) v_t ) / N

HSTU: arXiv 2402.17152, equation 2; the mask is MTGR's (arXiv 2505.18654, section 3): what a token sees are the leading
tokens of its sequence, so that one number carries it, and a candidate sees itself besides. Sums are taken in FP32.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.kernels.bias import PagedBias, time_bucket_edges
from mtgr.kernels.configs import LaunchKey, choose, token_class
from mtgr.kernels.dispatch import use_triton
from mtgr.kernels.paged_items import StepItems
from mtgr.kernels.tuning import warm_up

__all__ = [
    "PagedBias",
    "StepItems",
    "paged_attention",
    "paged_attention_reference",
    "time_bucket_edges",
    "use_triton",
    "warm_up",
]

# Logits of a tile of the CPU path: few enough to stay in the cache between product, SiLU and product.
_TILE_LOGITS = 1 << 20
_MIN_TILE_QUERIES = 16


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    visible: Tensor,
    is_candidate: Tensor,
    out: Tensor,
    *,
    scale: float,
    norm_length: int,
    bias: PagedBias | None = None,
    items: StepItems | None = None,
) -> Tensor:
    """Attend for the tokens of a step.

    On a GPU nothing here waits for it, and the launches depend on shapes only, so that a step can be captured into a
    graph. After ``warm_up`` nothing is compiled or measured.

    Args:
        q: Float [T, H, D], any strides with the last dimension contiguous, like ``k`` and ``v``.
        k: Float [T, H, D]; read for candidates only, the cache has the others'.
        v: Float [T, H, D]; likewise.
        cache: Float [num_blocks, H, block_size, 2 D], keys then values in the last dimension; block_size is a power of
            two.
        block_table: INT32 [R, max_blocks], the cache blocks of each request in order.
        query_start: INT32 [R + 1], contiguous like ``visible`` and ``is_candidate``; request r's tokens are
            query_start[r] .. query_start[r + 1] - 1. Requests may be empty, and T may be larger than query_start[R].
        visible: INT32 [T], how many leading tokens of its sequence a token sees.
        is_candidate: BOOL or INT32 [T], whether a token sees itself besides.
        out: FP32 or the model's precision [T, H, D], last dimension contiguous; rows from query_start[R] on stay as
            they are.
        scale: Factor of the dot products.
        norm_length: The constant N.
        bias: Relative bias of this layer, or None.
        items: Lists that the layers of a step share, each made by the first that needs it; else every layer makes its
            own.

    Returns:
        ``out``.

    Raises:
        ConfigurationError: If the layout of a tensor is not as above.
    """
    if not use_triton(q):
        return paged_attention_reference(
            q,
            k,
            v,
            cache,
            block_table,
            query_start,
            visible,
            is_candidate,
            out,
            scale=scale,
            norm_length=norm_length,
            bias=bias,
        )
    # Not at the top: without a GPU nothing needs Triton, and it may not be installed.
    from mtgr.kernels.triton_attention import attention_launches

    if q.shape[0] == 0 or query_start.shape[0] == 1:
        return out
    key = LaunchKey(q.shape[1], q.shape[2], q.dtype, cache.shape[2], bias is not None, token_class(q.shape[0]))
    config = choose(key)
    listed = (items or StepItems()).of(query_start, visible, is_candidate, config.block_m) if config.listed else None
    for launch in attention_launches(
        q,
        k,
        v,
        cache,
        block_table,
        query_start,
        visible,
        is_candidate,
        out,
        scale=scale,
        norm_length=norm_length,
        bias=bias,
        config=config,
        items=listed,
    ):
        launch.run()
    return out


def paged_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    visible: Tensor,
    is_candidate: Tensor,
    out: Tensor,
    *,
    scale: float,
    norm_length: int,
    bias: PagedBias | None = None,
) -> Tensor:
    """``paged_attention`` in PyTorch and FP32: what serves on the CPU, and what the kernel is compared with."""
    head_size = q.shape[-1]
    block_size = cache.shape[2]
    num_heads = q.shape[1]
    starts = query_start.tolist()
    for request, (start, stop) in enumerate(pairwise(starts)):
        if start == stop:
            continue
        seen = visible[start:stop]
        num_keys = int(seen.max())
        queries = q[start:stop].transpose(0, 1).float() * scale
        blocks = block_table[request, : -(-num_keys // block_size)].long()
        # Whole pages first: picked out head by head they are copied in smaller pieces.
        gathered = cache[blocks].transpose(0, 1).reshape(num_heads, -1, 2 * head_size).float()
        keys, values = gathered[..., :head_size].transpose(1, 2), gathered[..., head_size:]
        step = max(_MIN_TILE_QUERIES, _TILE_LOGITS // max(1, num_heads * num_keys))
        attended = torch.empty(queries.shape, dtype=torch.float32, device=q.device)
        for first in range(0, stop - start, step):
            last = min(first + step, stop - start)
            attended[:, first:last] = _attend_tile(
                queries[:, first:last], keys, values, seen[first:last], blocks, bias, start + first
            )
        own = is_candidate[start:stop].bool()
        if bool(own.any()):
            attended += _attend_self(queries, k[start:stop], v[start:stop], own, bias)
        out[start:stop] = attended.div_(norm_length).transpose(0, 1)
    return out


def _attend_tile(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, blocks: Tensor, bias: PagedBias | None, first: int
) -> Tensor:
    """FP32 [H, m, D]: what m queries take from the keys they see; ``first`` is the first one's index in the step."""
    seen_by_one, seen_by_all = int(seen.max()), int(seen.min())
    if seen_by_one == 0:
        return torch.zeros_like(queries)
    keys, values = keys[..., :seen_by_one], values[:, :seen_by_one]
    if bias is None:
        logits = torch.bmm(queries, keys)
    else:
        tile = bias.tile(first, first + len(seen), seen_by_one, blocks)
        logits = torch.baddbmm(tile.expand(queries.shape[0], -1, -1), queries, keys)
    weights = F.silu(logits, inplace=True)
    if seen_by_all < seen_by_one:
        visible = torch.arange(seen_by_all, seen_by_one, device=seen.device) < seen[:, None]
        weights[..., seen_by_all:] *= visible
    return torch.bmm(weights, values)


def _attend_self(queries: Tensor, k: Tensor, v: Tensor, own: Tensor, bias: PagedBias | None) -> Tensor:
    """FP32 [H, m, D]: what the candidates among m queries take from themselves, 0 for the others."""
    logits = (queries * k.transpose(0, 1).float()).sum(dim=-1)
    if bias is not None:
        logits += bias.self_bias()
    attended = F.silu(logits, inplace=True).unsqueeze(-1) * v.transpose(0, 1).float()
    # Not a product with 0: what stands in the other rows may be anything.
    return attended.masked_fill_(~own[:, None], 0.0)
