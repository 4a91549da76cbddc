"""Rankings of real users' requests beside the reference's, whatever ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from export.differences import compare_requests
from export.requests import LabelledRequest
from export.rows import random_rows
from mtgr.checkpoint import Checkpoint
from tests.unit.models import small_catalog, small_config, small_schema, spread_model


def test_rankings_are_compared_with_the_reference_by_correlation_and_auc() -> None:
    config, schema, catalog = small_config(), small_schema(), small_catalog()
    checkpoint = Checkpoint(spread_model(config, schema, catalog), config, schema, catalog)
    generator = np.random.default_rng(0)
    requests = []
    for _ in range(4):
        context, candidates = (rows.numpy() for rows in random_rows(schema, catalog, 1, 20, 12, generator))
        labels = generator.integers(0, 2, (12, len(schema.tasks)), dtype=np.int8)
        labels[:, 1] = 0  # a task without a positive has no AUC
        requests.append(LabelledRequest(context, candidates, labels))

    def rank(request: LabelledRequest) -> Any:
        with torch.inference_mode():
            return checkpoint.model(torch.from_numpy(request.context), torch.from_numpy(request.candidates))[0].numpy()

    spearman, aucs = compare_requests(rank, checkpoint, requests)
    assert spearman == pytest.approx(1)
    assert list(aucs) == [name for task, name in enumerate(schema.task_names) if task != 1]
    assert all(before == after for before, after in aucs.values())
    spearman, reversed_aucs = compare_requests(lambda request: 1 - rank(request), checkpoint, requests)
    assert spearman == pytest.approx(-1)
    for name, (before, after) in reversed_aucs.items():
        assert (before, after) == (aucs[name][0], pytest.approx(1 - before))
