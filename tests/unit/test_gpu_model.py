"""The whole network and its products without a GPU: every path runs and is right, and floors count what is done."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from export.graphs import rank_graph
from mtgr.config import preset
from perf.gpu_linear import linear
from perf.gpu_measure import Ceilings
from perf.gpu_model import COMPILED, EAGER, PRECISIONS, Work, model, work_of
from tests.unit.models import batch, random_user, small_catalog, small_config, small_schema, spread_model

CEILINGS = Ceilings({"fp32": 1e12, "bf16": 1e12, "fp16": 1e12, "fp8": 2e12}, 1e10)


def test_every_path_is_timed_and_right() -> None:
    figures = list(model(CEILINGS, True, 0))
    named = [f"compiled {precision}" for precision in PRECISIONS]
    for kind, others in (("device", [COMPILED, EAGER]), ("call", [COMPILED])):
        for users in (8, 1):
            part = {one.name: one for one in figures if one.shape.startswith(f"{kind}, B {users},")}
            assert set(part) == {*named, *others}
            for one in part.values():
                assert one.samples_ms, one.note
                assert one.error is not None
                assert (one.error > 0) == (one.name != EAGER)
                assert one.holds in (True, None), one.line()
                assert set(one.versus) == set(others) - {one.name}
    assert sum(one.holds is None for one in figures) == 2  # the reference itself, at both batch sizes


def test_products_are_timed_and_right() -> None:
    figures = {one.name: one for one in linear(CEILINGS, True, 0)}
    assert figures["fused silu"].holds
    assert figures["fp8 silu"].error == figures["fp8 silu, rounded before"].error
    assert all(one.samples_ms or one.name == "cublas fp8 by blocks" for one in figures.values())


def test_the_floor_counts_the_products() -> None:
    """PyTorch counts the same in the exported network where all context tokens see each other, as no pair is hidden."""
    config, context, candidates = small_config(num_layers=3), 23, 9
    network = rank_graph(spread_model(config, small_schema(), small_catalog()))
    generator = np.random.default_rng(0)
    rows = batch([random_user(small_schema(), generator, history=20, realtime=0, candidates=9) for _ in range(2)])
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(*rows)
    counts = counter.get_flop_counts()
    blocks = [counts[f"RankGraph.{name}"] for name in ("model.blocks.0", "model.blocks.1", "last")]
    work = work_of(config, 2, context, context, candidates)
    assert work.linear == sum(block[torch.ops.aten.addmm] for block in blocks)
    own = 2 * candidates * 4 * config.d_model * 3  # elementwise, so not counted as a product
    assert work.attention == sum(block[torch.ops.aten.bmm] for block in blocks) + own
    # 10 static tokens see each other, the token after them 11, and so on.
    pairs = 10 * 10 + sum(range(11, 24)) + candidates * 24
    hidden = context * context + candidates * 24 - pairs
    fewer = work_of(config, 2, 10, context, candidates)
    assert work.attention - fewer.attention == 2 * 4 * config.d_model * 2 * hidden


def test_fp8_halves_the_linear_part_alone() -> None:
    work = Work(linear=2e9, attention=1e9, weights=1.0)
    assert work.floor_ms(CEILINGS, "bf16") == pytest.approx(3.0)
    assert work.floor_ms(CEILINGS, "fp8") == pytest.approx(2.0)
    assert Work(1.0, 1.0, 1e9).floor_ms(CEILINGS, "bf16") == pytest.approx(200.0)
    assert work_of(preset("large"), 8, 1000, 1100, 256).linear == pytest.approx(
        8 * 2 * 5 * 768**2 * 1356 * 14, rel=0.04
    )
