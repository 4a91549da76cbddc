"""Tensor parallelism: a network's heads divided among ranks, each with a GPU of its own.

A rank holds the U, V, Q and K columns of its heads, their keys and values, the GroupLN of what they attend to, and the
rows of the output projection that take it; the projection's results are summed over ranks. All else - embeddings, the
residual stream and its GroupLN, heads of the tasks - every rank has whole (Megatron-LM, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtgr.config import ModelConfig
from mtgr.errors import ConfigurationError

# Tensors of a block that are divided, and along which dimension.
_DIMENSIONS = {"uvqk.weight": 0, "uvqk.bias": 0, "output.weight": 1, "output_norm.gain": 1, "output_norm.bias": 1}
_OF_A_BLOCK = re.compile(r"blocks\.\d+\.(.+)")


def _unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a network; one that has it all by default.

    Attributes:
        rank: Which of them this is.
        size: How many there are.
        all_reduce: Sum over ranks of a tensor, float, contiguous, of one shape on all; may write to its argument.
    """

    rank: int = 0
    size: int = 1
    all_reduce: Callable[[Tensor], Tensor] = _unchanged


def vllm_ranks() -> Ranks:
    """The ranks of vLLM's tensor parallel group, which the process of a worker belongs to."""
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_reduce,
    )

    size = get_tensor_model_parallel_world_size()
    if size == 1:
        return Ranks()
    return Ranks(get_tensor_model_parallel_rank(), size, tensor_model_parallel_all_reduce)


def check_ranks(size: int, config: ModelConfig, place: str) -> None:
    """See that a network's heads can be divided.

    Args:
        size: Ranks.
        config: The network.
        place: File that says how many, for the error.

    Raises:
        ConfigurationError: If they cannot.
    """
    if config.num_heads % size:
        divisors = [str(number) for number in range(1, config.num_heads + 1) if config.num_heads % number == 0]
        raise ConfigurationError(
            f"{place}: tensor_parallel_size is {size}, which does not divide the network's {config.num_heads} heads; "
            f"set it to one of {', '.join(divisors)}."
        )


def rank_config(config: ModelConfig, size: int) -> ModelConfig:
    """The network that a rank holds: a ``size``-th of the heads, as wide as they are."""
    return replace(config, num_heads=config.num_heads // size, dqk=config.dqk, dv=config.dv)


@dataclass(frozen=True)
class WeightSplit:
    """Which part of a checkpoint's tensors a rank holds.

    Args:
        config: The whole network.
        ranks: Those that share it.
    """

    config: ModelConfig
    ranks: Ranks

    def whole_shape(self, name: str, shape: torch.Size) -> torch.Size:
        """Shape in the checkpoint of a tensor that has ``shape`` on a rank."""
        dimension = _DIMENSIONS.get(_part_of_block(name))
        if dimension is None:
            return shape
        return torch.Size(width * self.ranks.size if index == dimension else width for index, width in enumerate(shape))

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor; of one that lies in a file only its own bytes are read."""
        kind = _part_of_block(name)
        rank, size = self.ranks.rank, self.ranks.size
        if size == 1:
            return tensor
        if kind == "output.bias" and rank:
            # The sum over ranks has it once.
            return torch.zeros_like(tensor)
        dimension = _DIMENSIONS.get(kind)
        if dimension is None:
            return tensor
        if dimension == 1:
            return tensor.chunk(size, dim=1)[rank]
        heads, dqk, dv = self.config.num_heads, self.config.dqk, self.config.dv
        parts = tensor.split([heads * dv, heads * dv, heads * dqk, heads * dqk])
        return torch.cat([part.chunk(size)[rank] for part in parts])


def _part_of_block(name: str) -> str:
    found = _OF_A_BLOCK.fullmatch(name)
    return found.group(1) if found else ""
