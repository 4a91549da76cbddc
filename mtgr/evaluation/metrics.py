"""Offline metrics in NumPy: AUC over events, AUC within users, and hit rate and NDCG of a held-out item."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.data.dataset import BoolArray, Int64Array, Interactions
from mtgr.data.split import history_bounds
from mtgr.errors import ConfigurationError

Float64Array = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


def auc(labels: Array, scores: Array) -> float:
    """The share of (positive, negative) pairs that the scores order rightly, a tie counted half.

    Args:
        labels: [E] of 0 and 1.
        scores: [E], any monotone scale.

    Returns:
        AUC in 0..1; nan if either class is missing.

    Raises:
        ConfigurationError: Lengths differ, a label is neither 0 nor 1, or a score is NaN.
    """
    return float(_segment_aucs(labels, scores, np.zeros(len(labels), dtype=np.int64), 1)[0])


def group_aucs(labels: Array, scores: Array, groups: Array) -> tuple[Array, Float64Array, Int64Array]:
    """AUC within each group.

    Args:
        labels: [E] of 0 and 1.
        scores: [E].
        groups: [E] of any sortable ids, here users.

    Returns:
        The distinct groups [G] in ascending order, FP64 [G] AUC (nan if the group lacks a class), INT64 [G]
        events.

    Raises:
        ConfigurationError: As for ``auc``.
    """
    names, index = np.unique(groups, return_inverse=True)
    aucs = _segment_aucs(labels, scores, index, len(names))
    return names, aucs, np.bincount(index, minlength=len(names)).astype(np.int64)


def gauc(labels: Array, scores: Array, groups: Array) -> float:
    """The mean AUC within groups that have both labels, weighted by their events; nan without such a group.

    It asks what a ranking for one user needs; AUC over all events also rewards telling generous users from
    strict ones. Arguments and errors are those of ``group_aucs``.
    """
    _, aucs, sizes = group_aucs(labels, scores, groups)
    both = ~np.isnan(aucs)
    return float(np.average(aucs[both], weights=sizes[both])) if np.any(both) else float("nan")


def target_ranks(scores: Array, target_index: Int64Array, exclude: BoolArray | None = None) -> Float64Array:
    """Rank of each query's one relevant item among the items that are not excluded.

    Ties are pessimistic: every other item with the target's score ranks ahead of it, so that constant scores
    earn nothing.

    Args:
        scores: [N, num_items].
        target_index: INT64 [N], the target's column.
        exclude: BOOL [N, num_items], items a recommender would not show, such as those already seen.

    Returns:
        FP64 [N] ranks from 1; infinity where the target itself is excluded, since it is never shown.

    Raises:
        ConfigurationError: Shapes do not fit or a score is NaN.
    """
    if scores.ndim != 2 or target_index.shape != scores.shape[:1]:
        raise ConfigurationError("Ranks need scores of shape [N, num_items] and one target index for each row.")
    if exclude is not None and exclude.shape != scores.shape:
        raise ConfigurationError("The mask of excluded items must have the shape of the scores.")
    _reject_nan(scores)
    rows = np.arange(len(scores))
    ahead = scores >= scores[rows, target_index][:, None]
    ahead[rows, target_index] = False
    if exclude is None:
        exclude = np.zeros_like(ahead)
    ranks: Float64Array = 1.0 + (ahead & ~exclude).sum(axis=1, dtype=np.float64)
    ranks[exclude[rows, target_index]] = np.inf
    return ranks


def hits_at_k(ranks: Array, k: int) -> Float64Array:
    """FP64 [N]: 1 where the relevant item is among the first ``k``, else 0."""
    return (np.asarray(ranks) <= k).astype(np.float64)


def hit_rate_at_k(ranks: Array, k: int) -> float:
    """The share of queries whose relevant item ranks (from 1) among the first ``k``; nan without queries."""
    return _mean(hits_at_k(ranks, k))


def gains_at_k(ranks: Array, k: int) -> Float64Array:
    """FP64 [N]: NDCG of each query, 1 / log2(rank + 1) among the first ``k``, else 0; the ideal is 1."""
    ranks = np.asarray(ranks, dtype=np.float64)
    return np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0)


def ndcg_at_k(ranks: Array, k: int) -> float:
    """The mean NDCG over queries with one relevant item each, from its rank (from 1); nan without queries."""
    return _mean(gains_at_k(ranks, k))


def seen_mask(known: Interactions, user: Int64Array, before: Int64Array, item_ids: Int64Array) -> BoolArray:
    """BOOL [N, num_items]: the user has an event with the item strictly before the query's time.

    Args:
        known: Events sorted by (user, time).
        user: INT64 [N].
        before: INT64 [N], unix seconds.
        item_ids: INT64 [num_items], ascending; the columns.

    Raises:
        ConfigurationError: An event's item is not among ``item_ids``.
    """
    column = item_columns(known.item, item_ids)
    seen = np.zeros((len(user), len(item_ids)), dtype=np.bool_)
    for row, (start, end) in enumerate(zip(*history_bounds(known, user, before), strict=True)):
        seen[row, column[start:end]] = True
    return seen


def item_columns(item: Int64Array, item_ids: Int64Array) -> Int64Array:
    """INT64 [N]: positions of ``item`` in the ascending ``item_ids``; ConfigurationError if one is missing."""
    if len(item_ids) == 0:
        raise ConfigurationError("The catalogue is empty: pass every item id of the data set.")
    column = np.minimum(np.searchsorted(item_ids, item), len(item_ids) - 1).astype(np.int64)
    unknown = item[item_ids[column] != item]
    if len(unknown):
        raise ConfigurationError(
            f"Item {unknown[0]} is not in the catalogue: pass every item id of the data set, ascending."
        )
    return column


def check_scored_labels(labels: Array, scores: Array, users: Array) -> None:
    """Raise ConfigurationError unless the three are [E], labels are 0 or 1, and no score is NaN."""
    if labels.ndim != 1 or labels.shape != scores.shape or labels.shape != users.shape:
        raise ConfigurationError("Labels, scores, and groups must be one-dimensional and of equal length.")
    if not np.all((labels == 0) | (labels == 1)):
        raise ConfigurationError("Labels must be 0 or 1.")
    _reject_nan(scores)


def _segment_aucs(labels: Array, scores: Array, segment: Int64Array, num_segments: int) -> Float64Array:
    """FP64 [num_segments] AUC of the events in each segment, by the rank-sum statistic with mid-ranks."""
    check_scored_labels(labels, scores, segment)
    order = np.lexsort((scores, segment))
    labels, scores, segment = labels[order] == 1, scores[order], segment[order]
    starts_tie = np.ones(len(order), dtype=np.bool_)
    starts_tie[1:] = (segment[1:] != segment[:-1]) | (scores[1:] != scores[:-1])
    tie_start = np.flatnonzero(starts_tie)
    tie_end = np.append(tie_start[1:], len(order))
    mid_rank = ((tie_start + tie_end + 1) / 2)[np.cumsum(starts_tie) - 1]  # over all segments, from 1
    first = np.searchsorted(segment, np.arange(num_segments))
    positives = np.bincount(segment, labels, num_segments)
    negatives = np.bincount(segment, ~labels, num_segments)
    rank_sum = np.bincount(segment, labels * mid_rank, num_segments) - positives * first
    wins = rank_sum - positives * (positives + 1) / 2
    pairs = positives * negatives
    return np.divide(wins, pairs, out=np.full(num_segments, np.nan), where=pairs > 0)


def _reject_nan(scores: Array) -> None:
    if np.any(np.isnan(scores)):
        raise ConfigurationError("A score is NaN: a metric of such scores would look valid and mean nothing.")


def _mean(values: Float64Array) -> float:
    return float(values.mean()) if len(values) else float("nan")
