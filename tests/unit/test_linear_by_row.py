"""FP8 products whose operands have one scale a row, as cuBLAS takes them: PyTorch, and kernels in the interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.engines.compiled_network import CompiledNetwork
from mtgr.errors import ConfigurationError
from mtgr.kernels import linear_tuning
from mtgr.kernels.dispatch import use_triton
from mtgr.kernels.linear import (
    QuantisedRows,
    dequantise_rows,
    dequantise_weight,
    empty_rows,
    fp8_linear,
    quantise_rows,
    quantise_weight,
)
from mtgr.kernels.linear_tuning import LinearKey, LinearWay, fp8_by_row, library_fp8, remember
from mtgr.kernels.norm import fp8_group_norm
from tests.interpreted import NO_TRITON, run_interpreted
from tests.unit.test_compiled import model_of, rounded, scores, worst
from tests.unit.test_dense_linear import Case
from tests.unit.test_kernels_norm import Case as NormCase


@pytest.fixture(autouse=True)
def nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_tuning, "_chosen", {})


@pytest.mark.parametrize(("tokens", "depth"), [(37, 200), (3, 128), (20, 1500)])
def test_rows(tokens: int, depth: int) -> None:
    """Four digits of each number, or a step of its row's smallest; rows of a wider table, whose rest is not read."""
    case = Case(tokens, depth, 8)
    wide = torch.full((tokens, depth + 64), 1e6)
    wide[:, :depth] = case.x
    made = quantise_rows(wide[:, :depth], by_row=True)
    torch.testing.assert_close(made.scales, case.x.abs().amax(1, keepdim=True) / 448, rtol=1e-6, atol=0)
    found = dequantise_rows(made)
    assert found.shape == (tokens, -(-depth // 128) * 128)
    assert (found[:, depth:] == 0).all()
    assert ((found[:, :depth] - case.x).abs() <= case.x.abs() * 2.0**-4 + made.scales * 2.0**-10).all()


@pytest.mark.parametrize(("tokens", "depth", "columns"), [(150, 256, 208), (7, 96, 32), (0, 128, 64)])
@pytest.mark.parametrize("is_silu", [False, True])
def test_product(tokens: int, depth: int, columns: int, is_silu: bool) -> None:
    case = Case(max(tokens, 1), depth, columns)
    weight = quantise_weight(case.weight, by_row=True)
    assert weight.scales.shape == (columns, 1)
    rows = quantise_rows(case.x[:tokens], by_row=True)
    product = dequantise_rows(rows).double() @ dequantise_weight(weight).double().T + case.bias.double()
    expected = F.silu(product) if is_silu else product
    found = fp8_linear(rows, weight, case.bias, is_silu=is_silu)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(fp8_linear(case.x[:tokens], weight, case.bias, is_silu=is_silu), found)
    if tokens:
        exact = F.linear(case.x.double(), case.weight.double(), case.bias.double())
        exact = F.silu(exact) if is_silu else exact
        assert 0.003 < float((found - exact).norm() / exact.norm()) < 0.06


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_librarys_product_is_the_same(dtype: torch.dtype) -> None:
    """What PyTorch's own product takes and gives, on the CPU as on a GPU."""
    case = Case(33, 256, 48)
    weight, rows = quantise_weight(case.weight, by_row=True), quantise_rows(case.x, by_row=True)
    for is_silu in (False, True):
        expected = fp8_linear(rows, weight, case.bias, is_silu=is_silu)
        found = library_fp8(rows.data, weight.data, rows.scales, weight.scales, case.bias, is_silu, dtype)
        assert found.dtype == dtype
        step = float(expected.abs().max()) * 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=max(step, 1e-3))
    nothing = library_fp8(rows.data[:0], weight.data, rows.scales[:0], weight.scales, case.bias, True, dtype)
    assert nothing.shape == (0, 48)


@pytest.mark.parametrize("width", [24, 160, 768])
@pytest.mark.parametrize("is_gated", [False, True])
def test_norm(width: int, is_gated: bool) -> None:
    case = NormCase(width, torch.float32, torch.float32)
    expected = case.expected() * (case.gate.numpy() if is_gated else 1.0)
    made = fp8_group_norm(*case.arguments(), case.gate if is_gated else None, by_row=True)
    assert made.by_row
    found = dequantise_rows(made).numpy()
    assert (found[:, width:] == 0).all()
    np.testing.assert_allclose(made.scales[:, 0].numpy(), np.abs(expected).max(axis=1) / 448, rtol=1e-3)
    error = np.abs(found[:, :width] - expected)
    assert (error <= np.maximum(np.abs(expected) / 16, made.scales.numpy() / 1024) * 1.001 + 1e-4).all()


def test_forms_are_not_mixed() -> None:
    case = Case(4, 128, 16)
    with pytest.raises(ConfigurationError, match="both have scales by row"):
        fp8_linear(quantise_rows(case.x), quantise_weight(case.weight, by_row=True), case.bias)
    with pytest.raises(ConfigurationError, match="both have scales by row"):
        fp8_linear(quantise_rows(case.x, by_row=True), quantise_weight(case.weight), case.bias)


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured; else the library for many rows on Hopper, where it has the product."""
    weight = torch.empty(64, 128, dtype=torch.float8_e4m3fn)
    assert not fp8_by_row(4096, weight)
    remember(LinearKey.of(100, weight), LinearWay("library"))
    assert fp8_by_row(128, weight)
    assert not fp8_by_row(64, weight)
    monkeypatch.setattr(linear_tuning, "_has_scaled_product", lambda device: True)
    assert not fp8_by_row(4096, weight)
    monkeypatch.setattr(linear_tuning, "capability_of", lambda device: 90)
    assert fp8_by_row(4096, weight)
    assert not fp8_by_row(512, weight)
    assert not fp8_by_row(4096, weight[:50])
    remember(LinearKey.of(4096, weight), LinearWay("tiles", (64, 128, 4, 3)))
    assert not fp8_by_row(4096, weight)


def test_the_trial_product_does_not_ask_what_tensors_are_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM makes models with a default of 16 bits, in which PyTorch refuses scales."""
    asked = []

    def product(x: Tensor, weight: Tensor, x_scales: Tensor, weight_scales: Tensor, *rest: object) -> None:
        asked.extend((x_scales.dtype, weight_scales.dtype))

    monkeypatch.setattr(linear_tuning, "capability_of", lambda device: 90)
    monkeypatch.setattr(linear_tuning, "library_fp8", product)
    linear_tuning._has_scaled_product.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert linear_tuning.library_serves_fp8(64, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
        linear_tuning._has_scaled_product.cache_clear()
    assert asked == [torch.float32, torch.float32]


@pytest.mark.skipif(use_triton(torch.empty(0)), reason="Too many tokens for the interpreter; the CPU shows the rule.")
def test_the_engines_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most twice the error of the network whose linear layers round by block, whichever form is taken."""
    model = model_of(d_model=160)
    by_block, by_row = CompiledNetwork(model, "fp8"), CompiledNetwork(model, "fp8")
    exact = [scores(model, seed) for seed in range(3)]
    allowed = 2 * max(worst(scores(rounded(model), seed), one) for seed, one in enumerate(exact))
    found = [scores(by_block.rank, seed) for seed in range(3)]
    monkeypatch.setattr("mtgr.engines.compiled_network.fp8_by_row", lambda rows, weight: True)
    other = [scores(by_row.rank, seed) for seed in range(3)]
    for several in (found, other):
        assert 0 < max(map(worst, several, exact)) <= allowed
    assert max(map(worst, found, other)) > 0


@pytest.mark.skipif(use_triton(torch.empty(0)), reason="This is that run.")
def test_interpreted() -> None:
    """Rounding by the kernels."""
    pytest.importorskip("triton", reason=NO_TRITON)
    assert run_interpreted(Path(__file__), "-k", "test_rows or test_product or test_norm") >= 15


@pytest.mark.skipif(use_triton(torch.empty(0)), reason="Nothing is compiled under the interpreter.")
@pytest.mark.parametrize("capability", [90, 100], ids=["sm_90", "sm_100"])
def test_it_compiles(
    capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("triton", reason=NO_TRITON)
    from mtgr.kernels.triton_linear import quantise_rows_launch
    from mtgr.kernels.triton_norm import group_norm_launch
    from tests.unit.offline import MAX_STACK, compile_for, stack

    compile_for(capability, monkeypatch, tmp_path_factory.getbasetemp() / "triton")
    for width in (768, 8192):
        made: QuantisedRows = empty_rows(9, width, torch.device("cpu"), by_row=True)
        x, types = torch.empty(9, width, dtype=torch.bfloat16), torch.zeros(9, dtype=torch.int32)
        for launch in (
            quantise_rows_launch(x, made),
            group_norm_launch(x, types, x, x, 1e-6, x, made.data, scales=made.scales, by_row=True),
            group_norm_launch(
                x,
                types,
                x,
                x,
                1e-6,
                None,
                made.data,
                scales=made.scales,
                by_row=True,
                update=x,
                total=torch.empty_like(x),
            ),
        ):
            kernel = launch.compile()
            assert stack(kernel) <= MAX_STACK
            assert "satfinite.e4m3x2" in kernel.asm["ptx"]  # just above 448 rounds to 448
