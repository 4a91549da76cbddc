"""Errors and times of one plan, as it runs and as CUDA graphs. Python 3.10 without PyTorch."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]

ROUNDS, WARM = 100, 10
SHAPE_S = 2.0  # a slow shape gets fewer rounds, but no fewer than these
FEWEST = 30
FIXED_BATCH = 8  # the largest of plans of one bucket
TOLERANCE = 1e-5  # fp32


class Runner(Protocol):
    """A plan, or what stands for it."""

    inputs: dict[str, tuple[Any, tuple[int, ...]]]

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch."""
        ...

    def poison(self) -> None:
        """Spoil the outputs."""
        ...

    def capture(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """From now on run these shapes as one CUDA graph."""
        ...

    def close(self) -> None:
        """Free memory."""
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

    def capture(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Nothing: there are no CUDA graphs on a CPU."""

    def close(self) -> None:
        """Free the session."""
        del self._session


def parity(runner: Runner, entry: dict[str, Any], work: Path, lengths: str, largest: int) -> dict[str, Any]:
    """Errors at every shape that the plan takes, outputs spoilt before each of two runs."""
    errors: dict[str, float] = {}
    with np.load(work / entry["cases"]) as cases:
        for name in entry["shapes"]:
            padded = padded_to({key: cases[f"{name}/{key}"] for key in runner.inputs}, runner.inputs)
            if padded is None or (lengths == "fixed" and len(padded["context"]) > FIXED_BATCH):
                continue  # longer than the one bucket, or another batch
            wanted = {key: cases[f"{name}/{key}"] for key in entry["wanted"]}
            for _ in range(2):
                errors[name] = max(
                    errors.get(name, 0.0), error_of(spoilt_before(runner, padded, largest), wanted, entry)
                )
    worst, bound = max(errors.values(), default=float("inf")), bound_of(entry)
    return {"errors": errors, "max_error": worst, "bound": bound, "holds": bool(worst <= bound)}


def spoilt_before(runner: Runner, inputs: Arrays, largest: int) -> Arrays:
    """Answers, the outputs of each part spoilt before it is run."""

    def run(part: Arrays) -> Arrays:
        runner.poison()
        return runner.run(part)

    return in_parts(run, inputs, largest)


def in_parts(run: Callable[[Arrays], Arrays], inputs: Arrays, largest: int) -> Arrays:
    """Answers to a batch of which no more than ``largest`` are run at a time."""
    batch = len(inputs["context"])
    if batch <= largest:
        return run(inputs)
    parts = [run({name: rows[at : at + largest] for name, rows in inputs.items()}) for at in range(0, batch, largest)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def timed(runner: Runner, entry: dict[str, Any], options: argparse.Namespace, largest: int) -> dict[str, Any]:
    """Raw milliseconds, host to host, and their medians."""
    samples: dict[str, list[float]] = {}
    rounds = (3, 1) if options.dry_run else (ROUNDS, WARM)
    for name, padded, _ in _timed_cases(runner, entry, options):
        samples[name] = sample(lambda padded=padded: in_parts(runner.run, padded, largest), *rounds)  # type: ignore[misc]
    return {"milliseconds": samples, "p50": medians(samples)}


def captured(runner: Runner, entry: dict[str, Any], options: argparse.Namespace, largest: int) -> dict[str, Any]:
    """The same as CUDA graphs, with errors of their own; why not, if the plan cannot be captured."""
    samples: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    result: dict[str, Any] = {}
    rounds = (3, 1) if options.dry_run else (ROUNDS, WARM)
    try:
        for name, padded, wanted in _timed_cases(runner, entry, options):
            if len(padded["context"]) > largest:
                continue
            runner.capture({key: rows.shape for key, rows in padded.items()})
            errors[name] = error_of(spoilt_before(runner, padded, largest), wanted, entry)
            samples[name] = sample(lambda padded=padded: runner.run(padded), *rounds)  # type: ignore[misc]
    except Exception as error:  # noqa: BLE001 - what a driver may say is not known
        result["failed"] = str(error)
    holds = bool(errors) and max(errors.values()) <= bound_of(entry)
    return result | {"errors": errors, "holds": holds, "milliseconds": samples, "p50": medians(samples)}


def _timed_cases(
    runner: Runner, entry: dict[str, Any], options: argparse.Namespace
) -> Iterator[tuple[str, Arrays, Arrays]]:
    """Name, inputs, and what is wanted of the shapes that are timed."""
    with np.load(options.work / entry["cases"]) as cases:
        for name in entry["timed"]:
            padded = padded_to({key: cases[f"{name}/{key}"] for key in runner.inputs}, runner.inputs)
            if padded is not None:
                yield name, padded, {key: cases[f"{name}/{key}"] for key in entry["wanted"]}


def sample(call: Any, rounds: int, warm: int) -> list[float]:
    """Milliseconds of each of ``rounds`` calls after ``warm`` others; fewer of them where calls are slow."""
    for _ in range(warm):
        call()
    found: list[float] = []
    start = time.perf_counter()
    while len(found) < rounds and (len(found) < FEWEST or time.perf_counter() - start < SHAPE_S):
        begin = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - begin))
    return found


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    """Medians by name, to the microsecond."""
    return {name: round(float(np.median(values)), 3) for name, values in samples.items()}


def bound_of(entry: dict[str, Any]) -> float:
    """The largest error that counts as agreement."""
    return max(TOLERANCE, 2 * float(entry["native_error"]))


def padded_to(inputs: Arrays, declared: dict[str, tuple[Any, tuple[int, ...]]]) -> Arrays | None:
    """Rows padded to the lengths that a graph has; None if they are longer, or of another batch than its only one."""
    padded = {}
    for name, rows in inputs.items():
        batch, length = declared[name][1][:2]
        missing = 0 if length == -1 else length - rows.shape[1]
        if missing < 0 or batch not in (-1, len(rows)):
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
