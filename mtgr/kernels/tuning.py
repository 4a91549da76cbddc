"""Compile and measure paged attention before the first request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtgr.errors import ConfigurationError
from mtgr.kernels.bias import PagedBias
from mtgr.kernels.compilation import parallel_compilation
from mtgr.kernels.configs import (
    SPLITS,
    TOKEN_CLASSES,
    LaunchConfig,
    LaunchKey,
    candidate_tiles,
    choose,
    remember,
    specialised_tiles,
    token_class,
)
from mtgr.kernels.dispatch import capability_of
from mtgr.kernels.launch import Launch
from mtgr.kernels.paged_items import StepItems
from mtgr.kernels.timing import graph_milliseconds

_CANDIDATES = 256
_REALTIME = 100
_BUCKETS = 64

# More programs than this wait for each other anyway, and splitting costs a pass over partial sums.
_MAX_PROGRAMS = 2048


def warm_up(
    num_heads: int,
    head_size: int,
    dtype: torch.dtype,
    block_size: int,
    *,
    has_bias: bool = False,
    device: torch.device | str = "cuda",
    out_dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype | None = None,
    candidate_dtype: torch.dtype = torch.bool,
    max_tokens: int = TOKEN_CLASSES[-1],
    max_keys: int = 2048,
    measure: bool = True,
) -> dict[int, LaunchConfig]:
    """Compile ``paged_attention`` for a model's attention and find the fastest tiles for steps of every size.

    Afterwards steps of any size and any number of requests run without compiling or measuring, provided that q, k and v
    are columns of one projection or lie alike, and that dtypes are those given here. Without a GPU there is nothing to
    do.

    Args:
        num_heads: Attention heads, H.
        head_size: Width of a head, D.
        dtype: Precision of q, k, v and the cache.
        block_size: Tokens of a cache block.
        has_bias: Whether a relative bias will be given.
        device: Where the steps will run.
        out_dtype: Precision of ``out``.
        table_dtype: Precision of the tables of the relative bias, ``dtype`` by default.
        candidate_dtype: Type of ``is_candidate``.
        max_tokens: Largest number of tokens of a step.
        max_keys: Typical length of a long context, in tokens.
        measure: False compiles what would be chosen without measuring.

    Returns:
        The configuration of each token class, by its largest number of tokens; empty without a GPU.

    Raises:
        ConfigurationError: If no configuration runs on this GPU.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return {}
    chosen = {}
    with torch.cuda.device(device):
        plans = []
        for bound in TOKEN_CLASSES[: TOKEN_CLASSES.index(token_class(max_tokens)) + 1]:
            key = LaunchKey(num_heads, head_size, dtype, block_size, has_bias, bound)
            step = _step(key, max_keys, device, out_dtype, table_dtype or dtype, candidate_dtype)
            plans.append((key, step, _configs(key, device) if measure else [choose(key)]))
        with parallel_compilation():
            for _, step, configs in plans:
                for config in configs:
                    for launch in step(config):
                        launch.compile()
        for key, step, configs in plans:
            times = {config: graph_milliseconds(partial(_run, step, config)) for config in configs}
            best = min(times, key=times.__getitem__)
            if times[best] == float("inf"):
                raise ConfigurationError(
                    f"paged attention does not run on {torch.cuda.get_device_name(device)} with heads of {head_size}, "
                    f"{dtype} and blocks of {block_size}; choose another precision."
                )
            if measure:
                remember(key, best)
            chosen[key.token_class] = best
    return chosen


def _configs(key: LaunchKey, device: torch.device) -> list[LaunchConfig]:
    """Tiles with every number of splits that leaves a sensible number of programs."""
    is_hopper = capability_of(device) == 90
    return [
        replace(tile, splits=splits)
        for tile in [*candidate_tiles(key), *(specialised_tiles(key) if is_hopper else [])]
        for splits in SPLITS
        if splits == 1 or -(-key.token_class // tile.block_m) * key.num_heads * splits <= _MAX_PROGRAMS
    ]


def _step(
    key: LaunchKey,
    num_keys: int,
    device: torch.device,
    out_dtype: torch.dtype,
    table_dtype: torch.dtype,
    candidate_dtype: torch.dtype,
) -> Callable[[LaunchConfig], list[Launch]]:
    """One user's step of the key's class: candidates over a cached context, or in the last class the context too."""
    from mtgr.kernels.triton_attention import attention_launches

    is_cold = key.token_class == TOKEN_CLASSES[-1]
    num_tokens = num_keys + _CANDIDATES if is_cold else key.token_class
    width = key.num_heads * key.head_size
    blocks = -(-num_keys // key.block_size)
    int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
    merged = torch.randn(num_tokens, 4 * width, dtype=key.dtype, device=device)
    _, v, q, k = (part.unflatten(-1, (key.num_heads, key.head_size)) for part in merged.split(width, dim=-1))
    cache = torch.randn(blocks, key.num_heads, key.block_size, 2 * key.head_size, dtype=key.dtype, device=device)
    visible = torch.full((num_tokens,), num_keys, **int32)
    if is_cold:
        slots = torch.arange(1, num_tokens + 1, **int32)
        visible = torch.minimum(visible, torch.clamp(slots, min=max(num_keys - _REALTIME, 1)))
    is_candidate = (torch.arange(num_tokens, **int32) >= num_tokens - _CANDIDATES).to(candidate_dtype)
    bias = None
    if key.has_bias:
        bias = PagedBias(
            position_table=torch.randn(2 * num_keys + 1, dtype=table_dtype, device=device),
            time_table=torch.randn(_BUCKETS + 1, dtype=table_dtype, device=device),
            max_positions=num_keys + 1,
            query_positions=visible,
            query_times=torch.randint(10**7, (num_tokens,), **int32),
            key_times=torch.randint(10**7, (blocks, key.block_size), **int32),
            bucket_edges=torch.full((_BUCKETS + 1,), 2**31 - 1, **int32),
        )
    starts = torch.tensor([0, num_tokens], **int32)
    arguments: tuple[Tensor, ...] = (
        q,
        k,
        v,
        cache,
        torch.randperm(blocks, device=device).to(torch.int32)[None],
        starts,
        visible,
        is_candidate,
        torch.empty(num_tokens, key.num_heads, key.head_size, dtype=out_dtype, device=device),
    )

    items = StepItems()

    def launches(config: LaunchConfig) -> list[Launch]:
        settings: dict[str, Any] = {"scale": key.head_size**-0.5, "norm_length": num_keys, "bias": bias}
        # Made once: in a step all layers share it.
        listed = items.of(starts, visible, is_candidate, config.block_m) if config.listed else None
        return attention_launches(*arguments, **settings, config=config, items=listed)

    return launches


def _run(step: Callable[[LaunchConfig], list[Launch]], config: LaunchConfig) -> None:
    for launch in step(config):
        launch.run()
