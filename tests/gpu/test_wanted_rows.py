"""Wide layers of wanted rows alone, and a wide network's embedding and heads, on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from export.precision import typed
from mtgr.kernels.linear import linear_silu
from mtgr.kernels.rows_linear import HOPPER_TILE, rows_linear
from mtgr.schema import TYPE_COLUMN, TokenType
from mtgr.vllm_plugin.wanted_rows import WantedRows
from tests.unit.models import random_user, small_catalog, small_config, small_schema, spread_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU here.")]

WIDTH = 8192
# Tokens and the ends of requests with 256 candidates each: of one, of two that end amid tiles, of none.
STEPS = {"one": (2304, (2304,)), "two": (2300, (700, 2299)), "none": (1024, ())}
CANDIDATES = 256


def mask(tokens: int, ends: tuple[int, ...]) -> Tensor:
    wanted = torch.zeros(tokens, dtype=torch.bool, device="cuda")
    for end in ends:
        wanted[end - CANDIDATES : end] = True
    return wanted


def layer(columns: int, depth: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    weight = torch.randn(columns, depth, generator=generator, device="cuda") * depth**-0.5
    return weight.bfloat16(), torch.randn(columns, generator=generator, device="cuda").bfloat16()


def inputs(tokens: int, depth: int) -> Tensor:
    return torch.randn(tokens, depth, generator=torch.Generator("cuda").manual_seed(0), device="cuda").bfloat16()


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("depth", [1856, WIDTH, 1000, 1001])
@pytest.mark.parametrize("is_silu", [False, True])
def test_nan_in_other_rows_gets_nowhere(name: str, depth: int, is_silu: bool) -> None:
    """Wanted rows are finite and no further from FP32 than twice PyTorch's."""
    tokens, ends = STEPS[name]
    wanted, x = mask(tokens, ends), inputs(tokens, depth)
    weight, bias = layer(4096, depth, 1)
    exact = F.linear(x.float(), weight.float(), bias.float())[wanted]
    native = linear_silu(x, weight, bias, fused=False) if is_silu else F.linear(x, weight, bias)
    exact = F.silu(exact) if is_silu else exact
    x[~wanted] = float("nan")
    got = rows_linear(x, weight, bias, wanted, is_silu=is_silu)[wanted]
    assert got.isfinite().all()
    if len(got):
        assert (got - exact).abs().max() <= 2 * (native[wanted] - exact).abs().max()
        # Rounded in the same places, nearly all are equal: sums differ by their order alone. At odd depths PyTorch has
        # a product that rounds in between.
        assert depth % 8 or (got == native[wanted]).float().mean() >= 0.97


@pytest.mark.parametrize("name", STEPS)
def test_other_tiles_are_left(name: str) -> None:
    from mtgr.kernels.triton_linear import linear_launch

    tokens, ends = STEPS[name]
    wanted, x = mask(tokens, ends), inputs(tokens, WIDTH)
    weight, bias = layer(WIDTH, WIDTH, 2)
    out = torch.full((tokens, WIDTH), 77.0, dtype=torch.bfloat16, device="cuda")
    linear_launch(x, weight, bias, out, is_silu=False, wanted=wanted, tile=HOPPER_TILE).run()
    rows = HOPPER_TILE[0]
    tiles = F.pad(wanted, (0, -tokens % rows)).unflatten(0, (-1, rows)).any(dim=1)
    computed = tiles.repeat_interleave(rows)[:tokens]
    assert (out[~computed] == 77.0).all()
    assert (out[computed] != 77.0).all()


def test_a_graph_reads_the_mask_anew() -> None:
    """Two layers, captured once, serve a step whose candidates stand elsewhere."""
    tokens, ends = STEPS["two"]
    wanted, x = mask(tokens, ()), inputs(tokens, WIDTH)
    first, second = layer(WIDTH, WIDTH, 3), layer(WIDTH, WIDTH, 4)

    def run() -> Tensor:
        return rows_linear(rows_linear(x, *first, wanted, is_silu=True), *second, wanted, is_silu=False)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    expected = F.linear(F.silu(F.linear(x, *first)), *second)
    for these in (ends, (2300,)):
        wanted.copy_(mask(tokens, these))
        out.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(out[wanted], expected[wanted], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("heads", ["mmoe", "shared_bottom"])
def test_a_wide_network_answers_as_before(heads: str) -> None:
    """Embedding and scores no further from FP32 than twice what PyTorch makes of BF16; what nobody reads is NaN."""
    schema, generator = small_schema(max_history=400), np.random.default_rng(0)
    sizes = {"d_model": 2048, "num_heads": 2, "num_layers": 1, "feature_dim": 64, "item_dim": 512, "head_dim": 1024}
    exact = spread_model(small_config(heads=heads, **sizes), schema, small_catalog()).requires_grad_(False).cuda()
    network = typed(exact, "bf16").cuda()
    exact.keep_constants()
    network.keep_constants()
    wide = WantedRows.of(network)
    assert wide is not None
    users = [random_user(schema, generator, profile=3, history=350, realtime=20, candidates=90) for _ in range(3)]
    rows = torch.from_numpy(np.concatenate([part for user in users for part in (user.context, user.candidates)])).cuda()
    visible = torch.full((len(rows),), 373, dtype=torch.int32, device="cuda")
    is_candidate = rows[:, TYPE_COLUMN] == TokenType.CANDIDATE
    assert len(rows) >= 1024

    def reference(model: torch.nn.Module) -> Tensor:
        embedding = model.embedding
        found = torch.zeros(len(rows), 2048, dtype=embedding.position_table.weight.dtype, device="cuda")
        found[~is_candidate] = embedding.context(rows[~is_candidate])
        found[is_candidate] = embedding.candidates(rows[is_candidate], visible[is_candidate])
        return found

    with torch.inference_mode():
        truth, native = reference(exact), reference(network)
        torch.use_deterministic_algorithms(True, warn_only=True)  # new memory holds NaN
        try:
            got = wide.embed(rows, visible, is_candidate)
            x = native.masked_fill(~is_candidate[:, None], float("nan"))
            shown = rows.masked_fill(~is_candidate[:, None], 0)
            logits = wide.task_logits(x, shown, is_candidate)[is_candidate]
        finally:
            torch.use_deterministic_algorithms(False)
        assert got.isfinite().all()
        assert (got - truth).abs().max() <= 2 * (native - truth).abs().max()
        true_logits = exact.task_logits(native[is_candidate].float(), rows[is_candidate])
        native_logits = network.task_logits(native[is_candidate], rows[is_candidate])
    assert logits.isfinite().all()
    assert (logits - true_logits).abs().max() <= 2 * (native_logits - true_logits).abs().max()
