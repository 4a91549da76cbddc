"""What a request must cost at least: operations and bytes, and the time that they take on a GPU at its best."""

from __future__ import annotations

from dataclasses import dataclass

from mtgr.config import ModelConfig


@dataclass(frozen=True)
class Accelerator:
    """Peak rates of a GPU, as its maker states them.

    Attributes:
        name: Its name.
        flops: Operations a second in bf16, dense, fp32 accumulation.
        bandwidth: Bytes a second of its memory.
        fp8_flops: Operations a second in FP8, dense.
    """

    name: str
    flops: float
    bandwidth: float
    fp8_flops: float


# NVIDIA H200 Tensor Core GPU datasheet, SXM: 1,979 TFLOPS bf16 and 3,958 FP8 with sparsity, half of it dense; 4.8 TB/s.
H200 = Accelerator("H200", 989e12, 4.8e12, 1979e12)


_NUMBER_BYTES = 2  # of a weight, a key, or a value, where it is not FP8


@dataclass(frozen=True)
class Floor:
    """Least cost of one request computed alone.

    Attributes:
        flops: Multiplications and additions of the blocks.
        bytes: Weights read once, cached keys and values read, new ones written.
        milliseconds: The longer of the two on the accelerator.
    """

    flops: float
    bytes: float
    milliseconds: float


def floor(
    config: ModelConfig, context: int, candidates: int, cached: int = 0, gpu: Accelerator = H200, is_fp8: bool = False
) -> Floor:
    """The floor of ranking.

    Args:
        config: The network.
        context: Tokens of the context, all static.
        candidates: Candidates.
        cached: Leading context tokens whose keys and values are there.
        gpu: Peak rates.
        is_fp8: Whether the blocks' linear layers are in FP8; attention, and what it keeps, are in 16 bits all the same.
    """
    width = config.num_heads * config.dqk
    new = context - cached
    # Every new context token sees the whole context, a candidate the context and itself.
    seen = new * context + candidates * (context + 1)
    linear = 2.0 * config.block_parameters * (new + candidates)
    attention = 4.0 * width * seen * config.num_layers
    cache = 2.0 * width * config.num_layers * _NUMBER_BYTES
    moved = config.block_parameters * (1 if is_fp8 else _NUMBER_BYTES) + cache * (cached + new)
    computing = linear / (gpu.fp8_flops if is_fp8 else gpu.flops) + attention / gpu.flops
    return Floor(linear + attention, moved, 1e3 * max(computing, moved / gpu.bandwidth))
