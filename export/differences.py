"""How far answers lie from the reference: at random rows, and at requests of real users."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.precision import mean_spearman
from export.requests import LabelledRequest
from mtgr.checkpoint import Checkpoint
from mtgr.evaluation.metrics import auc
from mtgr.schema import FIRST_ID

# Batch, context, and candidates of the shapes that every artifact is checked at.
SHAPES = ((1, 1, 1), (1, 7, 3), (2, 64, 16), (3, 130, 5), (4, 200, 64), (1, 512, 256))
COMPARED_REQUESTS = 64  # of real users, to compare rankings and AUC on

Answer = Mapping[str, np.ndarray[Any, Any]]


def rank_error(answer: Answer, checkpoint: Checkpoint, context: Tensor, candidates: Tensor) -> float:
    """Largest difference of task scores."""
    with torch.inference_mode():
        expected = checkpoint.model(context, candidates).numpy()
    return _difference(answer["task_scores"], expected)


def retrieve_error(answer: Answer, checkpoint: Checkpoint, context: Tensor, candidates: Tensor) -> float:
    """Largest difference of cosine similarities: of the item at each place, and of the score beside it.

    Items of almost equal score may change places; the similarity of what stands at a place may not differ.
    """
    with torch.inference_mode():
        logits = checkpoint.model.next_item_logits(context).numpy()
        expected = checkpoint.model.retrieve(context)[1].numpy()
    items = answer["items"].astype(np.int64) - FIRST_ID
    distinct = all(len(np.unique(row)) == len(row) for row in items)
    if items.shape != expected.shape or not distinct or items.min() < 0 or items.max() >= logits.shape[1]:
        return float("inf")
    found = np.take_along_axis(logits, items, axis=1)
    return checkpoint.config.temperature * max(_difference(found, expected), _difference(answer["scores"], expected))


def _difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max(initial=0.0)) if np.isfinite(found).all() else float("inf")


def compare_requests(
    rank: Callable[[LabelledRequest], npt.NDArray[Any]], checkpoint: Checkpoint, requests: Sequence[LabelledRequest]
) -> tuple[float, dict[str, tuple[float, float]]]:
    """Compare rankings of real users' requests.

    Args:
        rank: Task scores, FP32 [k, T], of a request.
        checkpoint: The reference.
        requests: At least one.

    Returns:
        Rank correlation with the reference, and by task the AUC of the reference and of ``rank``.
    """
    found, expected = [], []
    for request in requests:
        found.append(rank(request))
        with torch.inference_mode():
            rows = torch.from_numpy(request.context), torch.from_numpy(request.candidates)
            expected.append(checkpoint.model(*rows).numpy()[0])
    labels = np.concatenate([request.labels for request in requests])
    before, after = np.concatenate(expected), np.concatenate(found)
    aucs = {
        name: (auc(labels[:, task], before[:, task]), auc(labels[:, task], after[:, task]))
        for task, name in enumerate(checkpoint.schema.task_names)
        if 0 < labels[:, task].mean() < 1
    }
    return mean_spearman(found, expected), aucs
