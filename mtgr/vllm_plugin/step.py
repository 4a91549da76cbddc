"""What the cache manager says of a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class StepMetadata:
    """What the cache manager says of one step; T tokens of R requests.

    Attributes:
        num_tokens: T.
        query_start: INT32 [R + 1], first token of each request.
        block_table: INT32 [R, b], pages of each request.
        slots: INT64 [T], where each token's keys and values go; negative for padding.
    """

    num_tokens: int
    query_start: Tensor
    block_table: Tensor
    slots: Tensor
