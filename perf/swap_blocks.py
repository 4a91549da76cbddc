"""The operator by which vLLM copies pages to the host and back, where vLLM was unpacked without compiled operators.

A wheel that has to fit a small transfer is left without them; the host offload of pages is all that misses one.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

_NAMESPACE, _NAME = "_C_cache_ops", "swap_blocks_batch"
_ANY_DIRECTION = 4  # cudaMemcpyDefault

# Destination, source, bytes.
Copy = Callable[[int, int, int], None]


def serve_swap_blocks(copy: Copy | None = None) -> torch.library.Library | None:
    """Register the operator if it is missing.

    Args:
        copy: Copies between addresses; CUDA's, on the current stream, by default.

    Returns:
        What the operator lives as long as; None if vLLM has its own.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("vllm._custom_ops")  # which registers its own
    if hasattr(getattr(torch.ops, _NAMESPACE), _NAME):
        return None
    copied = _cuda_copy() if copy is None else copy

    def swap_blocks_batch(sources: Tensor, targets: Tensor, sizes: Tensor, *unused: bool, **also: bool) -> None:
        for source, target, size in zip(sources.tolist(), targets.tolist(), sizes.tolist(), strict=True):
            copied(target, source, size)

    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    arguments = "Tensor src_ptrs, Tensor dst_ptrs, Tensor sizes, bool is_src_access_order_any=False"
    library.define(f"{_NAME}({arguments}) -> ()")
    library.impl(_NAME, swap_blocks_batch, "CPU")  # the addresses stand in tensors of the host
    return library


def _cuda_copy() -> Copy:
    runtime = ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}")
    runtime.cudaMemcpyAsync.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
    ]

    def copy(target: int, source: int, size: int) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        status = runtime.cudaMemcpyAsync(target, source, size, _ANY_DIRECTION, stream)
        if status:
            raise RuntimeError(f"cudaMemcpyAsync of {size} bytes: error {status}")

    return copy
