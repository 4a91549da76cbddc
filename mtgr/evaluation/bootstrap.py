"""Is A better than B, or is it chance? Paired bootstrap confidence intervals over users.

Users are resampled, not events: the events of one user are alike, and resampling them singly would give
intervals that are too narrow. Both sides see the same resample, so what a resample's users have in common
cancels in the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.errors import ConfigurationError
from mtgr.evaluation.metrics import check_scored_labels, group_aucs

Float64Array = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

ResampledMetric = Callable[[Float64Array], float]
"""A metric of a resample, given as FP64 [num_users]: how often each user was drawn."""


@dataclass(frozen=True)
class Difference:
    """Metric of A minus metric of B.

    Attributes:
        difference: On the data as they are.
        low: Lower end of the percentile confidence interval.
        high: Upper end; the difference is significant if the interval does not hold 0.
    """

    difference: float
    low: float
    high: float


def paired_bootstrap(
    metric_a: ResampledMetric,
    metric_b: ResampledMetric,
    num_users: int,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The difference of two metrics with a percentile interval from resampling users with replacement.

    Args:
        metric_a: Maps FP64 [num_users] draw counts to A's metric; nan where the resample leaves it undefined.
        metric_b: The same for B.
        num_users: Users to draw, and draws in each resample.
        num_resamples: Resamples; those where a metric is undefined are left out of the interval.
        confidence: Coverage of the interval, between 0 and 1.
        seed: The same seed gives the same interval.

    Raises:
        ConfigurationError: No users, fewer than one resample, or a confidence outside (0, 1).
    """
    if num_users < 1 or num_resamples < 1 or not 0 < confidence < 1:
        raise ConfigurationError("A bootstrap needs a user, a resample, and a confidence between 0 and 1.")
    generator = np.random.default_rng(seed)
    uniform = np.full(num_users, 1.0 / num_users)
    differences = np.empty(num_resamples)
    for i in range(num_resamples):
        counts = generator.multinomial(num_users, uniform).astype(np.float64)
        differences[i] = metric_a(counts) - metric_b(counts)
    ones = np.ones(num_users)
    observed = metric_a(ones) - metric_b(ones)
    defined = differences[~np.isnan(differences)]
    if len(defined) == 0:
        return Difference(observed, float("nan"), float("nan"))
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Difference(observed, float(low), float(high))


def auc_difference(
    labels: Array,
    scores_a: Array,
    scores_b: Array,
    users: Array,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The difference in AUC over all events; labels, scores, and users are [E].

    Each side is sorted once; a resample then costs O(E).
    """
    num_users, index = _dense(users)
    return paired_bootstrap(
        resampled_auc(labels, scores_a, index),
        resampled_auc(labels, scores_b, index),
        num_users,
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
    )


def gauc_difference(
    labels: Array,
    scores_a: Array,
    scores_b: Array,
    users: Array,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The difference in GAUC; labels, scores, and users are [E]. Each user's AUC is computed once."""
    num_users, index = _dense(users)
    return paired_bootstrap(
        resampled_gauc(labels, scores_a, index),
        resampled_gauc(labels, scores_b, index),
        num_users,
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
    )


def mean_difference(
    values_a: Array,
    values_b: Array,
    users: Array,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The difference in the mean of values [N], such as hits or gains, that belong to users [N]."""
    num_users, index = _dense(users)
    return paired_bootstrap(
        resampled_mean(values_a, index),
        resampled_mean(values_b, index),
        num_users,
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
    )


def resampled_auc(labels: Array, scores: Array, users: Array) -> ResampledMetric:
    """AUC of the events [E], each as often as its user (INT64 [E], 0..num_users-1) was drawn."""
    check_scored_labels(labels, scores, users)
    order = np.argsort(scores, kind="stable")
    user, positive, score = users[order], (labels[order] == 1).astype(np.float64), scores[order]
    tie_starts = np.flatnonzero(np.append(True, score[1:] != score[:-1])) if len(score) else np.zeros(0, np.int64)
    has_ties = len(tie_starts) < len(score)

    def metric(counts: Float64Array) -> float:
        weight = counts[user]
        positives = weight * positive
        negatives = weight - positives
        if has_ties:
            positives, negatives = (
                np.add.reduceat(positives, tie_starts),
                np.add.reduceat(negatives, tie_starts),
            )
        below = np.cumsum(negatives) - 0.5 * negatives
        pairs = float(positives.sum() * negatives.sum())
        return float(positives @ below) / pairs if pairs > 0 else float("nan")

    return metric


def resampled_gauc(labels: Array, scores: Array, users: Array) -> ResampledMetric:
    """GAUC over the users (INT64 [E] in 0..num_users-1) drawn, each as often as it was drawn."""
    names, aucs, sizes = group_aucs(labels, scores, users)
    both = ~np.isnan(aucs)
    names, aucs, weight = names[both], aucs[both], sizes[both].astype(np.float64)
    return _ratio(names, aucs * weight, weight)


def resampled_mean(values: Array, users: Array) -> ResampledMetric:
    """The mean of values [N], each as often as its user (INT64 [N] in 0..num_users-1) was drawn."""
    if values.ndim != 1 or values.shape != users.shape:
        raise ConfigurationError("Values and users must be one-dimensional and of equal length.")
    names, index = np.unique(users, return_inverse=True)
    return _ratio(names, np.bincount(index, values, len(names)), np.bincount(index, minlength=len(names)))


def _ratio(users: Array, numerator: Array, denominator: Array) -> ResampledMetric:
    """Sum of the drawn users' numerators over the sum of their denominators."""

    def metric(counts: Float64Array) -> float:
        drawn = counts[users]
        total = float(drawn @ denominator)
        return float(drawn @ numerator) / total if total > 0 else float("nan")

    return metric


def _dense(users: Array) -> tuple[int, Array]:
    """The number of distinct users and INT64 [E] indices 0.. of them: only users with data are drawn."""
    names, index = np.unique(users, return_inverse=True)
    return len(names), index
