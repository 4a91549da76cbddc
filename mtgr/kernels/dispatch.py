"""Which implementation serves a tensor."""

from __future__ import annotations

import os

from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels serve ``tensor``: on a GPU, or under Triton's interpreter (TRITON_INTERPRET=1)."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
