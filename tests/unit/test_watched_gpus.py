"""Which GPUs a measurement looks at."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf.results_format import Gpu
from perf.watch import Usage, _GpuSamples

DRIVER = """#!/bin/sh
# As the driver's command: all GPUs, or those after -i.
case "$*" in
  *"-i 1"*) echo "1, 90, 1000, 2000, 300" ;;
  *) echo "0, 10, 500, 2000, 100"; echo "1, 90, 1000, 2000, 300" ;;
esac
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(DRIVER)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def usage_of() -> tuple[float, int]:
    samples = _GpuSamples()
    with samples:
        samples._process.wait(5)
        samples._reader.join(5)
    usage = samples.usage()
    assert usage is not None
    return usage.utilization, usage.memory_total_bytes >> 20


@pytest.mark.usefixtures("driver")
def test_all_gpus_by_default() -> None:
    assert usage_of() == (0.5, 4000)


@pytest.mark.usefixtures("driver")
def test_only_the_gpus_that_a_server_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server's GPU on the same machine says nothing of this one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert usage_of() == (0.9, 2000)


def test_use_is_that_of_the_time_under_load() -> None:
    """Three seconds of load within four that were watched: what the client read its requests in is no idleness."""
    gpu = Gpu(0.6, 1, 2, 300.0, 1200.0)
    usage = Usage(gpu=gpu, seconds=4.0)
    found = usage.gpu_under_load(3.0)
    assert found is not None
    assert (found.utilization, found.power_watts, found.energy_joules) == (0.8, 300.0, 1200.0)
    assert usage.gpu_under_load(1.0).utilization == 1.0
    assert usage.gpu_under_load(5.0) == gpu == usage.gpu_under_load(0.0)
    assert Usage(seconds=4.0).gpu_under_load(3.0) is None
