"""Tile sizes of paged attention: the candidates, and those that were found fastest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mtgr.kernels import dense_configs

# A step's number of tokens falls into the first class that holds it. The host knows the number, so that the choice, and
# with it a captured graph, depends on shapes alone.
TOKEN_CLASSES = (16, 64, 256, 1024, 4096)

SPLITS = (1, 2, 4, 8, 16)

# Programs that keep a large GPU busy, when nothing was measured.
_MANY_PROGRAMS = 256


@dataclass(frozen=True)
class LaunchConfig:
    """How paged attention is cut up.

    Attributes:
        block_m: Queries of a program.
        block_n: Keys of one iteration.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
        splits: Programs that share out the keys of the same queries.
        variant: ``pointers``: plain loads. ``specialised``: whole tiles by warps of their own, on Hopper alone.
        in_turn: Whether the warps of a specialised program multiply in turn.
        overlaps: Whether SiLU of one tile is held before the wait for the products of the last.
        listed: Whether a specialised program takes its tiles of queries from a list, or searches for each.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    splits: int = 1
    variant: Literal["pointers", "specialised"] = "pointers"
    in_turn: bool = False
    overlaps: bool = False
    listed: bool = False


@dataclass(frozen=True)
class LaunchKey:
    """What a configuration was measured for."""

    num_heads: int
    head_size: int
    dtype: torch.dtype
    block_size: int
    has_bias: bool
    token_class: int


# block_m, block_n, num_warps, num_stages
_Tile = tuple[int, int, int, int]

_chosen: dict[LaunchKey, LaunchConfig] = {}


def token_class(num_tokens: int) -> int:
    """The class that steps of so many tokens belong to; beyond the last class, the last."""
    return next((bound for bound in TOKEN_CLASSES if num_tokens <= bound), TOKEN_CLASSES[-1])


def choose(key: LaunchKey) -> LaunchConfig:
    """The configuration found fastest, or a sensible one where nothing was measured."""
    chosen = _chosen.get(key)
    if chosen is not None:
        return chosen
    tile = candidate_tiles(key)[0]
    programs = -(-key.token_class // tile.block_m) * key.num_heads
    splits = max((n for n in SPLITS if n * programs <= _MANY_PROGRAMS), default=1)
    return LaunchConfig(tile.block_m, tile.block_n, tile.num_warps, tile.num_stages, splits)


def remember(key: LaunchKey, config: LaunchConfig) -> None:
    """Have ``choose`` return ``config`` for ``key`` from now on, in this process."""
    _chosen[key] = config


def candidate_tiles(key: LaunchKey) -> list[LaunchConfig]:
    """Tiles worth measuring, the safest first, all with one split.

    They fit the registers and the shared memory of compute capability 9.0; on smaller chips some fail to launch.
    """
    if key.dtype == torch.float32:
        few, many = _exact_tiles(key.head_size)
    else:
        few, many = _tensor_core_tiles(key.head_size)
    if key.has_bias:
        # Deeper pipelines would fetch every bias ahead, four bytes at a time, through shared memory.
        stages = 1 if key.dtype == torch.float32 else 2
        few, many = ([(m, n, warps, stages) for m, n, warps, _ in tiles if n <= 64] for tiles in (few, many))
    if key.token_class <= 16:
        tiles = few
    elif key.token_class <= 64:
        tiles = [*few, *(tile for tile in many if tile[0] <= 64)]
    else:
        tiles = many
    return [LaunchConfig(*tile) for tile in dict.fromkeys(tiles)]


def specialised_tiles(key: LaunchKey) -> list[LaunchConfig]:
    """Tiles of the specialised variant worth measuring on Hopper, with one split; none where it is not built."""
    if key.head_size not in dense_configs.SPECIALISED_SIZES or key.dtype.itemsize != 2 or key.has_bias:
        return []
    if key.token_class < 256 or key.block_size not in (16, 32, 64, 128):
        return []
    tiles = {
        64: [(128, 128, 4, 4), (192, 64, 4, 4)],
        128: [(128, 128, 4, 2), (128, 64, 4, 4), (192, 64, 4, 4)],
        256: [(128, 64, 4, 2)],
    }[key.head_size]
    # Searching wins for long contexts of wide heads alone, in one way each.
    found = (
        [] if key.head_size == 64 else [LaunchConfig(*tiles[0], variant="specialised", in_turn=key.head_size == 128)]
    )
    return found + [
        LaunchConfig(*tile, variant="specialised", in_turn=in_turn, overlaps=overlaps, listed=True)
        for tile in tiles
        for in_turn, overlaps in ((False, False), (True, False), (False, True))
    ]


def _exact_tiles(head_size: int) -> tuple[list[_Tile], list[_Tile]]:
    """FP32 products without tensor cores, for few queries and for many: registers hold whole operands."""
    few = [(16, 16, 4, 2)]
    if head_size > 128:
        return few, [(32, 16, 4, 2), (32, 32, 8, 2)]
    if head_size > 64:
        return few, [(32, 16, 4, 2), (32, 64, 8, 2)]
    return [*few, (16, 32, 4, 2)], [(32, 32, 4, 2), (32, 64, 8, 2), (64, 32, 8, 2)]


def _tensor_core_tiles(head_size: int) -> tuple[list[_Tile], list[_Tile]]:
    few = [(16, 64, 4, 3), (16, 32, 4, 3)]
    if head_size > 128:
        return few, [(64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 3), (128, 64, 8, 2), (128, 32, 8, 3)]
    return few, [(64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2)]
