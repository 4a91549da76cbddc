"""Which implementation serves a tensor, and what the GPU that it lies on is capable of."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels serve ``tensor``: on a GPU, or under Triton's interpreter (TRITON_INTERPRET=1)."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def capability_of(device: torch.device) -> int:
    """Compute capability times ten; 0 without one."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
