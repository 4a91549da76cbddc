"""Second step of ``perf.tensorrt_gpu``: build plans, compare and time them. Python 3.10 with TensorRT, without PyTorch.

    python -m perf.tensorrt_plans --work FOLDER [--budget SECONDS] [--dry-run]

Of each graph the one with dynamic lengths is tried first; what TensorRT refuses is built for one bucket, at most
eight times. With ``--dry-run`` ONNX Runtime takes the place of the plans, so that everything else can run on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from export.tensorrt import BuildOptions, build_tensorrt_engine
from mtgr.errors import ConfigurationError

Arrays = dict[str, npt.NDArray[Any]]

MAX_FIXED = 8
ROUNDS, WARM = 100, 20
TOLERANCE = 1e-5  # fp32
RUNTIME = Path(__file__).resolve().parent.parent / "backends" / "tensorrt" / "tensorrt_plan.py"


class Runner(Protocol):
    """A plan, or what stands for it."""

    inputs: dict[str, tuple[Any, tuple[int, ...]]]

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch."""
        ...


class OnnxRunner:
    """A graph in ONNX Runtime, as if it were a plan.

    Args:
        path: The graph.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.inputs = {
            node.name: (np.dtype(np.int32), tuple(size if isinstance(size, int) else -1 for size in node.shape))
            for node in self._session.get_inputs()
        }
        self._outputs = [node.name for node in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))

    def poison(self) -> None:
        """Nothing: every run has memory of its own."""

    def close(self) -> None:
        """Free the session."""
        del self._session


def main(arguments: list[str] | None = None) -> int:
    """Build what the first step exported; 0 if every plan was built and agrees."""
    parser = argparse.ArgumentParser(prog="python -m perf.tensorrt_plans", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the first step")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which no build is begun")
    parser.add_argument("--blas", action="store_true", help="let 8.6 use cuBLAS and cuDNN, where they are installed")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    results: list[dict[str, Any]] = []
    fixed = 0
    for entry in json.loads((options.work / "graphs.json").read_text(encoding="utf-8")):
        result: dict[str, Any] = {**entry, "refused": {}}
        results.append(result)
        for lengths in ("dynamic", "fixed"):
            if time.monotonic() - start > options.budget:
                result["refused"][lengths] = "the time for builds was over"
                break
            if lengths == "fixed":
                if fixed == MAX_FIXED:
                    result["refused"][lengths] = f"{MAX_FIXED} plans of one bucket were built already"
                    break
                fixed += 1
            try:
                runner, built = _build(options, entry, lengths)
            except ConfigurationError as error:
                result["refused"][lengths] = str(error)
                print(f"   {entry['name']} {lengths}: {error}", flush=True)
                continue
            result |= {"lengths": lengths, "build": built}
            try:
                result |= _measure(runner, entry, options)
            finally:
                runner.close()
            print(
                f"== {entry['name']} {lengths}: error {result['max_error']:.2e} of {result['bound']:.2e}, "
                f"holds {result['holds']}, p50 {result['p50']}",
                flush=True,
            )
            break
        # Written after each, so that a run that is cut off loses one.
        (options.work / "plans.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(not all(result.get("holds") for result in results))


def _build(options: argparse.Namespace, entry: dict[str, Any], lengths: str) -> tuple[Any, dict[str, Any]]:
    graph = options.work / entry["name"] / lengths / "model.onnx"
    if not graph.is_file():
        raise ConfigurationError(f"there is no graph at {graph}: the first step could not write it.")
    if options.dry_run:
        return OnnxRunner(graph), {"tensorrt": "dry run: ONNX Runtime"}
    plan = graph.with_name("model.plan")
    settings = BuildOptions(
        max_context=1024,
        max_batch=32 if lengths == "dynamic" else 8,
        workspace_gib=16.0,
        blas=options.blas,
        timing_cache=options.work / "timings.cache",
    )
    manifest = build_tensorrt_engine(graph, plan, entry["precision"], settings)
    details = {name: manifest.details[name] for name in ("gpu", "layers", "plan_bytes", "profiles", "seconds")}
    return _runtime().Plan(str(plan)), details | {"tensorrt": manifest.versions["tensorrt"]}


def _runtime() -> Any:
    """The stand-in's own runner: what is measured here is what serves."""
    if "tensorrt_plan" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tensorrt_plan", RUNTIME)
        if spec is None or spec.loader is None:
            raise ConfigurationError(f"{RUNTIME} cannot be loaded.")
        sys.modules["tensorrt_plan"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["tensorrt_plan"]


def _measure(runner: Any, entry: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Errors at every shape, and raw times of the shapes that are timed."""
    errors: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    with np.load(options.work / entry["cases"]) as cases:
        for name in entry["shapes"]:
            inputs = {key: cases[f"{name}/{key}"] for key in runner.inputs}
            padded = padded_to(inputs, runner.inputs)
            if padded is None:
                continue  # longer than the one bucket
            for _ in range(2):
                runner.poison()
                answer = runner.run(padded)
                errors[name] = max(
                    errors.get(name, 0.0),
                    error_of(answer, {key: cases[f"{name}/{key}"] for key in entry["wanted"]}, entry),
                )
            if name in entry["timed"]:
                rounds = 3 if options.dry_run else ROUNDS
                for index in range(-WARM if not options.dry_run else 0, rounds):
                    begin = time.perf_counter()
                    runner.run(padded)
                    if index >= 0:
                        samples.setdefault(name, []).append(1e3 * (time.perf_counter() - begin))
    worst = max(errors.values())
    bound = max(TOLERANCE, 2 * entry["native_error"])
    return {
        "errors": errors,
        "max_error": worst,
        "bound": bound,
        "holds": bool(worst <= bound),
        "milliseconds": samples,
        "p50": {name: round(float(np.median(values)), 3) for name, values in samples.items()},
    }


def padded_to(inputs: Arrays, declared: dict[str, tuple[Any, tuple[int, ...]]]) -> Arrays | None:
    """Rows padded to the lengths that a graph has; None if they are longer."""
    padded = {}
    for name, rows in inputs.items():
        length = declared[name][1][1]
        missing = 0 if length == -1 else length - rows.shape[1]
        if missing < 0:
            return None
        padded[name] = np.pad(rows, ((0, 0), (0, missing), (0, 0)))
    return padded


def error_of(answer: Arrays, wanted: Arrays, entry: dict[str, Any]) -> float:
    """Largest difference: of task scores, or of the similarities of the items at each place."""
    if "task_scores" in wanted:
        expected = wanted["task_scores"]
        return _difference(answer["task_scores"][:, : expected.shape[1]], expected)
    logits, expected = wanted["logits"], wanted["scores"]
    items = answer["items"].astype(np.int64) - entry["first_id"]
    distinct = all(len(np.unique(row)) == len(row) for row in items)
    if items.shape != expected.shape or not distinct or items.min() < 0 or items.max() >= logits.shape[1]:
        return float("inf")
    found = np.take_along_axis(logits, items, axis=1)
    errors = _difference(found, expected), _difference(answer["scores"].astype(np.float32), expected)
    return float(entry["temperature"] * max(errors))


def _difference(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max(initial=0.0))


if __name__ == "__main__":
    sys.exit(main())
