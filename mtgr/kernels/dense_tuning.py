"""Compile and measure dense attention before the first request."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mtgr.errors import ConfigurationError
from mtgr.kernels.bias import LOG_STEP
from mtgr.kernels.compilation import parallel_compilation
from mtgr.kernels.dense_attention import launch_of
from mtgr.kernels.dense_bias import DenseBias
from mtgr.kernels.dense_configs import DenseConfig, DenseKey, candidates, choose, length_class, remember
from mtgr.kernels.dense_fp8 import QuantisedHeads, quantise
from mtgr.kernels.dense_segments import padded_segments
from mtgr.kernels.dispatch import capability_of
from mtgr.kernels.launch import Launch
from mtgr.kernels.timing import graph_milliseconds
from mtgr.schema import TokenType

_REALTIME = 100

# Buckets of time, as checkpoints have them, and seconds that a user's tokens are apart at most.
_BUCKETS = 64
_SECONDS = 15_000_000


def warm_up_dense(
    num_heads: int,
    head_size: int,
    dtype: torch.dtype,
    *,
    batch: int,
    context: int,
    num_candidates: int,
    is_fp8: bool = False,
    has_bias: bool = False,
    device: torch.device | str = "cuda",
    measure: bool = True,
) -> DenseConfig | None:
    """Compile ``dense_attention`` for a shape's class and find the fastest configuration.

    Args:
        num_heads: Heads, H.
        head_size: Width of a head, D.
        dtype: Precision of q, k and v before any rounding to FP8.
        batch: Sequences.
        context: Padded context, in tokens.
        num_candidates: Padded candidates; 0 for none.
        is_fp8: Whether FP8 operands will be given.
        has_bias: Whether a relative bias will be.
        device: Where it will run.
        measure: False compiles what would be chosen without measuring.

    Returns:
        What is chosen from now on for the shape's class; None without a GPU.

    Raises:
        ConfigurationError: If no configuration runs on this GPU.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        make = made_up(num_heads, head_size, dtype, batch, context, num_candidates, is_fp8, device, has_bias)
        operands = torch.float8_e4m3fn if is_fp8 else dtype
        key = DenseKey(head_size, operands, capability_of(device), length_class(context), has_bias)
        configs = candidates(key) if measure else [choose(key)]
        with parallel_compilation():
            for config in configs:
                make(config).compile()
        times = {config: graph_milliseconds(make(config).run) for config in configs}
    best = min(times, key=times.__getitem__)
    if times[best] == float("inf"):
        raise ConfigurationError(
            f"dense attention does not run on {torch.cuda.get_device_name(device)} with heads of {head_size} in "
            f"{operands}; choose another precision."
        )
    if measure:
        remember(key, best)
    return best


def made_up(
    num_heads: int,
    head_size: int,
    dtype: torch.dtype,
    batch: int,
    context: int,
    num_candidates: int,
    is_fp8: bool,
    device: torch.device,
    has_bias: bool = False,
) -> Callable[[DenseConfig], Launch]:
    """Launches on random full sequences that lie in memory as a block's do: columns of one projection."""
    width = num_heads * head_size
    tokens = batch * (context + num_candidates)
    merged = torch.randn(tokens, 4 * width, device=device).to(dtype)
    _, v, q, k = (part.unflatten(-1, (num_heads, head_size)) for part in merged.split(width, dim=-1))
    types = torch.full((batch, context + num_candidates), int(TokenType.CANDIDATE), dtype=torch.int32, device=device)
    types[:, :context] = TokenType.HISTORY
    types[:, max(0, context - _REALTIME) : context] = TokenType.REALTIME
    segments = padded_segments(types, context)
    out = torch.empty(tokens, num_heads, head_size, dtype=dtype, device=device)
    quantised: QuantisedHeads | None = quantise(q, k, v, segments) if is_fp8 else None

    bias = random_bias(tokens, context + 1, device) if has_bias else None

    def launch(config: DenseConfig) -> Launch:
        return launch_of(
            q,
            k,
            v,
            out,
            segments,
            scale=head_size**-0.5,
            norm_length=max(1, context),
            quantised=quantised,
            bias=bias,
            config=config,
        )

    return launch


def random_bias(tokens: int, max_positions: int, device: torch.device) -> DenseBias:
    """Random tables, and rising times within half a year, as a user's are, of so many tokens."""
    return DenseBias(
        position_table=torch.randn(2 * max_positions - 1, device=device),
        time_table=torch.randn(_BUCKETS + 1, device=device),
        max_positions=max_positions,
        times=torch.randint(_SECONDS, (tokens,), dtype=torch.int32, device=device).sort().values,
        bucket_edges=torch.exp(torch.arange(1, _BUCKETS + 2, device=device) * LOG_STEP).ceil().to(torch.int32),
    )
