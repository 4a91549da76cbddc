"""The ways of making a linear layer's product: each right, in Triton's interpreter, and the one remembered is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mtgr.kernels import linear_tuning
from mtgr.kernels.dispatch import use_triton
from mtgr.kernels.linear import QuantisedRows, fp8_linear, linear_silu, quantise_weight
from mtgr.kernels.linear_tuning import LinearKey, LinearWay, choose, remember, tune_fp8, tune_silu
from tests.interpreted import NO_TRITON, run_interpreted

pytest.importorskip("triton", reason=NO_TRITON)

WAYS = [
    LinearWay("library"),
    LinearWay("tiles", (64, 64, 4, 3)),
    LinearWay("persistent", (64, 64, 4, 3), is_halved=True),
    LinearWay("persistent", (64, 128, 4, 3)),
]


@pytest.fixture(autouse=True)
def nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_tuning, "_chosen", {})


@pytest.mark.parametrize(("rows", "depth", "columns"), [(150, 128, 136), (1, 64, 8), (300, 64, 264), (0, 64, 64)])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.kind}{way.is_halved}")
def test_every_way_is_right(way: LinearWay, rows: int, depth: int, columns: int) -> None:
    torch.manual_seed(rows)
    x, bias = torch.randn(rows, depth).half(), torch.randn(columns).half()
    weight = (torch.randn(columns, depth) * depth**-0.5).half()
    remember(LinearKey.of(rows, weight), way)
    exact = F.silu(F.linear(x.float(), weight.float(), bias.float()))
    found = linear_silu(x, weight, bias)
    assert found.shape == exact.shape
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(not use_triton(torch.empty(0)), reason="PyTorch knows one way; test_interpreted runs this.")
def test_what_is_remembered_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    exact = linear_tuning.silu_launch
    monkeypatch.setattr(
        "mtgr.kernels.linear.silu_launch", lambda way, *tensors: launched.append(way) or exact(way, *tensors)
    )
    x, weight, bias = torch.randn(40, 64).half(), torch.randn(32, 64).half(), torch.zeros(32).half()
    remember(LinearKey.of(64, weight), WAYS[2])  # of the same class as 40
    linear_silu(x, weight, bias)
    linear_silu(x[:20], weight, bias)
    linear_silu(x, weight, bias, fused=True)
    assert launched == [WAYS[2]]


def test_fp8_takes_the_tile() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(30, 128), quantise_weight(torch.randn(160, 128)), torch.randn(160)
    usual = fp8_linear(x, weight, bias)
    remember(LinearKey.of(30, weight.data), LinearWay("tiles", (64, 128, 4, 3)))
    torch.testing.assert_close(fp8_linear(x, weight, bias), usual, rtol=0, atol=1e-4)


def test_classes() -> None:
    weight = torch.empty(5, 3)
    assert [LinearKey.of(rows, weight).rows_class for rows in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert LinearKey.of(3, weight) == LinearKey(4, 5, 3, torch.float32)
    assert LinearKey.of(3, weight) != LinearKey.of(3, weight.half())


def test_nothing_is_measured_without_a_gpu() -> None:
    weight = torch.empty(64, 64, dtype=torch.float16)
    rounded = quantise_weight(weight)
    assert tune_silu(10, weight, weight[0]) is None
    assert tune_fp8(10, rounded.data, rounded.scales, weight[0]) is None
    assert choose(LinearKey.of(10, weight)) is None
    assert isinstance(rounded.data, torch.Tensor)
    assert not isinstance(rounded, QuantisedRows)


def test_interpreted() -> None:
    """All of the above on the kernels."""
    assert run_interpreted(__file__, "-k", "not compile and not interpreted")


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ways_compile(capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mtgr.kernels.linear_tuning import silu_launch, ways
    from tests.unit.offline import MAX_STACK, SHARED, compile_for, stack

    compile_for(capability, monkeypatch, tmp_path)
    x, weight = torch.empty(10_848, 768, dtype=dtype), torch.empty(3072, 768, dtype=dtype)
    out, bias = torch.empty(10_848, 3072, dtype=dtype), torch.empty(3072, dtype=dtype)
    kinds = set()
    for way in ways(len(x), weight):
        kinds.add(way.kind)
        if way.kind == "library":
            continue
        kernel = silu_launch(way, x, weight, bias, out).compile()
        assert kernel.metadata.shared <= SHARED[capability]
        assert stack(kernel) <= MAX_STACK
        assert ("wgmma" if capability == 90 else "tcgen05") in kernel.asm["ptx"]
    assert kinds == {"library", "tiles", "persistent"}
