"""How a TensorRT plan is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from export.tensorrt_profiles import MAX_BATCH
from mtgr.errors import ConfigurationError
from mtgr.routing.buckets import CONTEXT_BUCKETS

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Hardware = Literal["ampere_plus", "same_compute_capability"]


@dataclass(frozen=True)
class BuildOptions:
    """How a plan is built.

    Attributes:
        max_context: Tokens of the longest context.
        max_batch: The config's ``max_batch_size``.
        split: Whether batch 1 has an optimization profile of its own.
        workspace_gib: GPU memory that the builder's layers may use, in GiB.
        optimization_level: 0 (quick to build) to 5 (quick to run).
        hardware: GPUs other than this one that the plan shall run on; None for this one only.
        version_compatible: Whether later TensorRT versions may load the plan; costs some speed.
        tf32: Whether fp32 products may round to TF32; off, as parity asks for.
        blas: Whether 8.6 may use cuBLAS and cuDNN.
        free: Whether 8.6 may compute any layer of an fp16 or INT8 plan in 16 bits, whatever the graph says; an fp16
            plan is then built of the graph in fp32. Parity decides whether such a plan is good enough.
        timing_cache: File that keeps the timings of kernels from build to build; None for no such file.
    """

    max_context: int = CONTEXT_BUCKETS[-1]
    max_batch: int = MAX_BATCH
    split: bool = True
    workspace_gib: float = 8.0
    optimization_level: int = 3
    hardware: Hardware | None = None
    version_compatible: bool = False
    tf32: bool = False
    blas: bool = True
    free: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.optimization_level <= 5:
            raise ConfigurationError(f"optimization_level is {self.optimization_level}; it must be 0 to 5.")
        if self.workspace_gib <= 0:
            raise ConfigurationError(f"workspace_gib is {self.workspace_gib}; it must be positive.")
        if self.hardware is not None and self.hardware not in get_args(Hardware):
            raise ConfigurationError(f"hardware is {self.hardware}; it must be one of {', '.join(get_args(Hardware))}.")
