"""Build and time the plans of ``perf.tensorrt_gpu``. Python 3.10 with TensorRT 8.6, without PyTorch.

    python -m perf.tensorrt_plans build --work FOLDER [--until EPOCH] [--jobs 12] [--dry-run]
    python -m perf.tensorrt_plans measure --work FOLDER [--until EPOCH] [--dry-run]

Each plan is built in the first of its ways that leads to one (``perf.tensorrt_entries``). Builds run side by side, each
in a process of its own, so that one that crashes or hangs costs only itself, and goes on with the next way; times are
taken afterwards, one plan at a time, as it runs and as a CUDA graph. With ``--dry-run`` ONNX Runtime takes the place of
plans, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from export.tensorrt import build_tensorrt_engine
from export.tensorrt_options import BuildOptions
from export.tensorrt_runtime import plan_runtime
from export.tensorrt_ways import WAYS, Way
from mtgr.errors import ConfigurationError
from perf.tensorrt_entries import STATIC, title_of
from perf.tensorrt_entries import graph_of as graph_file
from perf.tensorrt_measure import FIXED_BATCH, OnnxRunner, Runner, captured, parity, timed

JOBS = 12
MEASURE_S = 60.0  # one plan: loading it, parity, and times


def main(arguments: list[str] | None = None) -> int:
    """Run one step over all graphs, or over one where its name is given; 0 if every plan went well."""
    parser = argparse.ArgumentParser(prog="python -m perf.tensorrt_plans", description=__doc__)
    parser.add_argument("step", choices=["build", "measure"])
    parser.add_argument("--work", type=Path, required=True, help="folder of perf.tensorrt_gpu")
    parser.add_argument("--until", type=float, help="seconds since 1970 at which what still runs is ended")
    parser.add_argument("--jobs", type=int, default=JOBS, help="builds at a time")
    parser.add_argument(
        "--way-seconds", type=float, default=float("inf"), help="of a process, after which the next way is tried"
    )
    parser.add_argument("--only", help="one graph, in this very process")
    parser.add_argument("--resume", action="store_true", help="with --only: leave out ways up to where a build ended")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    entries = json.loads((options.work / "graphs.json").read_text(encoding="utf-8"))
    run_one = build_one if options.step == "build" else measure_one
    if options.only is not None:
        (entry,) = (entry for entry in entries if entry["name"] == options.only)
        return run_one(options, entry)
    # A second call builds what the first had no time for.
    entries = [
        entry for entry in entries if ("lengths" in result_of(options, entry, "build")) == (options.step == "measure")
    ]
    jobs = options.jobs if options.step == "build" else 1
    with ThreadPoolExecutor(jobs) as pool:
        states = list(pool.map(lambda entry: _in_process(options, entry), entries))
    return int(any(states) or (options.step == "measure" and not states))


def results(work: Path) -> Iterator[dict[str, Any]]:
    """What is known of each plan: how it was built, its errors, and its times."""
    options = argparse.Namespace(work=work)
    for entry in json.loads((work / "graphs.json").read_text(encoding="utf-8")):
        yield entry | result_of(options, entry, "build") | result_of(options, entry, "measure")


def result_of(options: argparse.Namespace, entry: dict[str, Any], step: str) -> dict[str, Any]:
    """The result of a step of one plan; empty if there is none."""
    path = options.work / entry["name"] / f"{step}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def graph_of(work: Path, entry: dict[str, Any], lengths: str, way: Way) -> Path:
    """The graph that a plan is built from; two plans may share it."""
    return graph_file(work, title_of(entry["preset"], entry["kind"], entry["precision"], way), lengths, way.last)


def plan_of(work: Path, entry: dict[str, Any], lengths: str) -> Path:
    """Where a plan lies."""
    return Path(work / entry["name"] / lengths / "model.plan")


def build_one(options: argparse.Namespace, entry: dict[str, Any]) -> int:
    """Build one plan in the first way that leads to one; every refusal is kept."""
    result: dict[str, Any] = {"refused": {}}
    if options.resume:
        result |= result_of(options, entry, "build")
        result["refused"][result.pop("begun")] = "its process ended"
    for lengths, way in ways_of(entry):
        name = f"{lengths}, {way.name}"
        if name in result["refused"]:
            continue
        _keep(options, entry, "build", result | {"begun": name})
        begin = time.monotonic()
        try:
            built = _build(options, entry, lengths, way)
        except Exception as error:  # noqa: BLE001 - whatever stops one way must not cost the others
            result["refused"][name] = str(error) if isinstance(error, ConfigurationError) else repr(error)
            print(f"   {entry['name']} {name}: {error}", flush=True)
        else:
            result |= {"lengths": lengths, "way": way.name, "last": way.last, "build": built}
            print(f"== {entry['name']} {name} built in {time.monotonic() - begin:.0f} s", flush=True)
        _keep(options, entry, "build", result)
        if "lengths" in result:
            return 0
    return 1


def ways_of(entry: dict[str, Any]) -> Iterator[tuple[str, Way]]:
    """Lengths and ways of a plan, in the order in which they are tried."""
    for lengths, name in entry["tries"]:
        yield lengths, WAYS[name]


def measure_one(options: argparse.Namespace, entry: dict[str, Any]) -> int:
    """Errors of one plan at every shape, then raw times of the shapes that are timed, and those of CUDA graphs."""
    built = result_of(options, entry, "build")
    lengths, largest = built["lengths"], built["build"]["largest"]
    if options.dry_run:
        runner: Runner = OnnxRunner(graph_of(options.work, entry, lengths, WAYS[built["way"]]))
    else:
        runner = plan_runtime().Plan(str(plan_of(options.work, entry, lengths)))
    try:
        result = parity(runner, entry, options.work, lengths, largest)
        _keep(options, entry, "measure", result)
        result |= timed(runner, entry, options, largest)
        _keep(options, entry, "measure", result)
        result["cuda_graphs"] = captured(runner, entry, options, largest)
        _keep(options, entry, "measure", result)
    finally:
        runner.close()
    print(
        f"== {entry['name']} {lengths}, {built['way']}: error {result['max_error']:.2e} of {result['bound']:.2e}, "
        f"holds {result['holds']}, p50 {result['p50']}, as CUDA graphs {result['cuda_graphs'].get('p50')}",
        flush=True,
    )
    return int(not result["holds"])


def _in_process(options: argparse.Namespace, entry: dict[str, Any]) -> int:
    """The same step of one graph in a process of its own, within the time that is left."""
    left = float("inf") if options.until is None else options.until - time.time()
    most = MEASURE_S if options.step == "measure" and not options.dry_run else float("inf")
    problem = "the time was over" if left <= 0 else None
    command = [sys.executable, "-m", "perf.tensorrt_plans", options.step, "--work", str(options.work)]
    command += ["--only", entry["name"], *["--dry-run"] * options.dry_run]
    tries = len(list(ways_of(entry))) if options.step == "build" else 1
    while problem is None:
        tries -= 1
        left = float("inf") if options.until is None else max(1.0, options.until - time.time())
        limit = min(left, most, options.way_seconds if tries else float("inf"))
        try:
            status = subprocess.run(command, check=False, timeout=None if limit == float("inf") else limit).returncode
        except subprocess.TimeoutExpired:
            ended, is_over = f"it was ended after {limit:.0f} s", limit == left
        else:
            if status in (0, 1):
                return status
            ended, is_over = f"its process ended with status {status}", False
        print(f"   {entry['name']}: {options.step}: {ended}", flush=True)
        if tries == 0 or is_over or "begun" not in result_of(options, entry, options.step):
            problem = ended
        elif "--resume" not in command:
            command.append("--resume")
    print(f"   {entry['name']}: {options.step}: {problem}", flush=True)
    _keep(options, entry, options.step, result_of(options, entry, options.step) | {f"{options.step}_failed": problem})
    return 1


def _build(options: argparse.Namespace, entry: dict[str, Any], lengths: str, way: Way) -> dict[str, Any]:
    graph, plan = graph_of(options.work, entry, lengths, way), plan_of(options.work, entry, lengths)
    if not graph.is_file():
        title = title_of(entry["preset"], entry["kind"], entry["precision"], way)
        reason = entry["graphs"].get(f"{title}-{lengths}-{way.last}", "it was not written")
        raise ConfigurationError(f"there is no graph at {graph}: {reason}.")
    largest = STATIC.get(lengths, 32 if lengths == "dynamic" else FIXED_BATCH)
    settings = way.options(BuildOptions(max_context=1024, max_batch=largest, workspace_gib=4.0, blas=False))
    if options.dry_run:
        return {"tensorrt": "dry run: ONNX Runtime", "largest": settings.max_batch, "profiles": [None]}
    manifest = build_tensorrt_engine(graph, plan, entry["precision"], settings)
    names = ("gpu", "layers", "constraints", "plan_bytes", "profiles", "seconds")
    details = {name: manifest.details[name] for name in names}
    return details | {"tensorrt": manifest.versions["tensorrt"], "largest": settings.max_batch}


def _keep(options: argparse.Namespace, entry: dict[str, Any], step: str, result: dict[str, Any]) -> None:
    path = options.work / entry["name"] / f"{step}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
