"""Tests run once more on the Triton kernels in place of PyTorch, by Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Why a test of the kernels is skipped where there is no Triton.
NO_TRITON = "Triton comes with vLLM, or with PyTorch for CUDA; install either."


def run_interpreted(*arguments: str | Path) -> int:
    """Have pytest run tests under the interpreter, all of which must pass and none be skipped.

    That takes a process of its own: Triton asks for the flag at import.

    Args:
        arguments: Of pytest: files, and which of their tests.

    Returns:
        The number of tests that passed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:warnings", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    summary = done.stdout.splitlines()[-1]
    assert "skipped" not in summary, done.stdout[-5000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None, done.stdout[-5000:]
    return int(passed[1])
