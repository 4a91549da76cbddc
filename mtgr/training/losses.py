"""Losses: binary cross-entropy per task and sampled softmax for the next item."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.peers.zoo import Trainable
from mtgr.schema import FIRST_ID

# Stands for minus infinity where all logits may be masked: of infinities alone, logsumexp has no gradient.
_MASKED = -1e4


def task_loss(logits: Tensor, labels: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """Weighted binary cross-entropy, averaged over valid candidates and summed over tasks.

    Args:
        logits: FP32 [B, k, T].
        labels: FP32 [B, k, T].
        weights: FP32 [B, k, T], 0 where not valid.
        valid: BOOL [B, k].
    """
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (losses * weights).sum() / valid.sum().clamp(min=1)


def next_item_loss(
    model: Trainable,
    queries: Tensor,
    next_items: Tensor,
    context_items: Tensor,
    num_negatives: int,
    generator: torch.Generator,
) -> Tensor:
    """Softmax cross-entropy of the next item against items that the user has no event with in this window.

    Earlier items are left out because the door does not recommend what was seen, later ones because they would be
    right answers too. Of a large catalogue the rivals are a uniform sample, shared by the batch; as it is uniform, it
    needs no log-Q correction but one constant, with which the loss estimates that of the whole catalogue.

    Args:
        model: The network, for its item vectors.
        queries: Float [B, n, item_dim], unit vectors from the context's outputs.
        next_items: INT64 [B, n], 0 where there is no label.
        context_items: INT [B, n], items of the context's events, 0 elsewhere.
        num_negatives: Sampled items; all of the catalogue from its size on.
        generator: Source of the negatives.
    """
    wanted = next_items > 0
    query, label = queries[wanted], next_items[wanted]
    if not len(label):
        return queries.sum() * 0.0
    head, vectors = model.next_item_head, model.embedding.item.all()
    num_items = len(vectors) - FIRST_ID
    if num_negatives >= num_items:
        rivals, correction = torch.arange(FIRST_ID, len(vectors), device=queries.device), 0.0
    else:
        # Drawn on the CPU, so that a run draws the same on every device.
        rivals = (torch.randperm(num_items, generator=generator)[:num_negatives] + FIRST_ID).to(queries.device)
        correction = math.log(num_items / num_negatives)
    own = torch.zeros(len(queries), len(vectors), dtype=torch.bool, device=queries.device).scatter_(
        1, context_items.long(), True
    )
    window = wanted.nonzero()[:, 0]
    masked = own[:, rivals][window] | (rivals == label[:, None])
    logits = head(query, vectors[rivals], head.bias[rivals]).masked_fill(masked, _MASKED)
    positive = (query * F.normalize(vectors[label], dim=-1)).sum(dim=-1) / model.config.temperature + head.bias[label]
    # -log(e^p / (e^p + sum of e^rival)), written so that it needs no second pass over the rivals.
    return F.softplus(logits.logsumexp(dim=1) + correction - positive).mean()
