"""What each model of a running server holds of the host's and of the GPUs' memory."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from perf.processes import ServerProcesses
from perf.results_format import ModelMemory

SERVER = "tritonserver"
_STUB = "triton_python_backend_stub"
_QUERY = ("nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits")
_TIMEOUT_S = 10.0


def model_memory(pid: int) -> dict[str, ModelMemory]:
    """Memory by model, for models that have processes of their own.

    Triton runs each instance of a Python model in a stub; what a stub starts, such as vLLM's engine, is its model's.
    The rest - Triton itself, with all models that run within it - stands under ``tritonserver``. Pages that processes
    share are divided among them (PSS), so that the sum is what the server holds.

    Args:
        pid: Process of tritonserver.

    Returns:
        By the model's name. Bytes on GPUs are None where the driver names no process of this server, as from within
        containers.
    """
    owners = _owners(pid)
    gpu = {process: size for process, size in _gpu_bytes().items() if process in owners}
    host: dict[str, int] = {}
    on_gpu: dict[str, int] = {}
    for process, model in owners.items():
        host[model] = host.get(model, 0) + _pss(process)
        on_gpu[model] = on_gpu.get(model, 0) + gpu.get(process, 0)
    return {model: ModelMemory(size, on_gpu[model] if gpu else None) for model, size in sorted(host.items())}


def _owners(pid: int) -> Mapping[int, str]:
    """The model of each process of the server; a parent stands before its children."""
    owners = {pid: SERVER}
    for process, parent in ServerProcesses(pid).tree()[1:]:
        owners[process] = _stub_model(process) or owners[parent]
    return owners


def _stub_model(pid: int) -> str | None:
    """The model whose stub it is: its first argument is a file in a version of the model."""
    with contextlib.suppress(OSError):
        program, *arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if Path(program).name == _STUB and arguments:
            return Path(arguments[0]).parents[1].name
    return None


def _pss(pid: int) -> int:
    with contextlib.suppress(OSError):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(rollup.split("\nPss:", 1)[1].split(maxsplit=1)[0]) << 10
    return 0


def _gpu_bytes() -> dict[int, int]:
    """Bytes by process, over all GPUs."""
    if shutil.which(_QUERY[0]) is None:
        return {}
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    found: dict[int, int] = {}
    for line in answer.splitlines():
        process, _, size = line.partition(",")
        if process.strip().isdigit() and size.strip().isdigit():  # "[N/A]" where it is not known
            found[int(process)] = found.get(int(process), 0) + (int(size) << 20)
    return found
