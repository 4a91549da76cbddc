"""GroupLN over the tokens of a step, fused on a GPU (MTGR, arXiv 2505.18654, section 3).

y = (x - mean(x)) / sqrt(var(x) + epsilon) * gain[type] + bias[type]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.kernels.dispatch import use_triton


def group_norm(x: Tensor, types: Tensor, gain: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Normalise each row, with the gain and bias of its type.

    Statistics are taken in FP32. On a GPU gain and bias are applied in FP32 too and the result is rounded once; on the
    CPU the equation is that of ``mtgr.model.norm.GroupLayerNorm``, bit by bit.

    Args:
        x: Float [T, d], rows contiguous, d at most 8192 on a GPU.
        types: INT32 [T], any stride: token types, each a row of ``gain``.
        gain: Float [number of types, d], rows contiguous.
        bias: Float [number of types, d], likewise.
        epsilon: Added to the variance.

    Returns:
        [T, d] in the precision of ``gain``.
    """
    if use_triton(x):
        return _fused(x, types, gain, bias, epsilon, None)
    normal = F.layer_norm(x.float(), (x.shape[-1],), eps=epsilon)
    return normal.to(gain.dtype) * F.embedding(types, gain) + F.embedding(types, bias)


def gated_group_norm(x: Tensor, types: Tensor, gain: Tensor, bias: Tensor, epsilon: float, gate: Tensor) -> Tensor:
    """``group_norm`` times ``gate``, float [T, d] with contiguous rows: what an HSTU block projects back.

    Other arguments and the result are as in ``group_norm``.
    """
    if use_triton(x):
        return _fused(x, types, gain, bias, epsilon, gate)
    return group_norm(x, types, gain, bias, epsilon) * gate


def _fused(x: Tensor, types: Tensor, gain: Tensor, bias: Tensor, epsilon: float, gate: Tensor | None) -> Tensor:
    from mtgr.kernels.triton_norm import group_norm_launch

    out = torch.empty(x.shape, dtype=gain.dtype, device=x.device)
    if x.shape[0]:
        group_norm_launch(x, types, gain, bias, epsilon, gate, out).run()
    return out
