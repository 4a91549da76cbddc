"""How far a shadow's scores are from those that were returned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtgr.routing.ranker import Ranking

_TOP = 10


@dataclass(frozen=True)
class Drift:
    """One comparison, of the same items.

    Attributes:
        max_error: Largest absolute difference of a probability.
        mean_error: Mean absolute difference.
        overlap: Part of the ten best items that both have among their ten best.
    """

    max_error: float
    mean_error: float
    overlap: float


def drift(returned: Ranking, shadow: Ranking) -> Drift:
    """Compare two rankings of the same items, in whatever order each has them."""
    ours, theirs = np.argsort(returned.items, kind="stable"), np.argsort(shadow.items, kind="stable")
    errors = np.abs(returned.task_scores[ours].astype(np.float64) - shadow.task_scores[theirs])
    top = min(_TOP, len(returned.items))
    common = np.intersect1d(returned.items[:top], shadow.items[:top])
    return Drift(
        float(errors.max(initial=0.0)), float(errors.mean()) if errors.size else 0.0, len(common) / top if top else 1.0
    )
