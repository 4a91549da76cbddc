"""Which GPUs a measurement looks at."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf.watch import _GpuSamples

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
