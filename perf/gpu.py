"""``python -m perf.gpu --out FOLDER``: check and time the kernels on the GPU at hand.

Every section runs in a process of its own, so that none takes the others down, and what it found is written after each
figure. ``--quick``, and a machine without a GPU, take tiny shapes: to see that everything runs, not how fast.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from mtgr.files import write_json
from mtgr.kernels import dense_configs
from perf.gpu_measure import DEVICE, Ceilings, Section, measure_ceilings
from perf.record import describe

SECTIONS = ("check", "attention", "stack", "memory", "model", "linear")
CEILINGS = "ceilings.json"
DEFAULTS = "defaults.txt"

# Seconds after which a section is given up: a kernel that waits for ever must not take all the time there is.
LIMITS = {"check": 120, "attention": 240, "stack": 150, "memory": 40, "model": 260, "linear": 120}


def main(arguments: list[str] | None = None) -> int:
    """Run all sections, or those that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="what to run; everything by default")
    parser.add_argument("--seconds", type=float, default=600.0, help="time for everything")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--here", action="store_true", help="run the sections in this process")
    parser.add_argument("--plain", action="store_true", help="without specialised kernels")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    names = options.section or list(SECTIONS)
    if options.here:
        return max(_run(name, options, deadline) for name in names)
    return _supervise(names, options, deadline)


def _supervise(names: list[str], options: argparse.Namespace, deadline: float) -> int:
    """Each section in a process; what went wrong stands beside the figures."""
    result: dict[str, Any] = {"origin": describe(options.seed), "sections": {}}
    result["origin"]["device"] = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    failed, plain = 0, options.plain
    for name in names:
        left = min(LIMITS[name], deadline - time.monotonic())
        started = time.monotonic()
        if left < 1:
            result["sections"][name] = {"status": "no time left", "figures": []}
            continue
        command = [sys.executable, "-m", "perf.gpu", "--here", "--section", name, "--out", str(options.out)]
        command += ["--seconds", f"{left:.0f}", "--seed", str(options.seed), *(["--quick"] * options.quick)]
        command += ["--plain"] * plain
        try:
            done = subprocess.run(command, timeout=left, check=False)
            status = "ok" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            status = "took too long"
        path = options.out / f"{name}.json"
        part = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"figures": []}
        if name == "check":
            wrong = [one for one in part["figures"] if "specialised" in one["name"] and not one["holds"]]
            plain |= bool(wrong) or status == "took too long"
        failed += status != "ok"
        result["sections"][name] = part | {"status": status, "seconds": time.monotonic() - started}
        path = options.out / CEILINGS
        if path.exists():
            result["ceilings"] = json.loads(path.read_text(encoding="utf-8"))
        write_json(options.out / "gpu.json", result)
        if name == "attention":
            _write_defaults(part["figures"], options.out / DEFAULTS)
        print(f"== {name}: {status}, {time.monotonic() - started:.0f} s", flush=True)
    return int(failed > 0)


def _write_defaults(figures: list[dict[str, Any]], path: Path) -> None:
    """Lines for the table of ``mtgr.kernels.dense_configs``; of several masks the last decides, MTGR's."""
    lines = {one["chosen"][0]: one["chosen"][1] for one in figures if one["chosen"]}
    path.write_text("".join(f"    {key}: {config},\n" for key, config in lines.items()), encoding="utf-8")


def _run(name: str, options: argparse.Namespace, deadline: float) -> int:
    """One section; 1 if it failed or an error is larger than the rule allows."""
    is_small = options.quick or DEVICE.type == "cpu"
    path = options.out / CEILINGS
    if path.exists():
        ceilings = Ceilings(**json.loads(path.read_text(encoding="utf-8")))
    else:
        ceilings = measure_ceilings(is_small)
        write_json(path, {"flops": ceilings.flops, "bandwidth": ceilings.bandwidth})
        print(f"   {ceilings}", flush=True)
    found: list[dict[str, Any]] = []
    part: dict[str, Any] = {"figures": found, "plain": options.plain}
    if options.plain:
        dense_configs.SPECIALISED_SIZES = ()
    wrong = 0
    started = time.monotonic()
    try:
        for figure in section_of(name)(ceilings, is_small, options.seed):
            found.append(figure.to_dict())
            wrong += figure.holds is False
            print(f"{time.monotonic() - started:6.1f}{figure.line()}", flush=True)
            write_json(options.out / f"{name}.json", part)
            if time.monotonic() > deadline:
                part["error"] = "stopped: no time left"
                break
    except Exception as error:  # noqa: BLE001  what was measured before must not be lost
        traceback.print_exc()
        part["error"] = f"{type(error).__name__}: {error}"
    write_json(options.out / f"{name}.json", part)
    return int(wrong > 0 or "error" in part)


def section_of(name: str) -> Section:
    """What yields a section's figures; imported in turn, so that one that lacks something takes no other with it."""
    if name == "check":
        from perf.gpu_attention import check as section
    elif name == "attention":
        from perf.gpu_attention import compare as section
    elif name == "stack":
        from perf.gpu_stack import stack as section
    elif name == "memory":
        from perf.gpu_memory import memory as section
    elif name == "model":
        from perf.gpu_model import model as section
    else:
        from perf.gpu_linear import linear as section
    return section


if __name__ == "__main__":
    sys.exit(main())
