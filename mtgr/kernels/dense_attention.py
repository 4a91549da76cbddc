"""SiLU attention of HSTU over whole sequences, without a cache.

    out[i] = ( sum_{j < seen(i)} silu(q_i . k_j * scale + bias[i, j]) v_j
               + [i is a candidate] silu(q_i . k_i * scale + bias[i, i]) v_i ) / N

HSTU: arXiv 2402.17152, equation 2, whose bias is optional; who sees whom: ``mtgr.kernels.dense_segments``. Sums are
taken in FP32 and divided by N there. Sequences are padded or follow on each other; either way the work is that of the
tokens that are there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.errors import ConfigurationError
from mtgr.kernels.dense_bias import DenseBias
from mtgr.kernels.dense_configs import DenseConfig, DenseKey, choose, length_class, plain_config
from mtgr.kernels.dense_fp8 import QuantisedHeads
from mtgr.kernels.dense_segments import Segments
from mtgr.kernels.dispatch import capability_of, use_triton
from mtgr.kernels.launch import Launch, is_aligned


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    segments: Segments,
    *,
    scale: float,
    norm_length: int,
    quantised: QuantisedHeads | None = None,
    bias: DenseBias | None = None,
    config: DenseConfig | None = None,
) -> Tensor:
    """Attend for all tokens of a batch.

    On a GPU nothing here waits for it and launches depend on shapes only, so that a graph can capture it.

    Args:
        q: Float [T, H, D], any strides with the last dimension contiguous, like ``k`` and ``v``; rows without a token
            must hold finite numbers.
        k: Float [T, H, D].
        v: Float [T, H, D].
        out: Float [T', H, D], last dimension contiguous. Rows of padding become 0, rows of no sequence stay.
        segments: Whose token each row is.
        scale: Factor of the dot products.
        norm_length: The constant N.
        quantised: FP8 operands, made from q, k and v; what is computed with if given.
        bias: Relative bias, in FP32, the same for all heads; not with FP8 operands.
        config: How to compute it; what was found fastest by default.

    Returns:
        ``out``.

    Raises:
        ConfigurationError: If a last dimension is not contiguous, or both FP8 operands and a bias are given.
    """
    if quantised is not None and bias is not None:
        raise ConfigurationError(
            "dense attention: FP8 operands take no relative bias; give q, k and v in FP16 or BF16."
        )
    if any(x.stride(-1) != 1 for x in (q, k, v, out)):
        raise ConfigurationError("dense attention: the last dimension of every tensor must be contiguous.")
    if not use_triton(out):
        return dense_attention_reference(
            q, k, v, out, segments, scale=scale, norm_length=norm_length, quantised=quantised, bias=bias
        )
    if out.numel() and segments.sequences.numel():
        launch_of(
            q, k, v, out, segments, scale=scale, norm_length=norm_length, quantised=quantised, bias=bias, config=config
        ).run()
    return out


def launch_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    segments: Segments,
    *,
    scale: float,
    norm_length: int,
    quantised: QuantisedHeads | None = None,
    bias: DenseBias | None = None,
    config: DenseConfig | None = None,
) -> Launch:
    """The launch of ``dense_attention``, to be run or only compiled."""
    key = DenseKey(
        out.shape[2],
        torch.float8_e4m3fn if quantised else q.dtype,
        capability_of(out.device),
        length_class(segments.max_context),
        bias is not None,
    )
    if config is None or (bias is not None and config.variant == "specialised"):
        config = choose(key)
    if quantised is not None:
        q, k, v, segments = quantised.q, quantised.k, quantised.v, _with_outputs(quantised.segments, segments)
    elif config.variant != "pointers" and not is_aligned(q, k, v):
        config = plain_config(key)
    if config.variant == "specialised":
        from mtgr.kernels.gluon_dense import specialised_launch

        return specialised_launch(
            q, k, v, out, segments, scale=scale, norm_length=norm_length, config=config, quantised=quantised
        )
    from mtgr.kernels.triton_dense import dense_launch

    return dense_launch(
        q, k, v, out, segments, scale=scale, norm_length=norm_length, config=config, quantised=quantised, bias=bias
    )


def dense_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    segments: Segments,
    *,
    scale: float,
    norm_length: int,
    quantised: QuantisedHeads | None = None,
    bias: DenseBias | None = None,
) -> Tensor:
    """``dense_attention`` in PyTorch and FP32: what serves on the CPU, and what kernels are compared with."""
    if quantised is not None:
        from mtgr.kernels.dense_fp8 import dequantise

        q, k, v = dequantise(quantised)
        segments = _with_outputs(quantised.segments, segments)
    for static, n, c, row, c_row, to, c_to in segments.sequences.tolist():
        keys, values = (x[row : row + n].transpose(0, 1).float() for x in (k, v))
        queries = q[row : row + n].transpose(0, 1).float() * scale
        tokens = torch.arange(n, device=q.device)
        visible = tokens < torch.clamp(tokens + 1, min=min(static, n))[:, None]
        logits = queries @ keys.transpose(1, 2)
        if bias is not None and n:
            logits += bias.tile(tokens, row, row, n)
        weights = F.silu(logits) * visible
        out[to : to + max(n, segments.padded_context)] = 0
        out[to : to + n] = (weights @ values).div_(norm_length).transpose(0, 1)
        own = [x[c_row : c_row + c].transpose(0, 1).float() for x in (q, k, v)]
        logits = own[0] * scale @ keys.transpose(1, 2)
        own_logits = (own[0] * own[1]).sum(dim=-1, keepdim=True) * scale
        if bias is not None and n and c:
            logits += bias.tile(tokens.new_full((c,), n), c_row, row, n)
        if bias is not None:
            own_logits += bias.own()
        attended = F.silu(logits) @ values
        attended += F.silu(own_logits) * own[2]
        out[c_to : c_to + max(c, segments.padded_candidates)] = 0
        out[c_to : c_to + c] = attended.div_(norm_length).transpose(0, 1)
    return out


def _with_outputs(rows: Segments, outputs: Segments) -> Segments:
    """The rows of q, k and v of one, those of the output and the padding of the other."""
    return Segments(
        torch.cat([rows.sequences[:, :5], outputs.sequences[:, 5:]], dim=1),
        outputs.max_context,
        outputs.max_candidates,
        outputs.padded_context,
        outputs.padded_candidates,
    )
