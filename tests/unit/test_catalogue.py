"""Retrieval on a catalogue that was computed beforehand."""

from __future__ import annotations

import numpy as np
import torch

from export.rows import random_rows
from mtgr.config import ModelConfig
from perf.synthetic import synthetic_checkpoint


def test_answers_are_the_same_to_the_last_bit_and_weights_are_not_read_again() -> None:
    model = synthetic_checkpoint(ModelConfig(num_layers=1, d_model=32, num_heads=2), num_items=500, seed=0)
    context, _ = random_rows(model.schema, model.catalog, 3, 40, 1, np.random.default_rng(0))
    network = model.model
    saved = set(network.state_dict())
    with torch.inference_mode():
        items, scores = network.retrieve(context)
        network.keep_constants()
        again, scores_again = network.retrieve(context)
        network.embedding.item.table.weight += 1.0
        network.embedding.item.project.weight.zero_()
        catalogue = network.catalogue
        network.keep_constants()
    assert torch.equal(items, again)
    assert torch.equal(scores, scores_again)
    assert not torch.equal(catalogue, network.catalogue)
    assert set(network.state_dict()) == saved
