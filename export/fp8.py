"""What FP8 costs in plain PyTorch: the yardstick of the ``compiled`` engine's FP8."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtgr.model import MTGR

_BLOCK = 128
_LARGEST = 448.0


class RoundedLinear(nn.Module):
    """A linear layer whose operands pass through e4m3: a scale for 128 numbers of a row, and for 128 x 128 of a weight.

    Args:
        layer: What is rounded, in any precision.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.bias = layer.bias
        self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        for rows in self.weight.data.split(_BLOCK):
            for block in rows.split(_BLOCK, dim=1):
                block.copy_(_rounded(block.float(), block.float().abs().max()))

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., N] of [..., K]."""
        parts = [_rounded(part, part.abs().amax(dim=-1, keepdim=True)) for part in x.float().split(_BLOCK, dim=-1)]
        return F.linear(torch.cat(parts, dim=-1).to(x.dtype), self.weight, self.bias)


def fp8_in_pytorch(model: MTGR, *, spares_last: bool = False) -> MTGR:
    """A copy of a network in which the linear layers of blocks round to FP8.

    Args:
        model: The network.
        spares_last: Whether the last block stays as it is, which is what the ``compiled`` engine does.
    """
    twin = copy.deepcopy(model)
    for block in twin.blocks[:-1] if spares_last else twin.blocks:
        block.uvqk, block.output = RoundedLinear(block.uvqk), RoundedLinear(block.output)
    return twin


def _rounded(x: Tensor, largest: Tensor) -> Tensor:
    scale = largest.clamp(min=1e-12) / _LARGEST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale
