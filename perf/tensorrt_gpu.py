"""``python -m perf.tensorrt_gpu``: TensorRT plans of the project's own graphs beside PyTorch, on one GPU.

Steps, as TensorRT 8.6 needs another Python than PyTorch has (``perf/h200/tensorrt.sh`` runs them in turn):

    python -m perf.tensorrt_gpu export --work FOLDER          # checkpoints, graphs, cases, and PyTorch's own errors
    python3.10 -m perf.tensorrt_plans build --work FOLDER     # plans, side by side
    python -m perf.tensorrt_gpu torch --work FOLDER           # PyTorch's times; with --wait, compiled during builds
    python3.10 -m perf.tensorrt_plans measure --work FOLDER   # parity and times of plans, one after the other
    python -m perf.tensorrt_gpu serve --work FOLDER           # the same plans behind a real tritonserver
    python -m perf.tensorrt_gpu report --work FOLDER --out perf/results/tensorrt-h200.json

Every step keeps each result as soon as it has it, so that whatever fails costs no other. ``--dry-run`` runs all of them
on a CPU: preset tiny, and ONNX Runtime in the place of plans.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from export.last_token import LastToken
from mtgr.files import write_json
from perf.record import describe
from perf.tensorrt_entries import Lengths
from perf.tensorrt_export import export_step, graph_step
from perf.tensorrt_plans import results
from perf.tensorrt_serve import serve_step
from perf.tensorrt_torch import DEVICE, torch_step


def main(arguments: list[str] | None = None) -> int:
    """Run one step; 0 if all went well."""
    parser = argparse.ArgumentParser(prog="python -m perf.tensorrt_gpu", description=__doc__)
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("--work", type=Path, required=True, help="folder for graphs, plans, and intermediate results")
    parser.add_argument("--out", type=Path, help="result of the step report")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=float, help="seconds since 1970 after which serve begins nothing more")
    parser.add_argument("--wait", type=Path, help="file that the step torch waits for before it takes times")
    parser.add_argument("--stub", type=Path, help="Triton's Python stub that has TensorRT, for the step serve")
    parser.add_argument("--plan", action="append", help="of the step export: leave the others out; may be repeated")
    parser.add_argument("--only", help="of the step graph: which plan's")
    parser.add_argument("--lengths", choices=get_args(Lengths), help="of the step graph")
    parser.add_argument("--last", choices=get_args(LastToken), default="products", help="of the step graph")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    options.work.mkdir(parents=True, exist_ok=True)
    return STEPS[options.step](options)


def report_step(options: argparse.Namespace) -> int:
    """Put the steps' results together, with their origin, and print the table that the README shows."""
    if options.out is None:
        print("tensorrt_gpu: --out FILE says where the report goes", file=sys.stderr)
        return 2

    plans, baseline, served = kept(options.work)
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else "none (dry run)"
    result = {"gpu": gpu, "pytorch": baseline, "plans": plans, "served": served}
    write_json(options.out, describe(options.seed) | finite(result))
    for entry in plans:
        graphs = entry.get("cuda_graphs", {})
        own = baseline.get(entry["preset"], {}).get("p50", {})
        ratios = [
            f"{times['b8'] / found['b8']:.2f} x {path}{how}"
            for path, times in own.items()
            for how, found in (("", entry.get("p50", {})), (" as CUDA graphs", graphs.get("p50", {})))
            if entry["kind"] == "rank" and "b8" in found and "b8" in times
        ]
        print(
            f"{entry['name']:26} {entry.get('lengths', 'not built'):10} {entry.get('way', entry.get('refused', ''))} "
            f"{entry.get('build', {}).get('constraints', '')} holds {entry.get('holds')!s:6} "
            f"error {entry.get('max_error')} p50 {entry.get('p50')} as CUDA graphs {graphs.get('p50')} "
            f"{graphs.get('failed', '')} served {served.get(entry['name'], {}).get('p50')} {' '.join(ratios)}"
        )
    for name, found in baseline.items():
        print(f"{name}: {found['p50']}")
    return 0


def kept(work: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """What the steps have left so far: plans, PyTorch's times by preset, and what was served by plan."""

    def read(name: str, otherwise: Any) -> Any:
        path = work / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else otherwise

    plans = list(results(work)) if (work / "graphs.json").is_file() else []
    return plans, read("torch", {}), {entry["name"]: entry for entry in read("served", [])}


def finite(value: Any) -> Any:
    """The same with None for what is no number, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


STEPS: dict[str, Callable[[argparse.Namespace], int]] = {
    "export": export_step,
    "graph": graph_step,
    "torch": torch_step,
    "serve": serve_step,
    "report": report_step,
}


if __name__ == "__main__":
    sys.exit(main())
