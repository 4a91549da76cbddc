"""``python -m perf.tensorrt_gpu``: TensorRT plans of the project's own graphs beside PyTorch, on one GPU.

Three steps, as TensorRT 8.6 needs another Python than PyTorch has (``perf/h200/tensorrt.sh`` runs them in turn):

    python -m perf.tensorrt_gpu export --work FOLDER     # graphs, cases, and PyTorch's own errors and times
    python3.10 -m perf.tensorrt_plans --work FOLDER      # plans: parity and times
    python -m perf.tensorrt_gpu serve --work FOLDER      # the same plans behind a real tritonserver
    python -m perf.tensorrt_gpu report --work FOLDER --out perf/results/tensorrt-h200.json

``--dry-run`` runs every step on a CPU: preset tiny, and ONNX Runtime in the place of plans. Random networks, heads
scaled to logits of standard deviation 1: no trained checkpoint of these sizes exists, and time does not depend on
weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import string
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.install import TEMPLATES
from export.onnx import calibration_inputs, graph_of, save_graph
from export.precision import Precision
from export.quantize import int8_in_pytorch, quantize_for_tensorrt
from export.requests import RealRequests
from export.rows import random_rows
from mtgr.checkpoint import Checkpoint
from mtgr.config import preset
from mtgr.errors import ConfigurationError
from mtgr.files import write_json
from mtgr.schema import FIRST_ID
from mtgr.serving.command import server_command
from mtgr.serving.find import find_installation
from mtgr.serving.ports import free_ports
from perf.record import describe
from perf.synthetic import synthetic_checkpoint
from perf.tensorrt_plans import error_of, padded_to

OPSET = 17  # the newest that 8.6 reads
BUCKET = (512, 256)  # context and candidates that are timed, and those of graphs of fixed lengths
# Batch, context and candidates: lone and merged requests, the shortest, and what is longer than the bucket.
SHAPES = {
    "b1": (1, *BUCKET),
    "b8": (8, *BUCKET),
    "b3-ragged": (3, 384, 64),
    "b1-shortest": (1, 64, 16),
    "b32-short": (32, 128, 16),
    "b2-long": (2, 1024, 1024),
}
TIMED = ("b1", "b8")
# What matters most first: a plan of one bucket is built eight times at most.
PLANS: tuple[tuple[str, Precision, str], ...] = (
    ("rank", "fp16", "large"), ("rank", "fp16", "small"), ("rank", "fp32", "small"), ("rank", "int8", "small"),
    ("retrieve", "fp16", "small"), ("rank", "fp32", "large"), ("rank", "int8", "large"), ("retrieve", "fp16", "large"),
    ("retrieve", "fp32", "small"), ("retrieve", "fp32", "large"), ("retrieve", "int8", "small"),
    ("retrieve", "int8", "large"),
)  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments: list[str] | None = None) -> int:
    """Run one step; 0 if all went well."""
    parser = argparse.ArgumentParser(prog="python -m perf.tensorrt_gpu", description=__doc__)
    parser.add_argument("step", choices=["export", "serve", "report"])
    parser.add_argument("--work", type=Path, required=True, help="folder for graphs, plans, and intermediate results")
    parser.add_argument("--out", type=Path, help="result of the step report")
    parser.add_argument("--preset", action="append", choices=["tiny", "small", "large"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stub", type=Path, help="Triton's Python stub that has TensorRT, for the step serve")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return {"export": export_step, "serve": serve_step, "report": report_step}[options.step](options)


def export_step(options: argparse.Namespace) -> int:
    """Write graphs and cases, and measure PyTorch: eager fp32, and compiled fp16 with CUDA graphs."""
    presets = options.preset or (["tiny"] if options.dry_run else ["small", "large"])
    graphs: list[dict[str, Any]] = []
    baseline: dict[str, Any] = {}
    for name in presets:
        model = checkpoint(name, options.seed)
        rows = case_rows(model, options.seed, options.dry_run)
        write_cases(model, rows, options.work, name)
        for kind, precision, size in PLANS:
            if size == ("small" if name == "tiny" else name):
                graphs.append(write_graphs(model, kind, precision, name, rows, options))
        baseline[name] = torch_times(model, rows, options.dry_run)
        print(f"== {name} PyTorch p50 {baseline[name]['p50']}", flush=True)
    order = [(kind, precision) for kind, precision, _ in PLANS]
    graphs.sort(key=lambda entry: order.index((entry["kind"], entry["precision"])))
    write_json(options.work / "graphs.json", graphs)
    write_json(options.work / "torch.json", baseline)
    return 0


def checkpoint(name: str, seed: int) -> Checkpoint:
    """A random network whose logits have standard deviation 1, so that errors of its scores mean something."""
    made = synthetic_checkpoint(preset(name, max_positions=4096), 20_000, seed)
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


def write_graphs(
    model: Checkpoint,
    kind: str,
    precision: Precision,
    name: str,
    rows: dict[str, tuple[Tensor, Tensor]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One graph with dynamic lengths and one of the bucket, both with a dynamic batch; what a plan of it must hold."""
    graph = graph_of(model, f"mtgr_onnx_{kind}", precision)
    title = f"{name}-{kind}-{precision}"
    batch = torch.export.Dim("batch", max=64)
    bucket = random_rows(model.schema, model.catalog, 2, *BUCKET, np.random.default_rng(options.seed))
    variants = {
        "dynamic": (graph, random_rows(model.schema, model.catalog, 2, 40, 12, np.random.default_rng(0))),
        "fixed": (dataclasses.replace(graph, dynamic_shapes=tuple({0: batch} for _ in graph.inputs)), bucket),
    }
    for lengths, (variant, example) in variants.items():
        path = options.work / title / lengths / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_graph(variant.module, path, example[: len(graph.inputs)], variant, OPSET)
        except RuntimeError as error:  # the converter to this opset gives up on some graphs: the other may go well
            print(f"   {title} {lengths}: no graph of opset {OPSET}: {str(error).splitlines()[-1][:200]}", flush=True)
            path.unlink(missing_ok=True)
            continue
        if precision == "int8":
            samples = calibration_inputs(model, RealRequests(), options.seed)
            if lengths == "fixed":
                declared = {
                    key: (None, (-1, length)) for key, length in zip(("context", "candidates"), BUCKET, strict=True)
                }
                samples = (padded for one in samples if (padded := padded_to(dict(one), declared)) is not None)
            wanted = set(graph.inputs)
            quantize_for_tensorrt(path, path, ({key: one[key] for key in wanted} for one in samples))
    wanted = ["task_scores"] if kind == "rank" else ["logits", "scores"]
    entry = {
        "name": title,
        "preset": name,
        "kind": kind,
        "precision": precision,
        "cases": f"{name}.npz",
        "shapes": list(rows),
        "timed": [shape for shape in TIMED if shape in rows],
        "wanted": wanted,
        "first_id": int(FIRST_ID),
        "temperature": model.config.temperature,
    }
    entry["native_error"] = 0.0 if precision == "fp32" else native_error(graph, rows, entry, options.work, precision)
    print(f"   {title}: PyTorch's own error {entry['native_error']:.2e}", flush=True)
    return entry


def native_error(
    graph: Any, rows: dict[str, tuple[Tensor, Tensor]], entry: dict[str, Any], work: Path, precision: Precision
) -> float:
    """What PyTorch loses in the same precision on this device."""
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
    return worst


def torch_times(model: Checkpoint, rows: dict[str, tuple[Tensor, Tensor]], small: bool) -> dict[str, Any]:
    """Raw milliseconds of ranking, host to host as the plans are timed."""
    rounds, warm = (3, 1) if small else (100, 20)
    eager = model.model.to(DEVICE).eval()
    paths: dict[str, Callable[..., Tensor]] = {"eager fp32": eager}
    if DEVICE == "cuda":
        half = graph_of(model, "mtgr_onnx_rank", "fp16").module.to(DEVICE).eval()
        paths["compiled fp16, CUDA graphs"] = torch.compile(half, mode="reduce-overhead")
    samples: dict[str, dict[str, list[float]]] = {path: {} for path in paths}
    for path, network in paths.items():
        for shape in (shape for shape in TIMED if shape in rows):
            pinned = [part.pin_memory() if DEVICE == "cuda" else part for part in rows[shape]]
            for index in range(-warm, rounds):
                begin = time.perf_counter()
                with torch.inference_mode():
                    network(*(part.to(DEVICE, non_blocking=True) for part in pinned)).float().cpu()
                if index >= 0:
                    samples[path].setdefault(shape, []).append(1e3 * (time.perf_counter() - begin))
    model.model.cpu()
    p50 = {path: {shape: round(float(np.median(v)), 3) for shape, v in own.items()} for path, own in samples.items()}
    return {"milliseconds": samples, "p50": p50}


def serve_step(options: argparse.Namespace) -> int:
    """Serve each plan through a real tritonserver, compare its answers and time them."""
    import tritonclient.grpc as client

    entries = json.loads((options.work / "plans.json").read_text(encoding="utf-8"))
    results = []
    for entry in [entry for entry in entries if "lengths" in entry]:
        repository = options.work / "served"
        shutil.rmtree(repository, ignore_errors=True)
        model = f"mtgr_{'onnx' if options.dry_run else 'tensorrt'}_{entry['kind']}"
        place(entry, model, repository, options)
        http, grpc, metrics = free_ports("127.0.0.1", 3)
        command, environment = server_command(find_installation())
        command += [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
        command.append(f"--model-repository={repository}")
        environment |= tensorrt_environment(environment)
        with (options.work / f"{entry['name']}.server.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                await_ready(process, http)
                with client.InferenceServerClient(f"127.0.0.1:{grpc}") as connection:
                    results.append(ask(client, connection, model, entry, options))
            except ConfigurationError as error:
                results.append({"name": entry["name"], "failed": str(error)})
            finally:
                process.terminate()
                process.wait(60)
        print(f"== served {entry['name']}: {results[-1].get('p50', results[-1].get('failed'))}", flush=True)
        write_json(options.work / "served.json", results)
    return int(not results or any("failed" in result or not result["holds"] for result in results))


def place(entry: dict[str, Any], model: str, repository: Path, options: argparse.Namespace) -> None:
    """The project's own template with this plan; of one bucket, without the warm-up and graphs of others."""
    source = options.work / entry["name"] / entry["lengths"]
    version = repository / model / "1"
    version.mkdir(parents=True)
    with np.load(options.work / entry["cases"]) as cases:
        width = cases["b1/context"].shape[2]
        tasks, retrieved = cases["b1/task_scores"].shape[2], cases["b1/scores"].shape[1]
    template = string.Template((TEMPLATES / model / "config.pbtxt").read_text(encoding="utf-8"))
    text = template.substitute(width=width, tasks=tasks, retrieved=retrieved)
    if entry["lengths"] == "fixed":
        text = text.partition("optimization {")[0].replace("max_batch_size: 32", "max_batch_size: 8")
        text = text.partition("# One launch")[0].replace("dims: [ -1, ${width} ]", f"dims: [ -1, {width} ]")
    (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")
    if options.stub is not None:  # a stub in the model's folder is used for this model
        shutil.copy2(options.stub, version.parent / "triton_python_backend_stub")
        (version.parent / "triton_python_backend_stub").chmod(0o755)
    for path in source.iterdir():
        if path.name.startswith("model.onnx" if options.dry_run else "model.plan"):
            os.link(path, version / path.name)


def tensorrt_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What the stub of another Python needs: MTGR_TRT_PYTHONHOME is PYTHONHOME there, and so on; paths go first."""
    prefix = "MTGR_TRT_"
    given = {name.removeprefix(prefix): value for name, value in os.environ.items() if name.startswith(prefix)}
    for name in given.keys() & {"LD_LIBRARY_PATH", "PATH"}:
        given[name] = os.pathsep.join([given[name], environment.get(name, "")]).rstrip(os.pathsep)
    return given


def await_ready(process: subprocess.Popen[bytes], port: int, seconds: float = 180.0) -> None:
    """Wait until the server is ready.

    Raises:
        ConfigurationError: If it ends or takes too long.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise ConfigurationError("the server did not become ready; its log beside the results says why.")


def ask(client: Any, connection: Any, model: str, entry: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Errors at every shape and raw milliseconds, seen by a gRPC client on the same machine."""
    errors: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    names = ["context", "candidates"] if entry["kind"] == "rank" else ["context"]
    outputs = ["task_scores"] if entry["kind"] == "rank" else ["items", "scores"]
    fixed = dict(zip(("context", "candidates"), BUCKET, strict=True)) if entry["lengths"] == "fixed" else {}
    with np.load(options.work / entry["cases"]) as cases:
        for shape in entry["shapes"]:
            rows = {key: cases[f"{shape}/{key}"] for key in names}
            padded = padded_to(rows, {key: (None, (-1, fixed.get(key, -1))) for key in names})
            if padded is None or (fixed and len(padded["context"]) > 8):
                continue
            tensors = []
            for key, array in padded.items():
                tensors.append(client.InferInput(key, list(array.shape), "INT32"))
                tensors[-1].set_data_from_numpy(array)
            wanted = {key: cases[f"{shape}/{key}"] for key in entry["wanted"]}
            rounds = (3 if options.dry_run else 120) if shape in entry["timed"] else 1
            for index in range(rounds):
                begin = time.perf_counter()
                answer = connection.infer(model, tensors)
                if shape in entry["timed"] and index >= rounds // 6:
                    samples.setdefault(shape, []).append(1e3 * (time.perf_counter() - begin))
            arrays = {key: answer.as_numpy(key) for key in outputs}
            errors[shape] = error_of(arrays, wanted, entry)
    worst = max(errors.values())
    return {
        "name": entry["name"],
        "errors": errors,
        "max_error": worst,
        "holds": bool(worst <= entry["bound"]),
        "milliseconds": samples,
        "p50": {shape: round(float(np.median(values)), 3) for shape, values in samples.items()},
    }


def report_step(options: argparse.Namespace) -> int:
    """Put the steps' results together, with their origin, and print the table that the README shows."""
    if options.out is None:
        print("tensorrt_gpu: --out FILE says where the report goes", file=sys.stderr)
        return 2

    def read(name: str) -> Any:
        path = options.work / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    plans, baseline, served = read("plans"), read("torch"), {entry["name"]: entry for entry in read("served")}
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else "none (dry run)"
    write_json(
        options.out, describe(options.seed) | {"gpu": gpu, "pytorch": baseline, "plans": plans, "served": served}
    )
    for entry in plans:
        own = baseline.get(entry["preset"], {}).get("p50", {})
        eager = own.get("eager fp32", {}).get("b8")
        found = entry.get("p50", {}).get("b8")
        ratio = f"{eager / found:.1f}x" if eager and found and entry["kind"] == "rank" else "-"
        print(
            f"{entry['name']:24} {entry.get('lengths', 'not built'):10} holds {entry.get('holds')!s:6} "
            f"p50 {entry.get('p50')} served {served.get(entry['name'], {}).get('p50')} of eager at batch 8: {ratio}"
        )
    for name, own in baseline.items():
        print(f"{name}: {own['p50']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
