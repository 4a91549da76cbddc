"""Least costs, against figures counted by hand."""

from __future__ import annotations

import pytest

from mtgr.config import ModelConfig
from perf.floors import Accelerator, floor

CONFIG = ModelConfig(num_layers=2, d_model=4, num_heads=1, attention_norm_length=8)
GPU = Accelerator("toy", flops=1e6, bandwidth=1e6, fp8_flops=2e6)


def test_a_cold_request() -> None:
    found = floor(CONFIG, context=3, candidates=2, gpu=GPU)
    # A layer has 4 x 16 + 4 x 4 weights; five tokens; 3 x 3 + 2 x 4 pairs, four times the width each.
    assert found.flops == 2 * (2 * 80 * 5) + 2 * (4 * 4 * 17)
    assert found.bytes == 2 * 80 * 2 + 2 * (2 * 4 * 2) * 3
    assert found.milliseconds == pytest.approx(found.flops / 1e3)


def test_a_cached_context_is_read_and_not_computed() -> None:
    cold, warm = (floor(CONFIG, context=512, candidates=64, cached=cached, gpu=GPU) for cached in (0, 512))
    assert warm.flops == 2 * (2 * 80 * 64) + 2 * (4 * 4 * 64 * 513)
    assert warm.bytes == cold.bytes
    assert warm.milliseconds < cold.milliseconds


def test_fp8_is_of_linear_layers_only() -> None:
    wide, fp8 = (floor(CONFIG, context=3, candidates=2, gpu=GPU, is_fp8=is_fp8) for is_fp8 in (False, True))
    assert fp8.flops == wide.flops
    assert wide.bytes - fp8.bytes == 2 * 80
    assert fp8.milliseconds == pytest.approx((2 * (2 * 80 * 5) / 2 + 2 * (4 * 4 * 17)) / 1e3)
