"""Relative bias: over paged keys the tables of one layer and what all layers of a step share, and its parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtgr.errors import ConfigurationError

# A bucket is guessed and one integer edge decides: the guess must be right or one too low. PyTorch's path guesses
# log2(|dt|) * ln(2) / LOG_STEP - GUESS_MARGIN, with a margin far above the error of a fast log2 and far below a bucket.
LOG_STEP = 0.301
GUESS_MARGIN = 0.01

# Kernels read |dt| as FP32 whose bits, less those of 1.0, are 2^23 log2(|dt|) to within 0.09 octaves below: a fifth of
# a bucket. Times the factor, 2^32 is a bucket.
FRACTION_BITS = 23
ONE_BITS = 127 << FRACTION_BITS
GUESS_FACTOR = int(math.log(2) / LOG_STEP * (1 << 9))

# A time difference as large as the largest INT32 counts as one second less, so that no bucket begins at the largest.
MAX_SECONDS = 2**31 - 2


@dataclass(frozen=True, eq=False)
class PagedBias:
    """position_table[clip(p_query - p_key)] + time_table[bucket(|t_query - t_key|)], as ``mtgr.model.bias`` has it.

    A key's position is its index in the sequence. Make one object a step and take each layer's from it with
    ``for_layer``: on the CPU the layers then share the buckets, which cost more than the lookups.

    Attributes:
        position_table: Float [2 * max_positions - 1], contiguous.
        time_table: Float [time_buckets + 1], contiguous.
        max_positions: Distances are clipped to max_positions - 1 both ways.
        query_positions: INT32 [T].
        query_times: INT32 [T], seconds, never negative.
        key_times: INT32 paged cache [num_blocks, block_size], seconds, never negative; all of the step's times must be
            stored before the first layer attends.
        bucket_edges: INT32 [E + 1], what ``time_bucket_edges`` returned.
        buckets: What the CPU path keeps between the layers of the step.
    """

    position_table: Tensor
    time_table: Tensor
    max_positions: int
    query_positions: Tensor
    query_times: Tensor
    key_times: Tensor
    bucket_edges: Tensor
    buckets: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, repr=False)

    def for_layer(self, position_table: Tensor, time_table: Tensor) -> PagedBias:
        """The same step with the tables of another layer."""
        return dataclasses.replace(self, position_table=position_table, time_table=time_table)

    def tile(self, first: int, last: int, num_keys: int, blocks: Tensor) -> Tensor:
        """Bias of some queries of one request, on the CPU.

        Args:
            first: First of the queries, an index into the step's tokens.
            last: One past the last of them; first < last.
            num_keys: Keys from the sequence's first; at least 1.
            blocks: INT [at least enough blocks], the cache blocks of the request.

        Returns:
            FP32 [last - first, num_keys], the caller's to change.
        """
        bias = position_bias(self.position_table, self.query_positions[first:last].long(), num_keys)
        buckets = self._tile_buckets(first, last, num_keys, blocks)
        return bias.add_(self.time_table.float().index_select(0, buckets).view_as(bias))

    def self_bias(self) -> Tensor:
        """FP32 scalar: the bias of a token to itself."""
        return self.position_table[self.max_positions - 1].float() + self.time_table[0].float()

    def _tile_buckets(self, first: int, last: int, num_keys: int, blocks: Tensor) -> Tensor:
        """INT32 [(last - first) * num_keys], the same in every layer of the step."""
        key = (first, last, num_keys)
        buckets = self.buckets.get(key)
        if buckets is None:
            block_size = self.key_times.shape[1]
            key_times = self.key_times[blocks[: -(-num_keys // block_size)]].flatten()[:num_keys]
            buckets = bucket_by_edges((self.query_times[first:last, None] - key_times).abs_(), self.bucket_edges)
            self.buckets[key] = buckets = buckets.flatten()
        return buckets


def position_bias(position_table: Tensor, positions: Tensor, num_keys: int) -> Tensor:
    """Part of a relative bias that positions make; waits for a GPU.

    Args:
        position_table: Float [2 * max_positions - 1].
        positions: INT64 [q], of queries; at least one. A key's position is its index.
        num_keys: At least 1.

    Returns:
        FP32 [q, num_keys], the caller's to change.
    """
    highest, limit = int(positions.max()), position_table.shape[0] // 2
    # Along a row the distance falls by one a key, so that every row is a window of one line.
    steps = torch.arange(highest - int(positions.min()) + num_keys, device=position_table.device)
    line = position_table.float()[(highest - steps).clamp_(-limit, limit) + limit]
    return line.unfold(0, num_keys, 1).index_select(0, highest - positions)


def time_bucket_edges(
    time_bucket: Callable[[Tensor], Tensor], time_buckets: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The bucket function as a table, so that integer comparisons give exactly its buckets.

    Args:
        time_bucket: INT64 seconds -> INT64 bucket, never falling, 0 at 0 (``RelativeBias.time_bucket``).
        time_buckets: Highest bucket.
        device: Where the table shall be.

    Returns:
        INT32 [E + 1], E <= time_buckets: the smallest time difference, in seconds, of bucket 1, 2, ..., E, and the
        largest INT32. Buckets that no INT32 difference reaches are left out.

    Raises:
        ConfigurationError: If the buckets are not logarithms in steps of ``LOG_STEP``.
    """
    buckets = torch.arange(1, time_buckets + 1)
    below, reached = torch.zeros_like(buckets), torch.full_like(buckets, MAX_SECONDS + 1)
    while bool((reached - below > 1).any()):
        middle = (below + reached) // 2
        inside = time_bucket(middle) >= buckets
        reached = torch.where(inside, middle, reached)
        below = torch.where(inside, below, middle)
    edges = reached[reached <= MAX_SECONDS]
    for seconds in (edges - 1, edges):
        by_logarithm = (seconds.double().log2() * (math.log(2) / LOG_STEP) - GUESS_MARGIN).long().clamp(max=len(edges))
        short = time_bucket(seconds) - torch.stack([by_logarithm, guess_of(seconds).clamp(max=len(edges))])
        if bool(((short != 0) & (short != 1)).any()):
            raise ConfigurationError(
                f"the time buckets of the relative bias are not logarithms in steps of {LOG_STEP}; "
                "set LOG_STEP in mtgr.kernels.bias to the step they have."
            )
    return torch.cat([edges, edges.new_tensor([MAX_SECONDS + 1])]).to(device=device, dtype=torch.int32)


def guess_of(seconds: Tensor) -> Tensor:
    """INT64 buckets as the kernels guess them, of INT time differences from 0 to the largest INT32."""
    octaves = seconds.clamp(min=1).to(torch.float32).view(torch.int32).long() - ONE_BITS
    return (octaves * GUESS_FACTOR) >> (FRACTION_BITS + 9)


def bucket_by_edges(seconds: Tensor, edges: Tensor) -> Tensor:
    """INT32 buckets of time differences.

    Args:
        seconds: INT32 of any shape, at least 0.
        edges: INT32 [E + 1], of ``time_bucket_edges``.
    """
    octaves = seconds.float().clamp_(min=1.0).log2_()
    buckets = octaves.mul_(math.log(2) / LOG_STEP).sub_(GUESS_MARGIN).to(torch.int32).clamp_(max=len(edges) - 1)
    return buckets.add_(seconds.clamp(max=MAX_SECONDS) >= edges.index_select(0, buckets.flatten()).view_as(buckets))
