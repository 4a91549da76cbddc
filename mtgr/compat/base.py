"""What all foreign networks share: the engine signatures on rows, and SiLU attention without a softmax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtgr.errors import ConfigurationError, InvalidRequestError
from mtgr.schema import FIRST_ID, SLOT_COLUMN, TYPE_COLUMN, TokenType

Operation = Literal["rank", "retrieve"]
C = TypeVar("C", bound="ForeignConfig")


@dataclass(frozen=True)
class ForeignConfig:
    """Hyper-parameters that all foreign networks have.

    Attributes:
        num_items: Items that can be asked for, without reserved ids.
        d_model: Width of the residual stream.
        num_layers: Blocks.
        num_heads: Attention heads.
        dqk: Query and key width per head.
        dv: Value width per head.
        attention_norm_length: The constant N that A V is divided by.
        norm_epsilon: Epsilon of the blocks' layer norms.
        max_history: Most events of a context; of more, the latest are used.
        num_profile: Profile tokens in front of the events; networks without such tokens take them for padding.
        retrieve_count: Items that retrieval returns, cut to the number of items.
    """

    network: ClassVar[str]

    num_items: int
    d_model: int
    num_layers: int
    num_heads: int
    dqk: int
    dv: int
    attention_norm_length: int
    norm_epsilon: float
    max_history: int
    num_profile: int = 1
    retrieve_count: int = 1024

    def __post_init__(self) -> None:
        """Check what must be positive.

        Raises:
            ConfigurationError: If a number is out of range.
        """
        names = ("num_items", "d_model", "num_layers", "num_heads", "dqk", "dv", "attention_norm_length")
        for name in (*names, "max_history", "num_profile", "retrieve_count"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"{self.network}: {name} is {value!r}; it must be a positive integer.")
        if isinstance(self.norm_epsilon, bool) or not 0 < self.norm_epsilon < 1:
            raise ConfigurationError(f"{self.network}: norm_epsilon is {self.norm_epsilon!r}; it must lie in (0, 1).")

    @property
    def max_positions(self) -> int:
        """Slots of a context, plus one."""
        return self.num_profile + self.max_history + 1

    @property
    def temperature(self) -> float:
        """Foreign similarities are returned as they are."""
        return 1.0

    @property
    def operations(self) -> tuple[Operation, ...]:
        """What the network can do."""
        return ("rank", "retrieve")

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-ready values, with the name of the network."""
        return {"network": self.network, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Read what ``to_dict`` gave.

        Raises:
            ConfigurationError: If a key is missing or unknown, or a value wrong.
        """
        given = {name: _frozen(value) for name, value in values.items() if name != "network"}
        try:
            return cls(**given)
        except TypeError as error:
            raise ConfigurationError(
                f"{cls.network}: the config is incomplete or has unknown keys: {error}."
            ) from error


def _frozen(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(_frozen(entry) for entry in value) if isinstance(value, list) else value


class ForeignModel(nn.Module):
    """A network with the project's engine signatures; shapes as in ``mtgr.model.mtgr``.

    Context and candidates may be padded on the right with rows of type 0, without any effect on the rest.
    """

    config: ForeignConfig

    def __init__(self, config: ForeignConfig) -> None:
        super().__init__()
        self.config = config
        self.retrieve_count = min(config.retrieve_count, config.num_items)

    def forward(self, context: Tensor, candidates: Tensor) -> Tensor:
        """Score candidates: FP32 [B, k, T] of INT32 [B, n, W] and INT32 [B, k, W]."""
        raise NotImplementedError

    def next_item_logits(self, context: Tensor) -> Tensor:
        """FP32 [B, I - 2]: similarity of every item but the reserved ones to what comes after INT32 [B, n, W].

        Raises:
            InvalidRequestError: If the network has no such output.
        """
        raise InvalidRequestError(
            f"the installed model ({self.config.network}) ranks candidates and cannot retrieve items; send candidates."
        )

    def retrieve(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """INT32 [B, m] items most similar to what comes next, ties by id, and their FP32 [B, m] similarities.

        Raises:
            InvalidRequestError: If the network can only rank.
        """
        scores, items = self.next_item_logits(context).sort(dim=-1, descending=True, stable=True)
        return items[:, : self.retrieve_count].to(torch.int32) + FIRST_ID, scores[:, : self.retrieve_count]


def silu_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, alpha: float, norm_length: int, bias: Tensor | None = None
) -> Tensor:
    """SiLU(alpha q k^T + bias), masked, times v, divided by a constant N.

    Args:
        q: Float [B, h, q, dqk].
        k: Float [B, h, n, dqk].
        v: Float [B, h, n, dv].
        visible: BOOL [B, q, n].
        alpha: Scale of the logits.
        norm_length: N.
        bias: Float [B, q, n], or None.

    Returns:
        Float [B, h, q, dv].
    """
    logits = q @ k.transpose(-1, -2) * alpha
    if bias is not None:
        logits = logits + bias.unsqueeze(1)
    attended: Tensor = (F.silu(logits) * visible.unsqueeze(1).to(logits.dtype)) @ v
    return attended / norm_length


def silu_attention_to_self(q: Tensor, k: Tensor, v: Tensor, alpha: float, norm_length: int) -> Tensor:
    """What each token takes from itself alone: float [B, h, k, dv] of float [B, h, k, d]."""
    logits = (q * k).sum(dim=-1, keepdim=True) * alpha
    attended: Tensor = F.silu(logits) * v
    return attended / norm_length


def by_head(x: Tensor, num_heads: int) -> Tensor:
    """Float [B, h, m, w] of [B, m, h w]."""
    heads: Tensor = x.unflatten(-1, (num_heads, x.shape[-1] // num_heads))
    return heads.transpose(1, 2)


def unit_vectors(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """``x`` over its length, which counts as ``epsilon`` at least."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp(min=epsilon)


def token_types(rows: Tensor) -> Tensor:
    """INT [B, m]."""
    return rows[..., TYPE_COLUMN]


def slots(rows: Tensor) -> Tensor:
    """INT [B, m]."""
    return rows[..., SLOT_COLUMN]


def is_event(rows: Tensor) -> Tensor:
    """BOOL [B, m]: tokens of S and R, which foreign networks do not tell apart."""
    types = token_types(rows)
    return (types == TokenType.HISTORY) | (types == TokenType.REALTIME)


def is_last_of(valid: Tensor, order: Tensor) -> Tensor:
    """BOOL [B, m]: the one token of each user that comes last among those that are valid; none if none is."""
    ranked = torch.where(valid, order, -1)
    return valid & (ranked == ranked.amax(dim=1, keepdim=True))
