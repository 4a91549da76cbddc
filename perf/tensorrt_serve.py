"""Serve plans through a real tritonserver; compare its answers and time them."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import string
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from export.install import TEMPLATES
from export.tensorrt_config import fitted_text
from export.tensorrt_ways import WAYS
from mtgr.errors import ConfigurationError
from mtgr.files import write_json
from mtgr.serving.command import server_command
from mtgr.serving.find import find_installation
from mtgr.serving.ports import free_ports
from perf.tensorrt_entries import BUCKET, STATIC
from perf.tensorrt_measure import FIXED_BATCH, Arrays, bound_of, error_of, in_parts, medians, padded_to, sample
from perf.tensorrt_plans import graph_of, plan_of, results
from perf.tensorrt_torch import attempted


def serve_step(options: argparse.Namespace) -> int:
    """Serve plans through a real tritonserver, those of a precision together; compare their answers and time them."""
    plans = best_of(list(results(options.work)))
    served: list[dict[str, Any]] = []
    for precision in dict.fromkeys(entry["precision"] for entry in plans):
        if options.until is not None and time.time() > options.until:
            print(f"   the time was over before {precision} was served", flush=True)
            break
        group = [entry for entry in plans if entry["precision"] == precision]
        attempted(f"serving {precision}", lambda group=group: serve(group, served, options))
    return int(not plans or len(served) < len(plans) or not all(result.get("holds") for result in served))


def best_of(plans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each preset, kind and precision the plan that agrees and is quickest; one that was not measured comes last.

    Plans of one shape compete with nobody: they answer no other.
    """
    best: dict[str, dict[str, Any]] = {}

    def rank(entry: dict[str, Any]) -> tuple[int, float]:
        times = entry.get("p50", {})
        states = {True: 0, None: 1, False: 2}
        return states[entry.get("holds")], times.get("b8", times.get("b1", float("inf")))

    for entry in plans:
        if "lengths" not in entry:
            continue
        family = entry["name"] if entry["lengths"] in STATIC else entry["family"]
        known = best.setdefault(family, entry)
        if rank(entry) < rank(known):
            best[family] = entry
    return list(best.values())


def serve(entries: list[dict[str, Any]], served: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Start a server on these plans and put what it answers into ``served``, which is kept after each."""
    import tritonclient.grpc as client

    repository = options.work / "served"
    shutil.rmtree(repository, ignore_errors=True)
    for entry in entries:
        place(entry, repository, options)
    http, grpc, metrics = free_ports("127.0.0.1", 3)
    command, environment = server_command(find_installation())
    command += [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
    # One plan that does not load leaves the others served.
    command += [f"--model-repository={repository}", "--exit-on-error=false", "--strict-readiness=false"]
    environment |= tensorrt_environment(environment)
    with (options.work / f"{entries[0]['precision']}.server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            await_ready(process, http)
            with client.InferenceServerClient(f"127.0.0.1:{grpc}") as connection:
                for entry in entries:
                    result = {"name": entry["name"], "failed": "the server's log says why"}
                    if connection.is_model_ready(entry["name"]):
                        attempted(
                            f"serving {entry['name']}",
                            lambda entry=entry, result=result: _answered(client, connection, entry, options, result),
                        )
                    served.append(result)
                    write_json(options.work / "served.json", served)
                    print(f"== served {entry['name']}: {result.get('p50', result.get('failed'))}", flush=True)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def _answered(
    client: Any, connection: Any, entry: dict[str, Any], options: argparse.Namespace, result: dict[str, Any]
) -> None:
    result |= ask(client, connection, entry, options)
    del result["failed"]


def place(entry: dict[str, Any], repository: Path, options: argparse.Namespace) -> None:
    """The project's own template with this plan; of one bucket, without the warm-up and graphs of others."""
    if options.dry_run:
        artifact = graph_of(options.work, entry, entry["lengths"], WAYS[entry["way"]])
    else:
        artifact = plan_of(options.work, entry, entry["lengths"])
    model = f"mtgr_{'onnx' if options.dry_run else 'tensorrt'}_{entry['kind']}"
    version = repository / entry["name"] / "1"
    version.mkdir(parents=True)
    with np.load(options.work / entry["cases"]) as cases:
        width = cases["b1/context"].shape[2]
        tasks, retrieved = cases["b1/task_scores"].shape[2], cases["b1/scores"].shape[1]
    template = string.Template((TEMPLATES / model / "config.pbtxt").read_text(encoding="utf-8"))
    text = template.substitute(width=width, tasks=tasks, retrieved=retrieved)
    text = text.replace(f'name: "{model}"', f'name: "{entry["name"]}"')
    if not options.dry_run:
        text = fitted_text(text, len(entry["build"]["profiles"]), entry["build"]["largest"])
        if not entry.get("cuda_graphs", {}).get("holds"):
            text = text.replace("graphs: true", "graphs: false")
    if entry["lengths"] != "dynamic":
        users = STATIC.get(entry["lengths"])
        text = re.split(r"\n(?:optimization|model_warmup) ", text)[0]
        # Where the batch is one too, it is a dimension like others.
        text = re.sub(r"max_batch_size: \d+", f"max_batch_size: {0 if users else FIXED_BATCH}", text)
        for name, length in (("context", BUCKET[0]), ("candidates", BUCKET[1]), ("task_scores", BUCKET[1])):
            dims = f"{users}, {length}" if users else f"{length}"
            text = re.sub(rf'(name: "{name}".*dims: \[) -1,', rf"\1 {dims},", text)
    (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")
    if options.stub is not None:  # a stub in the model's folder is used for this model
        shutil.copy2(options.stub, version.parent / "triton_python_backend_stub")
        (version.parent / "triton_python_backend_stub").chmod(0o755)
    os.link(artifact, version / artifact.name)


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


def ask(client: Any, connection: Any, entry: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Errors at every shape and raw milliseconds, seen by a gRPC client on the same machine."""
    errors: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    names = ["context", "candidates"] if entry["kind"] == "rank" else ["context"]
    outputs = ["task_scores"] if entry["kind"] == "rank" else ["items", "scores"]
    largest = entry["build"]["largest"]
    fixed = dict(zip(("context", "candidates"), BUCKET, strict=True)) if entry["lengths"] != "dynamic" else {}
    users = STATIC.get(entry["lengths"], -1)
    with np.load(options.work / entry["cases"]) as cases:
        for shape in entry["shapes"]:
            rows = {key: cases[f"{shape}/{key}"] for key in names}
            padded = padded_to(rows, {key: (None, (users, fixed.get(key, -1))) for key in names})
            if padded is None or (fixed and len(padded["context"]) > FIXED_BATCH):
                continue
            wanted = {key: cases[f"{shape}/{key}"] for key in entry["wanted"]}

            def run(part: Arrays) -> Arrays:
                return inferred(client, connection, entry["name"], part, outputs)

            def call(padded: Arrays = padded) -> Arrays:
                return in_parts(run, padded, largest)

            errors[shape] = error_of(call(), wanted, entry)
            if shape in entry["timed"]:
                samples[shape] = sample(call, *((3, 1) if options.dry_run else (100, 10)))
    worst = max(errors.values())
    return {
        "errors": errors,
        "max_error": worst,
        "holds": bool(worst <= bound_of(entry)),
        "milliseconds": samples,
        "p50": medians(samples),
    }


def inferred(client: Any, connection: Any, model: str, inputs: Arrays, outputs: list[str]) -> Arrays:
    """What a model answers."""
    tensors = []
    for key, array in inputs.items():
        tensors.append(client.InferInput(key, list(array.shape), "INT32"))
        tensors[-1].set_data_from_numpy(array)
    answer = connection.infer(model, tensors, client_timeout=60)
    return {key: answer.as_numpy(key) for key in outputs}
