"""GroupLN: layer normalisation with one gain and bias per token type (MTGR, arXiv 2505.18654, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtgr.schema import TokenType


class GroupLayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + epsilon) * gain[type] + bias[type].

    Tokens of different segments live in different semantic spaces; a gain and bias of their own lets one attention
    treat them alike. Statistics are taken in fp32 whatever the model's precision.
    """

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.width = width
        self.epsilon = epsilon
        self.gain = nn.Parameter(torch.ones(len(TokenType), width))
        self.bias = nn.Parameter(torch.zeros(len(TokenType), width))

    def forward(self, x: Tensor, types: Tensor) -> Tensor:
        """Normalise over the last dimension.

        Args:
            x: Float [..., width].
            types: INT [...], token types.

        Returns:
            Like ``x`` in shape, in the precision of the parameters.
        """
        normal = F.layer_norm(x.float(), (self.width,), eps=self.epsilon)
        return normal.to(self.gain.dtype) * F.embedding(types, self.gain) + F.embedding(types, self.bias)
