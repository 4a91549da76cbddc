"""Data parallelism over the processes that ``torchrun`` starts: shares of a step, and the sum of gradients."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_TIMEOUT = timedelta(minutes=10)


class Workers:
    """The processes of one training run; a run that was not started by ``torchrun`` is one process.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def join(cls, on_gpus: bool = False) -> Workers:
        """Join the processes that ``torchrun`` started, over NCCL if they train on GPUs, else over gloo."""
        if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            if on_gpus:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl" if on_gpus else "gloo", timeout=_TIMEOUT)
        return cls(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """End the group that ``join`` joined."""
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process writes files and says what there is to say."""
        return self.rank == 0

    def own(self, group: Sequence[list[int]]) -> list[tuple[int, list[int]]]:
        """This process's share of one step's micro-batches, each with its index in the group."""
        return [(index, group[index]) for index in range(self.rank, len(group), self.size)]

    def wait(self) -> None:
        """Return when every process is here."""
        if self.size > 1:
            dist.barrier()

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the leader's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def add_up(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        if dist.get_backend() == "nccl":
            total = total.cuda().float()
        dist.all_reduce(total)
        return float(total)

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over all processes, in one message.

        A parameter without a gradient in every process stays without one, as it would in a single process: an
        optimizer decays what has a gradient of 0, and leaves alone what has none.
        """
        if self.size == 1:
            return
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        flat = [p.grad.reshape(-1) if p.grad is not None else torch.zeros_like(p).reshape(-1) for p in parameters]
        message = torch.cat([present, *flat])
        dist.all_reduce(message)
        start = len(present)
        for index, parameter in enumerate(parameters):
            own = message[start : start + parameter.numel()].view_as(parameter)
            parameter.grad = own.clone() if message[index] > 0 else None
            start += parameter.numel()
