"""Batches of samples of like length, padded on the right."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtgr.data.samples import Sample


@dataclass(frozen=True)
class Batch:
    """Samples padded to their longest.

    Attributes:
        context: INT32 [B, n, W].
        candidates: INT32 [B, k, W].
        labels: FP32 [B, k, T].
        weights: FP32 [B, k, T], weights of the labels in the loss, 0 for padding.
        valid: BOOL [B, k], which candidates are not padding.
        next_items: INT64 [B, n], 0 where there is no label.
        events: INT64 [number of valid candidates], their events in row-major order.
    """

    context: Tensor
    candidates: Tensor
    labels: Tensor
    weights: Tensor
    valid: Tensor
    next_items: Tensor
    events: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        moved = {field.name: getattr(self, field.name).to(device) for field in dataclasses.fields(self)}
        return Batch(**moved)


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad samples to one batch."""
    size = len(samples)
    n = max(len(sample.context) for sample in samples)
    k = max(len(sample.candidates) for sample in samples)
    width, tasks = samples[0].context.shape[1], samples[0].labels.shape[1]
    context = np.zeros((size, n, width), dtype=np.int32)
    candidates = np.zeros((size, k, width), dtype=np.int32)
    labels = np.zeros((size, k, tasks), dtype=np.float32)
    weights = np.zeros((size, k, tasks), dtype=np.float32)
    valid = np.zeros((size, k), dtype=bool)
    next_items = np.zeros((size, n), dtype=np.int64)
    for row, sample in enumerate(samples):
        context[row, : len(sample.context)] = sample.context
        candidates[row, : len(sample.candidates)] = sample.candidates
        labels[row, : len(sample.candidates)] = sample.labels
        weights[row, : len(sample.candidates)] = sample.weights
        valid[row, : len(sample.candidates)] = True
        next_items[row, : len(sample.context)] = sample.next_items
    events = np.concatenate([sample.events for sample in samples])
    return Batch(
        context=torch.from_numpy(context),
        candidates=torch.from_numpy(candidates),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights),
        valid=torch.from_numpy(valid),
        next_items=torch.from_numpy(next_items),
        events=torch.from_numpy(events),
    )


def plan_batches(samples: Sequence[Sample], max_tokens: int, generator: np.random.Generator | None) -> list[list[int]]:
    """Indices of samples by batch, so that a batch holds samples of like length and at most ``max_tokens`` tokens.

    Args:
        samples: The samples.
        max_tokens: Tokens of a padded batch; a longer sample stands alone.
        generator: Shuffles batches, and samples of like length among themselves; None keeps them sorted.
    """
    lengths = np.array([len(sample.context) + len(sample.candidates) for sample in samples], dtype=np.float64)
    keys = lengths if generator is None else lengths * generator.uniform(0.9, 1.1, len(lengths))
    batches: list[list[int]] = []
    current: list[int] = []
    longest = 0
    for index in np.argsort(keys, kind="stable").tolist():
        longest = max(longest, int(lengths[index]))
        if current and longest * (len(current) + 1) > max_tokens:
            batches.append(current)
            current, longest = [], int(lengths[index])
        current.append(index)
    batches.append(current)
    if generator is not None:
        generator.shuffle(batches)
    return batches


def batches(samples: Sequence[Sample], max_tokens: int, generator: np.random.Generator | None) -> Iterator[Batch]:
    """Iterate over collated batches."""
    for indices in plan_batches(samples, max_tokens, generator):
        yield collate([samples[index] for index in indices])
