"""``python -m perf.bare_door``: what Triton's own share of the door costs, by a door that does nothing.

Three ways to the same ONNX engine on one server, in turn: ``direct`` calls it with ready rows; ``bare`` is an ensemble
of as many Python models with as many tensors as the door's, which take ready rows from memory (``perf/bare_models``);
``door`` is the real one. What separates bare from direct no feature code and no routing can win back. Processor time
says whose it is.

    python -m perf.bare_door --model-repository model_repository --out build/bare
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtgr.bundle import Bundle, load_bundle
from mtgr.client.wire import Tensor
from mtgr.features.extract import FeatureExtractor
from mtgr.features.packing import pack
from mtgr.routing.strategies import STRATEGIES
from mtgr.serving.server import DOOR_MODELS, TritonServer
from perf.analyzer import Analyzer, StalledError, find_analyzer
from perf.processes import ServerProcesses, processor_seconds
from perf.record import describe
from perf.workload import Visit, WorkloadConfig, door_steps, row_steps, stored_traffic, write_input

BARE = Path(__file__).parent / "bare_models"
WAYS = {"direct": STRATEGIES["onnx"].rank_model, "bare": "bare", "door": "mtgr"}
_SHOWN_MS = 0.02
_STALLED_SECONDS = 60.0  # perf_analyzer stalls now and then when all is answered
_READY = 64  # requests whose rows the bare models have
_NEEDED = ("user_id", "candidates", "request_time", "strategy")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table and write raw samples."""
    parser = argparse.ArgumentParser(prog="python -m perf.bare_door", description=__doc__)
    parser.add_argument("--model-repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    parser.add_argument("--concurrency", default="1,8,32,64,128")
    parser.add_argument("--requests", type=int, default=600, help="of a point")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    levels = [int(level) for level in options.concurrency.split(",")]
    bundle = load_bundle(options.model_repository)
    traffic = stored_traffic(bundle, WorkloadConfig(seed=options.seed, bad_share=0.0))
    analyzer = find_analyzer()
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        repository = with_bare_models(options.model_repository, Path(directory) / "repository")
        keep_rows(repository, bundle, traffic.take(_READY))
        with TritonServer(repository) as server:
            for repeat in range(-1, options.repeats):  # the first is to warm up
                for level in levels:
                    visits = traffic.take(options.requests)
                    for way in WAYS:
                        samples = _point(analyzer, server, bundle, way, visits, level, Path(directory))
                        if repeat >= 0:
                            points.append({"way": way, "concurrency": level, "repeat": repeat} | samples)
    print(table(points))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "bare-door.json"
    path.write_text(json.dumps(describe(options.seed) | {"points": points}, indent=1), encoding="utf-8")
    print(f"result: {path}")
    return 0


def with_bare_models(source: Path, target: Path) -> Path:
    """The door, its ONNX engine and the bare models, in a repository of their own."""
    for name in (*DOOR_MODELS, WAYS["direct"]):
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(BARE, target, dirs_exist_ok=True)
    return target


def keep_rows(repository: Path, bundle: Bundle, visits: Sequence[Visit]) -> None:
    """Give the bare models what the real ones would make of these visits."""
    extractor = FeatureExtractor(bundle.schema, bundle.catalog, bundle.store())
    ready: dict[str, Any] = {}
    steps = zip(door_steps(visits, "onnx"), row_steps(visits, bundle), strict=True)
    for index, (request, rows) in enumerate(steps):
        features = extractor.extract({tensor.name: tensor.data for tensor in request})
        ready[f"features/{index}"] = pack(features)
        ready |= {f"{tensor.name}/{index}": tensor.data.reshape(tensor.data.shape[-2:]) for tensor in rows}
    for model in ("bare_features", "bare_router"):
        np.savez(repository / model / "ready.npz", **ready)


def table(points: Sequence[dict[str, Any]]) -> str:
    """Answers a second and p50 by callers and way, over the engine's own, and the best of each over its best."""
    best: dict[str, float] = {}
    lines = [f"{'callers':>8} {'way':>8} {'answers/s':>10} {'p50 ms':>8} {'of direct':>10}"]
    for level in sorted({point["concurrency"] for point in points}):
        rates = {}
        for way in WAYS:
            chosen = [point for point in points if (point["way"], point["concurrency"]) == (way, level)]
            rates[way] = statistics.median(point["throughput"] for point in chosen)
            best[way] = max(best.get(way, 0.0), rates[way])
            p50 = statistics.median(value for point in chosen for value in point["milliseconds"])
            lines.append(f"{level:8d} {way:>8} {rates[way]:10.1f} {p50:8.2f} {rates[way] / rates['direct']:10.2f}")
    shares = ", ".join(f"{way} {best[way]:.0f}/s ({best[way] / best['direct']:.2f})" for way in WAYS)
    lines.append(f"saturation, of direct's: {shares}")
    for way in WAYS:
        chosen = [point["processor_ms"] for point in points if point["way"] == way]
        names = sorted({name for point in chosen for name in point})
        means = {name: statistics.fmean(point.get(name, 0.0) for point in chosen) for name in names}
        spent = ", ".join(f"{name} {value:.2f}" for name, value in means.items() if value >= _SHOWN_MS)
        lines.append(f"processor ms a request, {way}: {spent}")
    return "\n".join(lines)


def _point(
    analyzer: Analyzer,
    server: TritonServer,
    bundle: Bundle,
    way: str,
    visits: Sequence[Visit],
    level: int,
    folder: Path,
) -> dict[str, Any]:
    path = folder / f"{way}.json"
    if way == "direct":
        write_input(path, row_steps(visits, bundle))
    else:
        steps = door_steps(visits, "onnx")
        write_input(path, (_needed(step) for step in steps) if way == "bare" else steps)
    processes = ServerProcesses(server.pid)
    for last in (False, False, True):
        before, client = seconds_by_model(processes.processes()), _children_seconds()
        try:
            samples = analyzer.run(
                server.grpc_url, WAYS[way], path, len(visits), concurrency=level, timeout=_STALLED_SECONDS
            )
            break
        except StalledError as error:
            print(f"   {level:4d} {way:8} {error} Once more.", flush=True)
            if last:
                raise
    print(f"   {level:4d} {way:8} {len(visits) / samples.seconds:8.1f}/s", flush=True)
    spent = {name: now - before.get(name, 0.0) for name, now in seconds_by_model(processes.processes()).items()}
    spent["perf_analyzer"] = _children_seconds() - client
    return {
        "processor_ms": {name: round(1e3 * value / len(visits), 3) for name, value in spent.items() if value > 0},
        "throughput": len(samples.latencies_ms) / samples.seconds,
        "seconds": samples.seconds,
        "milliseconds": samples.latencies_ms,
    }


def seconds_by_model(pids: Sequence[int]) -> dict[str, float]:
    """Processor time so far of Triton's process and of those of its Python models, by name."""
    found: dict[str, float] = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            models = [Path(word).parent.parent.name for word in words if word.endswith(("/model.py", "/model.onnx"))]
            name = models[0] if models else Path(words[0]).name
            found[name] = found.get(name, 0.0) + processor_seconds(pid)
    return found


def _children_seconds() -> float:
    """Processor time of processes that this one has waited for."""
    times = os.times()
    return times.children_user + times.children_system


def _needed(step: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for tensor in step if tensor.name in _NEEDED]


if __name__ == "__main__":
    sys.exit(main())
