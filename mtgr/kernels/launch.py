"""A Triton kernel with all it is launched with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel's launch, to be run or only to be compiled.

    Attributes:
        kernel: Function under ``triton.jit``.
        grid: Programs along each axis.
        arguments: What changes from launch to launch: tensors and numbers, in order.
        options: What is compiled in, by name, and the number of warps and pipeline stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        """Launch on the current stream."""
        self.kernel[self.grid](*self.arguments, **self.options)

    def compile(self) -> Any:
        """What ``run`` would launch, compiled now unless it was before."""
        return self.kernel.warmup(*self.arguments, grid=self.grid, **self.options)


def is_aligned(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can copy tiles: rows and heads begin at multiples of 16 bytes."""
    return all(
        x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:-1]) for x in tensors
    )
