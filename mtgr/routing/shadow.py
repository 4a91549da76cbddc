"""How far a shadow's scores are from those that were returned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtgr.routing.ranker import Ranking

_TOP = 10


@dataclass(frozen=True)
class Drift:
    """One comparison, of the same items.

    Attributes:
        max_error: Largest absolute difference of a probability.
        mean_error: Mean absolute difference.
        overlap: Part of the ten best items that both have among their ten best.
        spearman: Rank correlation of the scores; NaN for less than two items, or where all scores are equal.
    """

    max_error: float
    mean_error: float
    overlap: float
    spearman: float = math.nan


def drift(returned: Ranking, shadow: Ranking) -> Drift:
    """Compare two rankings of the same items, in whatever order each has them."""
    ours, theirs = np.argsort(returned.items, kind="stable"), np.argsort(shadow.items, kind="stable")
    errors = np.abs(returned.task_scores[ours].astype(np.float64) - shadow.task_scores[theirs])
    top = min(_TOP, len(returned.items))
    common = np.intersect1d(returned.items[:top], shadow.items[:top])
    return Drift(
        max_error=float(errors.max(initial=0.0)),
        mean_error=float(errors.mean()) if errors.size else 0.0,
        overlap=len(common) / top if top else 1.0,
        spearman=_spearman(returned.scores[ours], shadow.scores[theirs]),
    )


def _spearman(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> float:
    one, other = _ranks(first), _ranks(second)
    one, other = one - one.mean(), other - other.mean()
    norm = np.sqrt((one @ one) * (other @ other)) if len(one) > 1 else 0.0
    return float(one @ other / norm) if norm else math.nan


def _ranks(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """FP64 [m]: ranks from 0; equal scores share the mean of theirs."""
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: npt.NDArray[np.float64] = (ends - (counts + 1) / 2)[group]
    return ranks
