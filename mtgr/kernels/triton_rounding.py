# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped, no-any-return"
"""Rounding to half precision inside kernels, where Triton's interpreter does not."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, dtype: tl.constexpr, interpreted: tl.constexpr):
    """FP32 rounded to the nearest of ``dtype``, ties to even: Triton's interpreter cuts BF16's digits off instead."""
    if interpreted and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + (0x7FFF + ((bits >> 16) & 1))) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)
