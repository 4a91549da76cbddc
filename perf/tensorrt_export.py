"""Write what plans are built from and compared with: checkpoints, graphs, cases, and what PyTorch itself loses.

Random networks, heads scaled to logits of standard deviation 1: no trained checkpoint of these sizes exists, and time
does not depend on weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.last_token import LastToken
from export.onnx import calibration_inputs
from export.onnx_graphs import graph_of
from export.precision import Precision
from export.quantize import int8_in_pytorch, quantize_for_tensorrt
from export.requests import RealRequests
from export.rows import random_rows
from export.trace import save_graph
from mtgr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mtgr.config import preset
from mtgr.errors import ConfigurationError
from mtgr.files import replaced_directory, write_json
from mtgr.schema import FIRST_ID
from perf.synthetic import synthetic_checkpoint
from perf.tensorrt_entries import BUCKET, PLANS, SHAPES, STATIC, TIMED, TINY_PLANS, Lengths, Wanted, folder_of
from perf.tensorrt_entries import graph_of as graph_file
from perf.tensorrt_measure import error_of, padded_to
from perf.tensorrt_torch import DEVICE, attempted

OPSET = 17  # the newest that 8.6 reads
GRAPH_S = 240.0  # one graph: to trace, save, and quantise it
Job = tuple[str, Lengths, LastToken]


def chosen(plans: Sequence[Wanted], names: Sequence[str] | None) -> list[Wanted]:
    """Plans of these names; all without any.

    Raises:
        ConfigurationError: If there is no plan of a name.
    """
    known = {plan.name: plan for plan in plans}
    for name in names or ():
        if name not in known:
            raise ConfigurationError(f"--plan {name}: there is no such plan; there are {', '.join(known)}.")
    return [known[name] for name in names] if names else list(plans)


def export_step(options: argparse.Namespace) -> int:
    """Write checkpoints, then graphs, a process each, and meanwhile cases and what PyTorch itself loses."""
    plans = chosen(TINY_PLANS if options.dry_run else PLANS, options.plan)
    presets = dict.fromkeys(plan.preset for plan in plans)
    for name in presets:
        with replaced_directory(folder_of(options.work, name)) as staging:
            save_checkpoint(checkpoint(name, options.seed), staging)
    jobs = list(dict.fromkeys(job for plan in plans for job in plan.graphs()))
    threads = max(1, len(os.sched_getaffinity(0)) - 2)
    with ThreadPoolExecutor(threads) as pool:
        written = {job: pool.submit(graph_in_process, options, *job) for job in jobs}
        losses: dict[str, float] = {}
        shapes: dict[str, list[str]] = {}
        models: dict[str, Checkpoint] = {}
        for name in presets:
            model = models[name] = load_checkpoint(folder_of(options.work, name))
            rows = case_rows(model, options.seed, options.dry_run)
            shapes[name] = list(rows)
            write_cases(model, rows, options.work, name)
            for plan in plans:
                if plan.preset == name and plan.family not in losses:
                    losses[plan.family] = loss_of(model, plan, rows, options.work)
        problems = {job: future.result() for job, future in written.items()}
    entries = []
    for plan in plans:
        failed = {"-".join(job): problems[job] for job in plan.graphs() if problems[job] is not None}
        entries.append(
            entry_of(models[plan.preset], plan, shapes[plan.preset], losses[plan.family]) | {"graphs": failed}
        )
    write_json(options.work / "graphs.json", entries)
    return int(any(problem is not None for problem in problems.values()))


def checkpoint(name: str, seed: int) -> Checkpoint:
    """A random network whose logits have standard deviation 1, so that errors of its scores mean something."""
    size, _, bias = name.partition("-")
    config = preset(size, max_positions=4096) if not bias else preset(size, max_positions=4096, relative_bias=True)
    made = synthetic_checkpoint(config, 20_000, seed)
    rows = random_rows(made.schema, made.catalog, 2, 256, 64, np.random.default_rng(seed))
    heads: Any = made.model.task_heads
    last = heads.tower if hasattr(heads, "tower") else heads.towers.weight
    with torch.inference_mode():
        spread = made.model(*rows).logit().std(dim=1).mean()
    with torch.no_grad():
        last.mul_(1 / spread)
    return made


def case_rows(model: Checkpoint, seed: int, small: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Padded rows by the name of their shape: the first user fills it, the others are of random lengths."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, (batch, context, candidates) in SHAPES.items():
        if small and batch * context > 2048:
            continue
        found[name] = random_rows(model.schema, model.catalog, batch, context, candidates, generator)
    found["b1-shortest"][0][:, 1:] = 0  # one token and its padding
    return found


def write_cases(model: Checkpoint, rows: dict[str, tuple[Tensor, Tensor]], work: Path, name: str) -> None:
    """Inputs and what the reference in fp32 answers."""
    arrays = {}
    network = model.model.to(DEVICE)
    for shape, (context, candidates) in rows.items():
        with torch.inference_mode():
            on_device = context.to(DEVICE), candidates.to(DEVICE)
            scores = network(*on_device)
            logits = network.next_item_logits(on_device[0])
            best = network.retrieve(on_device[0])[1]
        if shape in TIMED and float(scores.std(dim=1).mean()) < 0.05:
            raise ConfigurationError(f"scores of {name} hardly differ at {shape}: an error would not be seen.")
        arrays |= {
            f"{shape}/context": context.numpy(),
            f"{shape}/candidates": candidates.numpy(),
            f"{shape}/task_scores": scores.cpu().numpy(),
            f"{shape}/logits": logits.cpu().numpy(),
            f"{shape}/scores": best.cpu().numpy(),
        }
    model.model.cpu()
    work.mkdir(parents=True, exist_ok=True)
    np.savez(work / f"{name}.npz", **arrays)


def entry_of(model: Checkpoint, plan: Wanted, shapes: list[str], loss: float) -> dict[str, Any]:
    """What a plan must hold."""
    return {
        "name": plan.name,
        "family": plan.family,
        "tries": [[lengths, way.name] for lengths, way in plan.tries],
        "preset": plan.preset,
        "kind": plan.kind,
        "precision": plan.precision,
        "cases": f"{plan.preset}.npz",
        "shapes": shapes,
        "timed": [shape for shape in TIMED if shape in shapes],
        "wanted": ["task_scores"] if plan.kind == "rank" else ["logits", "scores"],
        "first_id": int(FIRST_ID),
        "temperature": model.config.temperature,
        "native_error": loss,
    }


def loss_of(model: Checkpoint, plan: Wanted, rows: dict[str, tuple[Tensor, Tensor]], work: Path) -> float:
    """What PyTorch loses in the plan's precision; 0 in fp32, or where PyTorch cannot tell."""
    found = {"error": 0.0}
    if plan.precision != "fp32":
        entry = entry_of(model, plan, list(rows), 0.0)
        attempted(
            f"{plan.family} in PyTorch",
            lambda: found.update(error=native_error(model, rows, entry, work, plan.precision)),
        )
    print(f"   {plan.family}: PyTorch's own error {found['error']:.2e}", flush=True)
    return found["error"]


def graph_in_process(options: argparse.Namespace, title: str, lengths: Lengths, last: LastToken) -> str | None:
    """Write one graph in a process of its own; None, or the end of what it said."""
    command = [sys.executable, "-m", "perf.tensorrt_gpu", "graph", "--work", str(options.work), "--only", title]
    command += ["--lengths", lengths, "--last", last, "--seed", str(options.seed), *["--dry-run"] * options.dry_run]
    # Most of the time one thread is at work; the GPU is the others'.
    environment = os.environ | {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=GRAPH_S, env=environment, errors="replace"
        )
    except subprocess.TimeoutExpired:
        problem: str | None = f"it was ended after {GRAPH_S:.0f} s"
    else:
        said = (done.stderr.strip() or f"status {done.returncode}").splitlines()
        problem = None if done.returncode == 0 else said[-1][:500]
        if problem is not None:
            log = options.work / f"{title}-{lengths}-{last}.model.log"
            log.write_text(done.stdout + done.stderr, encoding="utf-8")
    seconds = time.monotonic() - begin
    print(f"   graph {title} {lengths} {last}: {problem or 'written'} ({seconds:.0f} s)", flush=True)
    return problem


def graph_step(options: argparse.Namespace) -> int:
    """Write one graph, with the axes that vary as ``--lengths`` says."""
    preset_name, kind, precision = options.only.rsplit("-", 2)
    model = load_checkpoint(folder_of(options.work, preset_name))
    graph = graph_of(model, f"mtgr_onnx_{kind}", precision, options.last)
    users, lengths = 2, (40, 12)
    if options.lengths != "dynamic":
        users, lengths = STATIC.get(options.lengths, users), BUCKET
        batch = torch.export.Dim("batch", max=64)
        axes = None if options.lengths in STATIC else tuple({0: batch} for _ in graph.inputs)
        graph = dataclasses.replace(graph, dynamic_shapes=axes)
    example = random_rows(model.schema, model.catalog, users, *lengths, np.random.default_rng(options.seed))
    target = graph_file(options.work, options.only, options.lengths, options.last)
    with replaced_directory(target.parent) as staging:  # a graph that is there is a whole one
        path = staging / target.name
        save_graph(graph.module, path, example[: len(graph.inputs)], graph, OPSET)
        if precision == "int8":
            quantize_for_tensorrt(path, path, calibration(model, graph.inputs, options))
    return 0


def calibration(
    model: Checkpoint, inputs: tuple[str, ...], options: argparse.Namespace
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Random rows, padded to the bucket where the graph has only that."""
    bucket = (-1, -1) if options.lengths == "dynamic" else BUCKET
    declared = {key: (None, (-1, length)) for key, length in zip(("context", "candidates"), bucket, strict=True)}
    for rows in calibration_inputs(model, RealRequests(), options.seed):
        padded = padded_to({key: rows[key] for key in inputs}, declared)
        if padded is not None:
            yield padded


def native_error(
    model: Checkpoint,
    rows: dict[str, tuple[Tensor, Tensor]],
    entry: dict[str, Any],
    work: Path,
    precision: Precision,
) -> float:
    """What PyTorch loses in the same precision on this device."""
    graph = graph_of(model, f"mtgr_onnx_{entry['kind']}", precision)
    module: nn.Module = int8_in_pytorch(graph.module) if precision == "int8" else graph.module
    module = module.to(DEVICE).eval()
    worst = 0.0
    with np.load(work / entry["cases"]) as cases:
        for shape, example in rows.items():
            with torch.inference_mode():
                answer = module(*(part.to(DEVICE) for part in example[: len(graph.inputs)]))
            parts = answer if isinstance(answer, tuple) else (answer,)
            arrays = {key: part.float().cpu().numpy() for key, part in zip(graph.outputs, parts, strict=True)}
            worst = max(worst, error_of(arrays, {key: cases[f"{shape}/{key}"] for key in entry["wanted"]}, entry))
    module.cpu()
    # No number at all would be no bound either.
    return worst if math.isfinite(worst) else 0.0
