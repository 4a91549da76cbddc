"""Kernels compiled for GPUs that are not there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.interpreted import NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)

import triton
from triton.backends.compiler import GPUTarget

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Bytes of shared memory that a program may have, by compute capability times ten: A100, H100 and H200, B200.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}

# Bytes a thread may keep outside its registers: a few values at the loops' edges, not an operand.
MAX_STACK = 256


class OfflineDriver:
    """Answers what Triton asks before it compiles; nothing can be launched."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(capability: int, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Have Triton compile for a GPU, with what it made before in ``cache``."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(triton.runtime.driver, "_active", OfflineDriver(capability))


def finished(compiled: Any) -> Any:
    """The kernel, which under ``parallel_compilation`` may still be in the making."""
    return compiled.result() if hasattr(compiled, "result") else compiled


def stack(kernel: Any) -> int:
    """Bytes a thread keeps outside its registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"STACK:(\d+)", report)
    assert found is not None, report
    return int(found[1])


def is_serialised(kernel: Any) -> bool:
    """Whether the assembler has every product of the tensor cores waited for before the next."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [TOOLS / "ptxas", "-arch=sm_90a", "-v", file.name, "-o", "/dev/null"]
        notes = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "serialized" in notes


def main_loop(kernel: Any) -> list[str]:
    """Instructions of the first innermost loop with products of the tensor cores, without their addresses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "nvdisasm", "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    code: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
            target = re.search(r"BRA.*?(\.L_\w+)", instruction[1])
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(code)))
    # Two products at least; what spans more than a few tiles is a loop around them.
    bodies = [code[first:last] for first, last in sorted(loops) if last - first < 1000]
    return next(body for body in bodies if sum("GMMA" in line for line in body) > 2)
