"""The plugin's embedding and heads of wide networks, against the reference network's.

Runs on whichever implementation serves: PyTorch, and the Triton kernels where Triton's interpreter is on, as the last
test has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mtgr.kernels.dispatch import use_triton
from mtgr.model import MTGR
from mtgr.schema import TYPE_COLUMN, TokenType
from mtgr.vllm_plugin import wanted_rows
from mtgr.vllm_plugin.wanted_rows import WantedRows
from tests.interpreted import NO_TRITON, run_interpreted
from tests.unit.models import random_user, small_catalog, small_config, small_schema, spread_model

PADDING = 5


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["mmoe", "shared_bottom"])
def network(request: pytest.FixtureRequest) -> MTGR:
    model = spread_model(small_config(heads=request.param), small_schema(), small_catalog()).requires_grad_(False)
    model.keep_constants()
    return model


@pytest.fixture(params=[0, 1024], ids=["many", "few"])
def many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanted_rows, "_MANY", request.param)


def step() -> tuple[Tensor, Tensor, Tensor]:
    """Rows, what they see and which are candidates, of three requests, one without candidates, and padding."""
    generator = np.random.default_rng(5)
    schema, rows, visible = small_schema(), [], []
    for history, realtime, k in ((150, 17, 9), (20, 0, 0), (90, 21, 33)):
        user = random_user(schema, generator, profile=3, history=history, realtime=realtime, candidates=k)
        rows += [user.context, user.candidates]
        visible.append(torch.full((len(user.context) + k,), len(user.context)))
    rows.append(np.zeros((PADDING, schema.width), dtype=np.int32))
    visible.append(torch.zeros(PADDING))
    whole = torch.from_numpy(np.concatenate(rows))
    return whole, torch.cat(visible).to(torch.int32), whole[:, TYPE_COLUMN] == TokenType.CANDIDATE


@pytest.mark.usefixtures("many")
def test_tokens_are_embedded_as_the_reference_does(network: MTGR) -> None:
    """Padding's too, and nothing is NaN."""
    rows, visible, is_candidate = step()
    got = WantedRows(network).embed(rows, visible, is_candidate)
    embedding = network.embedding
    expected = torch.zeros_like(got)
    expected[~is_candidate] = embedding.context(rows[~is_candidate])
    expected[is_candidate] = embedding.candidates(rows[is_candidate], visible[is_candidate])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("many")
def test_candidates_are_scored_as_the_reference_does(network: MTGR) -> None:
    rows, _, is_candidate = step()
    x = torch.randn(len(rows), network.config.d_model, generator=torch.Generator().manual_seed(0))
    expected = network.task_logits(x[is_candidate], rows[is_candidate])
    x[~is_candidate] = float("nan")
    shown = rows.masked_fill(~is_candidate[:, None], 0)
    got = WantedRows(network).task_logits(x, shown, is_candidate)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[is_candidate], expected, rtol=1e-5, atol=1e-5)


def test_only_wide_networks_on_a_gpu_have_them(network: MTGR) -> None:
    assert WantedRows.of(network) is None


def test_interpreted() -> None:
    """All of the above on the kernels."""
    if use_triton(torch.empty(0)):
        return
    pytest.importorskip("triton", reason=NO_TRITON)
    assert run_interpreted(Path(__file__)) >= 10
