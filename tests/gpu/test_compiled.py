"""The compiled engine on a GPU: kernels and CUDA graphs against the reference on the CPU, in every precision."""

from __future__ import annotations

import copy
import gc
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.fp8 import fp8_in_pytorch
from export.precision import typed
from mtgr.checkpoint import Checkpoint, save_checkpoint
from mtgr.engines.baseline import BaselineEngine
from mtgr.engines.compiled import CompiledEngine
from mtgr.engines.compiled_graphs import Shape
from mtgr.engines.compiled_network import CompiledPrecision
from mtgr.kernels.dispatch import capability_of
from mtgr.model import MTGR
from mtgr.schema import TYPE_COLUMN, TokenType
from tests.unit.models import batch, random_user, small_catalog, small_config, small_schema, spread_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU here.")]

SCHEMA, CATALOG = small_schema(max_history=400), small_catalog()
# Heads of 32 (padded from 24), 64 and 256, as the kernels take them apart.
CONFIGS: dict[str, dict[str, Any]] = {
    "narrow": {"d_model": 48, "num_heads": 2},
    "two_heads": {"d_model": 128, "num_heads": 2, "num_layers": 3},
    "wide_heads": {"d_model": 768, "num_heads": 3},
    "causal": {"d_model": 128, "num_heads": 2, "static_attention": "causal"},
    "bias": {"d_model": 64, "relative_bias": True},
}
# Batch, longest context and candidates: several buckets, and one twice.
SHAPES = ((1, 64, 16), (3, 190, 40), (8, 300, 100), (2, 64, 16), (3, 190, 40))


@pytest.fixture(scope="module", params=CONFIGS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    model = spread_model(small_config(**CONFIGS[request.param]), SCHEMA, CATALOG).requires_grad_(False)
    save_checkpoint(Checkpoint(model, model.config, SCHEMA, CATALOG), path)
    return path


def requests(seed: int) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    made = []
    for users, context, candidates in SHAPES:
        rows = []
        for user in range(users):
            n = context if user == 0 else int(generator.integers(1, context + 1))
            profile = min(3, n)
            realtime = int(generator.integers(0, min(100, n - profile) + 1))
            sizes = {"profile": profile, "history": n - profile - realtime, "realtime": realtime}
            k = candidates if user == 0 else int(generator.integers(1, candidates + 1))
            rows.append(random_user(SCHEMA, generator, candidates=k, **sizes))
        made.append(dict(zip(("context", "candidates"), (part.numpy() for part in batch(rows)), strict=True)))
    return made


def native(model: MTGR, precision: CompiledPrecision) -> MTGR:
    if precision == "fp8":
        return typed(fp8_in_pytorch(model, spares_last=True), "fp16")
    return copy.deepcopy(model) if precision == "fp32" else typed(model, precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8"])
def test_graphs_answer_as_the_reference(directory: Path, precision: CompiledPrecision) -> None:
    """More shapes than graphs that are kept, ranking and retrieval in turn: nothing stale is left in shared memory."""
    if precision == "fp8" and capability_of(torch.device("cuda")) < 89:
        pytest.skip("This GPU has no FP8.")
    torch.backends.cuda.matmul.allow_tf32 = False
    reference, engine = BaselineEngine(directory), CompiledEngine(directory, "cuda", precision, max_graphs=2)
    twin = native(reference.model, precision).cuda()
    errors, allowed = [], [5e-6]  # 1e-5 in FP32
    for inputs in requests(0) + requests(1):
        valid = inputs["candidates"][..., TYPE_COLUMN] != TokenType.PADDING
        wanted = reference.infer(inputs)["task_scores"][valid]
        found = engine.infer(inputs)["task_scores"]
        assert found.shape[:2] == valid.shape
        errors.append(np.abs(found[valid] - wanted).max())
        rows = (torch.from_numpy(inputs[name]).cuda() for name in ("context", "candidates"))
        allowed.append(np.abs(twin(*rows).detach().cpu().numpy()[valid] - wanted).max())
        context = {"context": inputs["context"]}
        retrieved, best = engine.infer(context), reference.infer(context)
        assert retrieved["items"].shape == best["items"].shape
        if precision == "fp32":
            np.testing.assert_allclose(retrieved["scores"], best["scores"], rtol=0, atol=5e-4)
            assert (retrieved["items"] != best["items"]).mean() < 0.05
    assert max(errors) <= (1e-5 if precision == "fp32" else 2 * max(allowed)), (errors, allowed)


def test_warm_up_captures_what_is_asked_next(directory: Path) -> None:
    engine = CompiledEngine(directory, "cuda", "fp16")
    engine.warm_up([("rank", 8, 384, 256), ("retrieve", 1, 64, 0)])
    assert engine._graphs is not None
    captured = set(engine._graphs._graphs)
    engine.infer(requests(0)[2] | {"candidates": np.zeros((8, 256, SCHEMA.width), dtype=np.int32)})
    assert set(engine._graphs._graphs) == captured
    zeros = {name: np.zeros_like(rows) for name, rows in requests(0)[0].items()}
    assert np.isfinite(engine.infer(zeros)["task_scores"]).all()


def test_batches_under_way_do_not_mix(directory: Path) -> None:
    """As many at a time as may be, of the same graph and of others: each gets what it gets alone."""
    engine = CompiledEngine(directory, "cuda", "fp16")
    batches = [inputs for seed in range(6) for inputs in requests(seed)]
    alone = [engine.infer(inputs)["task_scores"] for inputs in batches]
    for first, second in zip(range(len(batches)), range(1, len(batches)), strict=False):
        pending = [engine.submit(batches[index]) for index in (first, second)]
        for index, one in zip((first, second), pending, strict=True):
            np.testing.assert_allclose(one.wait()["task_scores"], alone[index], rtol=0, atol=1e-6)


def test_a_shape_that_comes_often_is_captured_in_a_pause(directory: Path) -> None:
    """By another thread than the one that asks, beside a graph in the same memory; nothing outlives the engine."""
    told: list[str] = []
    engine = CompiledEngine(directory, "cuda", "fp16", log=told.append)
    engine.warm_up([("rank", 4, 192, 64)], measure=False)
    assert engine._graphs is not None
    assert engine._pauses is not None
    graphs, thread = engine._graphs._graphs, engine._pauses._thread
    three = requests(0)[1]
    two = {name: rows[:2] for name, rows in three.items()}
    valid = three["candidates"][..., TYPE_COLUMN] != TokenType.PADDING
    wanted = engine.infer(three)["task_scores"]
    for _ in range(101):
        engine.infer(two)
    assert set(graphs) == {Shape(4, 192, 64)}
    assert not told
    end = time.monotonic() + 60
    while not told and time.monotonic() < end:
        time.sleep(0.05)
    assert "in a pause" in told[0]
    assert set(graphs) == {Shape(4, 192, 64), Shape(2, 192, 64)}
    for rows in (two, three, two):
        found = engine.infer(rows)["task_scores"]
        users = len(found)
        np.testing.assert_allclose(found[valid[:users]], wanted[:users][valid[:users]], rtol=0, atol=1e-3)
    del engine, graphs
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
