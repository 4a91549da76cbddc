"""GroupLN over the tokens of a step, fused on a GPU (MTGR, arXiv 2505.18654, section 3).

y = (x - mean(x)) / sqrt(var(x) + epsilon) * gain[type] + bias[type]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.kernels.dispatch import use_triton
from mtgr.kernels.linear import QuantisedRows, empty_rows, quantise_rows


def group_norm(
    x: Tensor, types: Tensor, gain: Tensor, bias: Tensor, epsilon: float, shift: Tensor | None = None
) -> Tensor:
    """Normalise each row, with the gain and bias of its type.

    Statistics are taken in FP32. On a GPU gain and bias are applied in FP32 too and the result is rounded once; on the
    CPU the equation is that of ``mtgr.model.norm.GroupLayerNorm``, bit by bit.

    Args:
        x: Float [T, d], rows contiguous, d at most 8192 on a GPU.
        types: INT32 [T], any stride: token types, each a row of ``gain``.
        gain: Float [number of types, d], rows contiguous.
        bias: Float [number of types, d], likewise.
        epsilon: Added to the variance.
        shift: FP32 [d], contiguous, what is normalised being x + shift; None for nothing.

    Returns:
        [T, d] in the precision of ``gain``.
    """
    if use_triton(x):
        return _fused(x, types, gain, bias, epsilon, None, shift)
    wide = x.float() if shift is None else x.float() + shift
    normal = F.layer_norm(wide, (x.shape[-1],), eps=epsilon)
    return normal.to(gain.dtype) * F.embedding(types, gain) + F.embedding(types, bias)


def residual_group_norm(
    x: Tensor, update: Tensor | None, types: Tensor, gain: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The residual stream with what a block adds to it, and ``group_norm`` of that; one kernel on a GPU.

    Args:
        x: Float [T, d], rows contiguous, d at most 8192 on a GPU: the residual stream.
        update: [T, d] in the precision of ``x``, rows contiguous; None for nothing.
        types: As in ``group_norm``.
        gain: As in ``group_norm``.
        bias: As in ``group_norm``.
        epsilon: As in ``group_norm``.

    Returns:
        x + update, [T, d] rounded to the precision of ``x`` as PyTorch does, or without an update ``x`` itself; and
        that normalised, [T, d] in the precision of ``gain``.
    """
    if update is None:
        return x, group_norm(x, types, gain, bias, epsilon)
    if not use_triton(x):
        total = x + update
        return total, group_norm(total, types, gain, bias, epsilon)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return total, _fused(x, types, gain, bias, epsilon, None, None, update=update, total=total)


def gated_group_norm(
    x: Tensor,
    types: Tensor,
    gain: Tensor,
    bias: Tensor,
    epsilon: float,
    gate: Tensor,
    *,
    activates: bool = False,
) -> Tensor:
    """``group_norm`` times ``gate``, float [T, d] with contiguous rows: what an HSTU block projects back.

    Other arguments and the result are as in ``group_norm``. ``activates`` puts the gate through SiLU first.
    """
    if use_triton(x):
        return _fused(x, types, gain, bias, epsilon, gate, None, activates)
    return group_norm(x, types, gain, bias, epsilon) * (F.silu(gate) if activates else gate)


def fp8_group_norm(
    x: Tensor,
    types: Tensor,
    gain: Tensor,
    bias: Tensor,
    epsilon: float,
    gate: Tensor | None = None,
    *,
    by_row: bool = False,
    activates: bool = False,
) -> QuantisedRows:
    """``group_norm``, or ``gated_group_norm`` with a gate, rounded to FP8 for ``mtgr.kernels.linear.fp8_linear``.

    On a GPU the result is rounded once, on the CPU first to the precision of ``gain``. ``by_row`` gives each row one
    scale, as ``QuantisedWeight.by_row`` wants it.
    """
    if use_triton(x):
        return _fused_fp8(x, types, gain, bias, epsilon, gate, by_row, activates)
    if gate is None:
        return quantise_rows(group_norm(x, types, gain, bias, epsilon), by_row=by_row)
    gated = gated_group_norm(x, types, gain, bias, epsilon, gate, activates=activates)
    return quantise_rows(gated, by_row=by_row)


def fp8_residual_group_norm(
    x: Tensor,
    update: Tensor | None,
    types: Tensor,
    gain: Tensor,
    bias: Tensor,
    epsilon: float,
    *,
    by_row: bool = False,
) -> tuple[Tensor, QuantisedRows]:
    """``residual_group_norm``, what it normalised rounded to FP8 as ``fp8_group_norm`` does; the sum is as there."""
    if update is None:
        return x, fp8_group_norm(x, types, gain, bias, epsilon, by_row=by_row)
    if not use_triton(x):
        total = x + update
        return total, fp8_group_norm(total, types, gain, bias, epsilon, by_row=by_row)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return total, _fused_fp8(x, types, gain, bias, epsilon, None, by_row, update=update, total=total)


def _fused(
    x: Tensor,
    types: Tensor,
    gain: Tensor,
    bias: Tensor,
    epsilon: float,
    gate: Tensor | None,
    shift: Tensor | None,
    activates: bool = False,
    update: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    from mtgr.kernels.triton_norm import group_norm_launch

    out = torch.empty(x.shape, dtype=gain.dtype, device=x.device)
    if x.shape[0]:
        group_norm_launch(
            x, types, gain, bias, epsilon, gate, out, shift, activates=activates, update=update, total=total
        ).run()
    return out


def _fused_fp8(
    x: Tensor,
    types: Tensor,
    gain: Tensor,
    bias: Tensor,
    epsilon: float,
    gate: Tensor | None,
    by_row: bool,
    activates: bool = False,
    update: Tensor | None = None,
    total: Tensor | None = None,
) -> QuantisedRows:
    from mtgr.kernels.triton_norm import group_norm_launch

    made = empty_rows(x.shape[0], x.shape[1], x.device, by_row=by_row)
    if x.shape[0]:
        group_norm_launch(
            x,
            types,
            gain,
            bias,
            epsilon,
            gate,
            made.data,
            scales=made.scales,
            by_row=by_row,
            activates=activates,
            update=update,
            total=total,
        ).run()
    return made
