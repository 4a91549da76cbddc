"""The comparison of ways to compute attention, where there is no GPU: what is right is timed, the best are rivals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtgr.kernels import configs, dense_configs
from mtgr.kernels.launch import Launch
from perf import gpu_attention, gpu_pages, gpu_variants
from perf.gpu_measure import Ceilings
from perf.gpu_variants import Size


class Kernel:
    """Stands for a kernel: does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: None


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configurations, with PyTorch in the place of every kernel."""
    for module in (gpu_attention, gpu_pages):
        monkeypatch.setattr(module, "capability_of", lambda device: 90)
    monkeypatch.setattr(gpu_variants.Size, "_launch", lambda self, way, problem, pages: Launch(Kernel(), (1,), (), {}))
    monkeypatch.setattr(gpu_pages.Step, "run", lambda step, config, dtype: step.exact())
    times = iter(float(n) for n in range(1, 1000))
    monkeypatch.setattr(gpu_variants, "time_of", lambda launch: next(times))


@pytest.mark.usefixtures("hopper")
def test_what_is_right_is_timed() -> None:
    size = Size(128, True, 0)
    kinds = {way.kind for way in size.ways}
    assert kinds == {"bf16", "fp8", "paged"}
    checks = list(size.check())
    assert [figure.holds for figure in checks] == [True] * len(size.ways)
    size.ways[0].figure.error = float("inf")
    ceilings = Ceilings({"fp32": 1e12, "bf16": 1e12, "fp8": 2e12}, 1e12)
    lines = [figure.line() for figure in size.timed(ceilings)]
    assert not [line for line in lines if line.startswith(f"   {size.ways[0].name} ")]
    best = [line for line in lines if "BEST" in line]
    assert len(best) == 3
    assert any("bf16 (aim 1.4" in line for line in best)
    assert any("bf16 (aim 0.9" in line for line in best)


@pytest.mark.usefixtures("hopper")
def test_all_that_may_be_chosen_is_compared() -> None:
    """But for plain loads, and large tiles in warps that both copy and multiply."""
    size = Size(256, True, 0)
    tried = {way.config for way in size.ways if way.kind == "fp8"}
    key = dense_configs.DenseKey(256, torch.float8_e4m3fn, 90, 4096)
    left_out = set(dense_configs.candidates(key)) - tried
    assert {(config.variant, config.block_m) for config in left_out} == {("descriptors", 128)}


def test_without_a_gpu_nothing_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_variants.main(["--small"]) == 0
    assert capsys.readouterr().out.count("need a GPU") == 3


def test_pages_of_every_size_are_checked_in_a_way_that_is_served() -> None:
    for block_size in (16, 64, 128):
        case = gpu_pages.Step(64, block_size, torch.bfloat16, 20, 0)
        served = configs.specialised_tiles(case.key)
        checked = [tile for tile in served if gpu_pages._is_checked(tile, case)]
        assert checked
        assert block_size != gpu_pages.BLOCK_SIZE or checked == served
