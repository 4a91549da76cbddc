"""How dense attention is cut up: the candidates, and those found fastest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

# ``pointers``: plain loads. ``descriptors``: whole tiles by the tensor memory accelerator.
# ``specialised``: likewise, in warps of their own, on Hopper alone.
Variant = Literal["pointers", "descriptors", "specialised"]

# A batch's longest context, in tokens, falls into the first class that holds it: short ones want many small programs.
LENGTH_CLASSES = (256, 1024, 4096, 16384)

# Heads that the specialised variant is built for.
SPECIALISED_SIZES = (64, 128, 256)


@dataclass(frozen=True)
class DenseConfig:
    """A way to compute dense attention.

    Attributes:
        variant: Manner of loading.
        block_m: Queries of a program.
        block_n: Keys of one iteration.
        num_warps: Warps of a program; in a specialised one those of 64 queries, always 4.
        num_stages: Tiles of keys and values on their way at once.
        in_turn: Whether the warps of a specialised program multiply in turn.
        overlaps: Whether SiLU of one tile is held before the wait for the products of the last.
        packed: Whether a specialised program rounds weights to FP8 four at a time, as operands.
    """

    variant: Variant
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    in_turn: bool = False
    overlaps: bool = False
    packed: bool = False


@dataclass(frozen=True)
class DenseKey:
    """What a configuration was measured for.

    Attributes:
        head_size: Width of a head.
        dtype: Precision of q, k and v.
        capability: Compute capability times ten.
        length_class: Of ``LENGTH_CLASSES``.
        has_bias: Whether logits get a relative bias.
    """

    head_size: int
    dtype: torch.dtype
    capability: int
    length_class: int
    has_bias: bool = False


# Found fastest by ``perf.gpu``, whose ``defaults.txt`` has these lines; FP16 takes what BF16 has.
_FASTEST: dict[DenseKey, DenseConfig] = {
    DenseKey(64, torch.bfloat16, 90, 4096): DenseConfig("descriptors", 64, 64, 4, 3),
    DenseKey(64, torch.bfloat16, 90, 16384): DenseConfig("specialised", 192, 64, 4, 4, in_turn=True),
    DenseKey(64, torch.float8_e4m3fn, 90, 4096): DenseConfig("descriptors", 64, 64, 4, 3),
    DenseKey(64, torch.float8_e4m3fn, 90, 16384): DenseConfig("descriptors", 64, 64, 4, 3),
    DenseKey(128, torch.bfloat16, 90, 4096): DenseConfig("specialised", 128, 128, 4, 2, in_turn=True),
    DenseKey(128, torch.bfloat16, 90, 16384): DenseConfig("specialised", 128, 128, 4, 2, in_turn=True),
    DenseKey(128, torch.float8_e4m3fn, 90, 4096): DenseConfig("descriptors", 64, 64, 4, 3),
    DenseKey(128, torch.float8_e4m3fn, 90, 16384): DenseConfig("specialised", 192, 64, 4, 6, in_turn=True, packed=True),
    DenseKey(256, torch.bfloat16, 90, 4096): DenseConfig("specialised", 128, 64, 4, 2),
    DenseKey(256, torch.bfloat16, 90, 16384): DenseConfig("specialised", 128, 64, 4, 2),
    DenseKey(256, torch.float8_e4m3fn, 90, 4096): DenseConfig("specialised", 128, 64, 4, 4, overlaps=True, packed=True),
    DenseKey(256, torch.float8_e4m3fn, 90, 16384): DenseConfig("specialised", 128, 64, 4, 4, packed=True),
}

_chosen: dict[DenseKey, DenseConfig] = {}


def length_class(context: int) -> int:
    """The class of a longest context; beyond the last class, the last."""
    return next((bound for bound in LENGTH_CLASSES if context <= bound), LENGTH_CLASSES[-1])


def choose(key: DenseKey) -> DenseConfig:
    """What was found fastest in this process, else on the project's machine, else the safest."""
    common = replace(key, dtype=torch.bfloat16) if key.dtype == torch.float16 else key
    return _chosen.get(key) or _FASTEST.get(common) or candidates(key)[0]


def remember(key: DenseKey, config: DenseConfig) -> None:
    """Have ``choose`` return ``config`` for ``key`` from now on, in this process."""
    _chosen[key] = config


def candidates(key: DenseKey) -> list[DenseConfig]:
    """Configurations worth measuring, the safest first; on chips of less shared memory some fail to launch."""
    head_size = key.head_size
    if key.dtype == torch.float32:
        size = 16 if head_size > 128 else 32
        return [DenseConfig("pointers", size, 32 if head_size > 64 else 64, 8, 1)]
    is_fp8 = key.dtype.itemsize == 1
    if key.has_bias:
        return _biased(key)
    if key.capability < 90:
        return [DenseConfig("pointers", *tile) for tile in _older_tiles(head_size)]
    found = [DenseConfig("descriptors", *tile) for tile in _tiles(head_size, is_fp8)]
    if key.capability == 90 and head_size in SPECIALISED_SIZES:
        found += _specialised(head_size, is_fp8)
    if not is_fp8 and head_size <= 128:
        found.append(DenseConfig("pointers", 128, 64, 8, 3))
    if key.length_class == LENGTH_CLASSES[0]:
        found.sort(key=lambda config: config.block_m)
    return found


def plain_config(key: DenseKey) -> DenseConfig:
    """The safest configuration that loads plainly; FP8 has none."""
    return candidates(replace(key, capability=80))[0]


def _biased(key: DenseKey) -> list[DenseConfig]:
    """With a bias, whose numbers take registers beside the logits: smaller tiles, and none specialised."""
    if key.head_size > 128:
        tiles = [(64, 32, 4, 2), (64, 64, 8, 2)]
    else:
        tiles = [(64, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 3)]
    variants: list[Variant] = ["pointers"] if key.capability < 90 else ["descriptors", "pointers"]
    return [DenseConfig(variant, *tile) for tile in tiles for variant in variants]


def _older_tiles(head_size: int) -> list[tuple[int, int, int, int]]:
    """For chips before Hopper: block_m, block_n, num_warps, num_stages."""
    if head_size > 128:
        return [(64, 32, 4, 2), (64, 32, 8, 2)]
    return [(64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 3)]


def _tiles(head_size: int, is_fp8: bool) -> list[tuple[int, int, int, int]]:
    """For Hopper and later: block_m, block_n, num_warps, num_stages."""
    if head_size > 128:
        return [(128, 64, 8, 3)] if is_fp8 else [(128, 64, 8, 2), (64, 64, 4, 2)]
    return [(128, 64, 8, 3), (64, 64, 4, 3)]


def _specialised(head_size: int, is_fp8: bool) -> list[DenseConfig]:
    """For Hopper alone."""
    if is_fp8:
        # Its scales are those of 128 tokens: a program of 192 queries needs tiles of 64 keys, which lie inside one.
        tiles = {
            64: [(128, 128, 4, 4), (192, 64, 4, 6)],
            128: [(128, 128, 4, 4), (192, 64, 4, 6)],
            256: [(128, 64, 4, 4), (128, 128, 4, 2)],
        }
        # Below heads of 256 the special function unit takes as long as the tensor cores, or longer.
        ways = [(False, False), (False, True)] if head_size == 256 else [(True, False), (False, True)]
        return [
            DenseConfig("specialised", *tile, in_turn=in_turn, overlaps=overlaps, packed=True)
            for tile in tiles[head_size]
            for in_turn, overlaps in ways
        ]
    tiles = {
        64: [(128, 128, 4, 4), (192, 64, 4, 4)],
        128: [(128, 128, 4, 2), (192, 64, 4, 4)],
        256: [(128, 64, 4, 2)],
    }
    return [
        DenseConfig("specialised", *tile, in_turn=in_turn, overlaps=overlaps)
        for tile in tiles[head_size]
        for in_turn, overlaps in ((False, False), (True, False), (False, True))
    ]
