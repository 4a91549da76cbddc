"""GroupLN over heads of which each rank has some (MTGR, arXiv 2505.18654, section 3).

y = (x - mean(x)) / sqrt(var(x) + epsilon) * gain[type] + bias[type], times a gate, over all heads of a token

A rank finds the mean of its own columns and the squares of their distances from it, and the ranks' are put together
exactly (Chan, Golub and LeVeque, 1979):

    mean = avg(mean_r)    var = avg(var_r) + avg((mean_r - mean) ** 2)

The shorter way, sums of x and of x ** 2 and the difference of their means, loses all digits of a variance that is small
beside the mean's square, and attention's outputs, divided by N, have such rows. What the ranks exchange are two numbers
each a token: every rank adds its own into zeros, which a sum over ranks leaves exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.kernels.dispatch import use_triton
from mtgr.kernels.linear import QuantisedRows, empty_rows, quantise_rows
from mtgr.vllm_plugin.parallel import Ranks


def split_group_norm(
    x: Tensor,
    types: Tensor,
    gain: Tensor,
    bias: Tensor,
    epsilon: float,
    gate: Tensor,
    ranks: Ranks,
    *,
    activates: bool = False,
) -> Tensor:
    """Normalise each row over the columns of all ranks, with the gain and bias of its type, and gate it.

    Statistics are taken in FP32. On a GPU the result is rounded once, on the CPU after each of the three steps.

    Args:
        x: Float [T, w], contiguous, the columns of this rank; as many on every rank.
        types: INT32 [T], any stride.
        gain: Float [number of types, w], rows contiguous, this rank's.
        bias: Float [number of types, w], likewise.
        epsilon: Added to the variance.
        gate: Float [T, w] with contiguous rows, this rank's.
        ranks: Those that share the row. All of them must call this.
        activates: Whether the gate goes through SiLU first.

    Returns:
        [T, w] in the precision of ``gain``.
    """
    statistics = ranks.all_reduce(own_statistics(x, ranks))
    if use_triton(x):
        from mtgr.vllm_plugin.triton_split_norm import apply_launch

        out = torch.empty(x.shape, dtype=gain.dtype, device=x.device)
        if x.shape[0]:
            apply_launch(x, statistics, types, gain, bias, epsilon, gate, out, activates=activates).run()
        return out
    return _applied(x, statistics, types, gain, bias, epsilon) * (F.silu(gate) if activates else gate)


def fp8_split_group_norm(
    x: Tensor,
    types: Tensor,
    gain: Tensor,
    bias: Tensor,
    epsilon: float,
    gate: Tensor,
    ranks: Ranks,
    *,
    activates: bool = False,
) -> QuantisedRows:
    """``split_group_norm`` rounded to FP8 for ``mtgr.kernels.linear.fp8_linear``, a scale for 128 columns of a rank.

    Where a rank's width is a multiple of 128 these are the scales of the whole row, or else it has others of its own.
    """
    if not use_triton(x):
        return quantise_rows(split_group_norm(x, types, gain, bias, epsilon, gate, ranks, activates=activates))
    from mtgr.vllm_plugin.triton_split_norm import apply_launch

    statistics = ranks.all_reduce(own_statistics(x, ranks))
    made = empty_rows(x.shape[0], x.shape[1], x.device)
    if x.shape[0]:
        apply_launch(x, statistics, types, gain, bias, epsilon, gate, made.data, made.scales, activates=activates).run()
    return made


def own_statistics(x: Tensor, ranks: Ranks) -> Tensor:
    """Mean and variance of the rows of this rank, FP32 [T, R, 2]; zeros in the places of other ranks.

    Args:
        x: Float [T, w], contiguous.
        ranks: Those that share the row.
    """
    if use_triton(x):
        from mtgr.vllm_plugin.triton_split_norm import statistics_launch

        out = torch.empty(x.shape[0], ranks.size, 2, dtype=torch.float32, device=x.device)
        if x.shape[0]:
            statistics_launch(x, ranks.rank, out).run()
        return out
    out = torch.zeros(x.shape[0], ranks.size, 2, dtype=torch.float32, device=x.device)
    variance, mean = torch.var_mean(x.float(), dim=1, correction=0)
    out[:, ranks.rank] = torch.stack([mean, variance], dim=1)
    return out


def _applied(x: Tensor, statistics: Tensor, types: Tensor, gain: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    means, variances = statistics.unbind(dim=2)
    mean = means.mean(dim=1, keepdim=True)
    variance = (variances + (means - mean).square()).mean(dim=1, keepdim=True)
    normal = (x.float() - mean) / (variance + epsilon).sqrt()
    return normal.to(gain.dtype) * F.embedding(types, gain) + F.embedding(types, bias)
