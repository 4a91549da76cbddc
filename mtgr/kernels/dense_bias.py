"""Relative bias of dense attention: the tables of one layer, and what all layers of a batch share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtgr.errors import ConfigurationError
from mtgr.kernels.bias import bucket_by_edges, position_bias


@dataclass(frozen=True, eq=False)
class DenseBias:
    """position_table[clip(p_query - p_key)] + time_table[bucket(|t_query - t_key|)], as ``mtgr.model.bias`` has it.

    A context token's position is its index in the context, a candidate's the number of context tokens, so that only
    times are stored. Make one object a batch and take each layer's from it with ``for_layer``: on the CPU the layers
    then share the buckets, which cost more than the lookups.

    Attributes:
        position_table: Float [2 * max_positions - 1], contiguous.
        time_table: Float [time_buckets + 1], contiguous.
        max_positions: Distances are clipped to max_positions - 1 both ways.
        times: INT32 [T], contiguous, of the tokens of q and k, seconds, never negative.
        bucket_edges: INT32 [E + 1], what ``mtgr.kernels.bias.time_bucket_edges`` returned.
        buckets: What the CPU path keeps between the layers of the batch.
    """

    position_table: Tensor
    time_table: Tensor
    max_positions: int
    times: Tensor
    bucket_edges: Tensor
    buckets: dict[tuple[int, int, int, int], Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check what a kernel reads without strides.

        Raises:
            ConfigurationError: If a tensor is not as above.
        """
        tensors = (self.position_table, self.time_table, self.times, self.bucket_edges)
        if not all(x.ndim == 1 and x.is_contiguous() for x in tensors) or self.times.dtype != torch.int32:
            raise ConfigurationError(
                "dense bias: tables, times and bucket edges must be contiguous vectors, times and edges INT32."
            )

    def for_layer(self, position_table: Tensor, time_table: Tensor) -> DenseBias:
        """The same batch with the tables of another layer."""
        return dataclasses.replace(self, position_table=position_table, time_table=time_table)

    def tile(self, positions: Tensor, first_row: int, first_key_row: int, num_keys: int) -> Tensor:
        """Bias of consecutive tokens of one sequence to the leading tokens of its context, on the CPU.

        Args:
            positions: INT64 [q], at least one.
            first_row: The first query's row in ``times``.
            first_key_row: The context's first row in ``times``.
            num_keys: Of the context; at least 1.

        Returns:
            FP32 [q, num_keys], the caller's to change.
        """
        bias = position_bias(self.position_table, positions, num_keys)
        key = (first_row, len(positions), first_key_row, num_keys)
        buckets = self.buckets.get(key)
        if buckets is None:
            queries = self.times[first_row : first_row + len(positions), None]
            seconds = (queries - self.times[first_key_row : first_key_row + num_keys]).abs_()
            self.buckets[key] = buckets = bucket_by_edges(seconds, self.bucket_edges).flatten()
        return bias.add_(self.time_table.float().index_select(0, buckets).view_as(bias))

    def between(self, query_positions: Tensor, query_times: Tensor, key_times: Tensor) -> Tensor:
        """Bias of any tokens to their whole contexts; nothing waits for the GPU.

        Args:
            query_positions: INT [B, q].
            query_times: INT32 [B, q].
            key_times: INT32 [B, n].

        Returns:
            FP32 [B, q, n].
        """
        limit = self.max_positions - 1
        keys = torch.arange(key_times.shape[1], device=key_times.device)
        distance = (query_positions[:, :, None] - keys).clamp_(-limit, limit) + limit
        buckets = bucket_by_edges((query_times[:, :, None] - key_times[:, None, :]).abs_(), self.bucket_edges)
        return self.position_table.float()[distance] + self.time_table.float()[buckets.long()]

    def own(self) -> Tensor:
        """FP32 scalar: the bias of a token to itself."""
        return self.position_table[self.max_positions - 1].float() + self.time_table[0].float()
