"""Predictions of a model over samples, for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from mtgr.data.samples import Sample
from mtgr.features.context import context_rows
from mtgr.peers.zoo import Trainable
from mtgr.training.batches import batches
from mtgr.training.prepare import PreparedData

Float64Array = npt.NDArray[np.float64]

_BATCH_TOKENS = 16_384


def predict_tasks(model: Trainable, samples: Sequence[Sample], num_events: int) -> Float64Array:
    """Task probabilities of the samples' candidates.

    Returns:
        FP64 [num_events, T], NaN for events that are no sample's candidate.
    """
    result = np.full((num_events, samples[0].labels.shape[1]), np.nan)
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for batch in tqdm(batches(samples, _BATCH_TOKENS, None), desc="scoring", unit="batch", leave=False):
            logits, _ = model.training_outputs(batch.context.to(device), batch.candidates.to(device))
            result[batch.events.numpy()] = logits.double().sigmoid().cpu()[batch.valid].numpy()
    return result


def predict_next_items(model: Trainable, data: PreparedData) -> Float64Array:
    """Next-item scores of each user's last event on the context before it, as ``data.last_histories`` bounds it.

    Returns:
        FP64 [number of users with an event, items], in the order of ``data.last`` and of ascending item id.
    """
    users = data.interactions.user[data.last]
    starts, ends = data.last_histories()
    contexts = []
    for user, start, end in zip(users.tolist(), starts.tolist(), ends.tolist(), strict=True):
        before = slice(start, end)
        items = data.catalog.to_internal(data.interactions.item[before])
        contexts.append(
            context_rows(
                data.schema,
                data.users[user].profile,
                items,
                data.interactions.action[before],
                data.interactions.time[before],
            )
        )
    result = np.empty((len(contexts), len(data.catalog.raw_ids)))
    device = next(model.parameters()).device
    model.eval()
    order = np.argsort([len(rows) for rows in contexts], kind="stable")
    with torch.inference_mode():
        for chunk in tqdm(
            np.array_split(order, max(1, len(order) // 32)), desc="retrieving", unit="batch", leave=False
        ):
            longest = max(len(contexts[index]) for index in chunk)
            padded = np.zeros((len(chunk), longest, data.schema.width), dtype=np.int32)
            for row, index in enumerate(chunk):
                padded[row, : len(contexts[index])] = contexts[index]
            result[chunk] = model.next_item_logits(torch.from_numpy(padded).to(device)).double().cpu().numpy()
    return result
