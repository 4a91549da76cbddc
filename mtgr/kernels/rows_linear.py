"""A linear layer of those rows alone that somebody reads, where only the GPU knows which these are.

    y = activation(x W^T + b)

Inside a captured graph shapes may not depend on how many rows are wanted. The product is launched for all of them, and
a program whose rows nobody wants returns before it reads a weight. Numbers are rounded where PyTorch rounds them,
before the activation too: the same rows, where they are few, go through PyTorch's product, and must not differ for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.kernels.dispatch import use_triton
from mtgr.kernels.linear_tuning import library_silu

# Rows that are computed together or not at all; columns; warps; stages. Wanted rows are few: 256 of them and 8,192
# columns make 128 programs, about one for each multiprocessor of an H200, and with 256 columns half as many.
HOPPER_TILE = (128, 128, 8, 4)
AMPERE_TILE = (128, 128, 8, 3)


def rows_linear(x: Tensor, weight: Tensor, bias: Tensor, wanted: Tensor, *, is_silu: bool) -> Tensor:
    """activation(x W^T + b), float [T, N] in the precision of the weight: right in wanted rows, undefined in others.

    On a GPU tiles without a wanted row stay unwritten: what memory held before, NaN too, stands there. Rows do not
    mix, so that a layer on top may take them as they are under the same mask; anything else must choose the wanted
    ones, and by ``torch.where``, since a product with zero would let NaN through.

    Args:
        x: Float [T, K], contiguous; of rows that are not wanted it may hold anything.
        weight: Float [N, K], contiguous, like x.
        bias: Float [N].
        wanted: BOOL [T], contiguous: which rows somebody reads.
        is_silu: Whether the activation is SiLU, or none.
    """
    if not use_triton(x):
        return library_silu(x, weight, bias) if is_silu else F.linear(x, weight, bias)
    from mtgr.kernels.triton_linear import has_descriptors, linear_launch

    out = torch.empty(x.shape[0], weight.shape[0], dtype=weight.dtype, device=x.device)
    if x.shape[0]:
        tile = HOPPER_TILE if has_descriptors(x.device) else AMPERE_TILE
        linear_launch(x, weight, bias, out, is_silu=is_silu, tile=tile, wanted=wanted).run()
    return out
