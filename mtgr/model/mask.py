"""Who sees whom: MTGR's dynamic mask (arXiv 2505.18654, section 3), elementwise on rows.

Profile (U) and history (S) are visible to every token. A real-time token (R) is visible to itself, to later ones, and
to candidates after it. A candidate (C) is visible to itself alone. Keys here are context tokens only: what a candidate
takes from itself is a single term per candidate, which the attention adds without any k x k matrix.
"""

from __future__ import annotations

from torch import Tensor

from mtgr.config import StaticAttention
from mtgr.schema import TokenType


def is_static(types: Tensor) -> Tensor:
    """BOOL like ``types``: whether a token belongs to U or S."""
    return (types == TokenType.PROFILE) | (types == TokenType.HISTORY)


def visible_by_order(
    query_slots: Tensor, key_types: Tensor, key_slots: Tensor, static_attention: StaticAttention
) -> Tensor:
    """Visibility by slot, as in serving: all of the context came before the candidates.

    Slots alone carry the rule for queries of every type: a static token's slot is below every real-time slot, a
    candidate's above.

    Args:
        query_slots: INT [B, q].
        key_types: INT [B, n], 0 for padding.
        key_slots: INT [B, n].
        static_attention: ``full`` lets U and S see each other both ways, ``causal`` only backwards.

    Returns:
        BOOL [B, q, n].
    """
    earlier = key_slots[:, None, :] <= query_slots[:, :, None]
    valid = (key_types != TokenType.PADDING)[:, None, :]
    if static_attention == "causal":
        return valid & earlier
    return valid & (is_static(key_types)[:, None, :] | earlier)


def visible_by_time(candidate_times: Tensor, key_types: Tensor, key_times: Tensor) -> Tensor:
    """Visibility of the context to candidates by time, as in training: candidates of many moments share a context.

    A candidate sees real-time tokens strictly earlier than itself, so that nothing simultaneous can leak its label.

    Args:
        candidate_times: INT [B, k], seconds.
        key_types: INT [B, n], 0 for padding.
        key_times: INT [B, n], seconds.

    Returns:
        BOOL [B, k, n].
    """
    earlier = (key_types == TokenType.REALTIME)[:, None, :] & (key_times[:, None, :] < candidate_times[:, :, None])
    return is_static(key_types)[:, None, :] | earlier
