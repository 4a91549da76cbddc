"""A layer norm that is the same for tokens of all types: what HSTU has, and MTGR without GroupLN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtgr.model.norm import GroupLayerNorm


class SharedLayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + epsilon) * gain + bias; takes what ``GroupLayerNorm`` takes."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.width = width
        self.epsilon = epsilon
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, types: Tensor) -> Tensor:
        """Normalise float [..., width] over its last dimension, whatever the INT [...] ``types``."""
        normal = F.layer_norm(x.float(), (self.width,), eps=self.epsilon)
        return normal.to(self.gain.dtype) * self.gain + self.bias


def share_norms(model: nn.Module) -> None:
    """Replace every GroupLN in ``model`` by one norm for all types, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, GroupLayerNorm):
                setattr(module, name, SharedLayerNorm(child.width, child.epsilon))
