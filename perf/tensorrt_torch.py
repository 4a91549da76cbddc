"""PyTorch's times beside those of plans: eager fp32, and fp16 compiled with CUDA graphs."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.onnx_graphs import graph_of
from mtgr.checkpoint import load_checkpoint
from mtgr.files import write_json
from perf.tensorrt_entries import folder_of
from perf.tensorrt_measure import medians, sample

EAGER, COMPILED = "eager fp32", "compiled fp16, CUDA graphs"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def torch_step(options: argparse.Namespace) -> int:
    """Time ranking in PyTorch: eager fp32, and fp16 compiled with CUDA graphs, which is made ready beforehand."""
    entries = json.loads((options.work / "graphs.json").read_text(encoding="utf-8"))
    calls: dict[tuple[str, str, str], Callable[[], Any]] = {}
    for name, shapes in {entry["preset"]: entry["timed"] for entry in entries}.items():
        model = load_checkpoint(folder_of(options.work, name))
        paths: dict[str, Callable[..., Tensor]] = {EAGER: model.model.to(DEVICE).eval()}
        if DEVICE == "cuda":
            half = graph_of(load_checkpoint(folder_of(options.work, name)), "mtgr_onnx_rank", "fp16").module
            paths[COMPILED] = torch.compile(half.to(DEVICE).eval(), mode="reduce-overhead", dynamic=False)
        with np.load(options.work / f"{name}.npz") as cases:
            rows = {shape: [cases[f"{shape}/{key}"] for key in ("context", "candidates")] for shape in shapes}
        for path, network in paths.items():
            for shape in shapes:
                call = torch_call(network, rows[shape])
                if attempted(f"{name} {path} {shape}", lambda call=call: [call() for _ in range(3)]):
                    calls[name, path, shape] = call
    deadline = time.monotonic() + 400
    while options.wait is not None and not options.wait.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    samples: dict[str, dict[str, dict[str, list[float]]]] = {}
    rounds, warm = (3, 1) if options.dry_run else (100, 20)
    for (name, path, shape), call in calls.items():
        into = samples.setdefault(name, {}).setdefault(path, {})
        attempted(f"{name} {path} {shape}", lambda call=call: into.update({shape: sample(call, rounds, warm)}))  # noqa: B023
        found = {
            name: {"milliseconds": own, "p50": {path: medians(times) for path, times in own.items()}}
            for name, own in samples.items()
        }
        write_json(options.work / "torch.json", found)
    for name, own in samples.items():
        print(f"== {name} PyTorch p50 { {path: medians(times) for path, times in own.items()} }", flush=True)
    return int(not samples)


def torch_call(network: Callable[..., Tensor], rows: list[np.ndarray[Any, Any]]) -> Callable[[], Tensor]:
    """One request, host to host as plans are timed."""
    pinned = [part.pin_memory() if DEVICE == "cuda" else part for part in map(torch.from_numpy, rows)]

    def call() -> Tensor:
        with torch.inference_mode():
            return network(*(part.to(DEVICE, non_blocking=True) for part in pinned)).float().cpu()

    return call


def attempted(what: str, action: Callable[[], Any]) -> bool:
    """Whether ``action`` went well: one path that PyTorch cannot run here must not cost the others."""
    try:
        action()
    except Exception:  # noqa: BLE001
        print(f"   {what}: {traceback.format_exc(limit=-3)[-2000:]}", flush=True)
        return False
    return True
