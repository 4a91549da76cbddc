"""A Triton kernel with all it is launched with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
