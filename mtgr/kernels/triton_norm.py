# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, no-any-return"
"""GroupLN in Triton's language: one program a token, one pass over its row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mtgr.kernels.dense_fp8 import LARGEST
from mtgr.kernels.launch import Launch
from mtgr.kernels.linear import BLOCK
from mtgr.kernels.triton_fp8 import to_e4m3
from mtgr.kernels.triton_rounding import rounded

_BLOCK = tl.constexpr(BLOCK)
_LARGEST = tl.constexpr(LARGEST)
_ELEMENTS_PER_WARP = 512


@triton.jit(do_not_specialize=["epsilon"], do_not_specialize_on_alignment=["types"])
def group_norm_kernel(
    x,
    types,
    gain,
    bias,
    gate,
    out,
    shift,
    update,
    total,
    scales,
    epsilon,
    stride_types,
    stride_x,
    stride_update,
    stride_total,
    stride_gain,
    stride_bias,
    stride_gate,
    stride_out,
    stride_scales,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    is_gated: tl.constexpr,
    activates: tl.constexpr,
    is_shifted: tl.constexpr,
    is_residual: tl.constexpr,
    is_fp8: tl.constexpr,
    by_row: tl.constexpr,
    interpreted: tl.constexpr,
):
    """Normalise a row around its own mean, apply the gain and bias of its type and the gate, round once.

    In FP8 each block of numbers gets a scale, or the whole row one, and the row's last block is filled up with zeros.
    As a residual, x + update is rounded to the precision of ``total``, stored there and normalised.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, padded_width)
    inside = columns < width
    row = tl.load(x + token * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    if is_residual:
        row += tl.load(update + token * stride_update + columns, mask=inside, other=0.0).to(tl.float32)
        stream = rounded(row, total.dtype.element_ty, interpreted)
        row = stream.to(tl.float32)
    if is_shifted:
        row += tl.load(shift + columns, mask=inside, other=0.0)
    kind = tl.load(types + token * stride_types).to(tl.int64)
    mean = tl.sum(row, axis=0) / width
    centred = tl.where(inside, row - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    if is_residual:
        # Not before the statistics: there a thread would have to put numbers outside its registers.
        tl.store(total + token * stride_total + columns, stream, mask=inside)
    # One division a row: each is several instructions, also where its approximate inverse is shared.
    normal = centred * (1.0 / tl.sqrt_rn(variance + epsilon))
    result = normal * tl.load(gain + kind * stride_gain + columns, mask=inside, other=0.0).to(tl.float32)
    result += tl.load(bias + kind * stride_bias + columns, mask=inside, other=0.0).to(tl.float32)
    if is_gated:
        factor = tl.load(gate + token * stride_gate + columns, mask=inside, other=0.0).to(tl.float32)
        result *= factor * tl.sigmoid(factor) if activates else factor
    if is_fp8:
        result = tl.reshape(tl.where(inside, result, 0.0), [padded_width // _BLOCK, _BLOCK])
        scale = tl.maximum(tl.max(tl.abs(result), axis=1), 1e-12) / _LARGEST
        blocks = tl.arange(0, padded_width // _BLOCK)
        present = blocks * _BLOCK < width
        if by_row:
            largest = tl.max(scale, axis=0)
            scale = tl.zeros_like(scale) + largest
            tl.store(scales + token * stride_scales, largest)
        else:
            tl.store(scales + token * stride_scales + blocks, scale, mask=present)
        place = blocks[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        # The largest number may come out just above 448, which rounds to 448.
        small = to_e4m3(result * (1.0 / scale)[:, None], interpreted)
        tl.store(out + token * stride_out + place, small, mask=present[:, None])
    else:
        tl.store(out + token * stride_out + columns, result.to(out.dtype.element_ty), mask=inside)


def group_norm_launch(
    x: Tensor,
    types: Tensor,
    gain: Tensor,
    bias: Tensor,
    epsilon: float,
    gate: Tensor | None,
    out: Tensor,
    shift: Tensor | None = None,
    scales: Tensor | None = None,
    by_row: bool = False,
    activates: bool = False,
    update: Tensor | None = None,
    total: Tensor | None = None,
) -> Launch:
    """The launch that makes ``out``, [T, d], of ``mtgr.kernels.norm.group_norm``, times ``gate`` if there is one.

    With ``scales`` it is that of ``fp8_group_norm``. With ``update`` it makes ``total`` too, both like ``x``, as
    ``residual_group_norm`` does.
    """
    num_tokens, width = x.shape
    padded_width = triton.next_power_of_2(width)
    if scales is not None:
        padded_width = max(padded_width, BLOCK)
    return Launch(
        kernel=group_norm_kernel,
        grid=(num_tokens,),
        arguments=(
            x,
            types,
            gain,
            bias,
            gate,
            out,
            shift,
            update,
            total,
            scales,
            epsilon,
            types.stride(0),
            x.stride(0),
            0 if update is None else update.stride(0),
            0 if total is None else total.stride(0),
            gain.stride(0),
            bias.stride(0),
            0 if gate is None else gate.stride(0),
            out.stride(0),
            0 if scales is None else scales.stride(0),
        ),
        options={
            "width": width,
            "padded_width": padded_width,
            "is_gated": gate is not None,
            "activates": activates,
            "is_shifted": shift is not None,
            "is_residual": update is not None,
            "is_fp8": scales is not None,
            "by_row": by_row,
            "interpreted": triton.knobs.runtime.interpret,
            "num_warps": min(16, max(1, padded_width // _ELEMENTS_PER_WARP)),
        },
    )
