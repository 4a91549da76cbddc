"""Export the ``tensorrt`` strategy: graphs become plans for this GPU, each compared with PyTorch as it will serve."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.agreement import compare
from export.differences import SHAPES
from export.install import add_variant, keep_variants, model_directory, template_hash
from export.onnx import export_artifact, sampled_requests
from export.onnx_graphs import graph_of, onnx_precision
from export.opset import OPSET_17
from export.precision import Precision
from export.tensorrt import build_tensorrt_engine
from export.tensorrt_compat import is_legacy
from export.tensorrt_config import fit_config
from export.tensorrt_files import PLAN_FILE
from export.tensorrt_host import tensorrt_version
from export.tensorrt_options import BuildOptions
from export.tensorrt_profiles import MAX_BATCH
from export.tensorrt_runtime import plan_runtime
from export.tensorrt_ways import PLAIN, Way, build_first, ways_to
from export.trace import OPSET
from mtgr.checkpoint import Checkpoint, operations
from mtgr.errors import ConfigurationError
from mtgr.manifest import Manifest
from mtgr.routing.buckets import CANDIDATE_BUCKETS, CONTEXT_BUCKETS, bucket

Arrays = Mapping[str, npt.NDArray[Any]]

_BUCKETS = {"context": CONTEXT_BUCKETS, "candidates": CANDIDATE_BUCKETS}


class PlanEngine:
    """A plan that takes rows of any length: padded to buckets, as the router does.

    Args:
        path: The plan.
        max_batch: Most users that it takes at a time; larger batches are run in parts.

    Raises:
        ConfigurationError: If it cannot be loaded here.
    """

    def __init__(self, path: Path, max_batch: int = MAX_BATCH) -> None:
        self._runtime = plan_runtime()
        self._max_batch = max_batch
        try:
            self._plan = self._runtime.Plan(str(path))
        except self._runtime.PlanError as error:
            raise ConfigurationError(str(error)) from error

    def infer(self, inputs: Arrays, outputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name, without those of padding; they are spoilt first, so that none is of the request before."""
        batch = len(inputs["context"])
        if batch > self._max_batch:
            parts = [
                self.infer({name: rows[at : at + self._max_batch] for name, rows in inputs.items()}, outputs)
                for at in range(0, batch, self._max_batch)
            ]
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        padded = {}
        for name, rows in inputs.items():
            missing = bucket(rows.shape[1], _BUCKETS[name]) - rows.shape[1]
            padded[name] = np.pad(rows, ((0, 0), (0, missing), (0, 0)))
        self._plan.poison()
        try:
            answer = self._plan.run(padded, list(outputs))
        except self._runtime.PlanError as error:
            raise ConfigurationError(str(error)) from error
        if "task_scores" in answer:
            answer["task_scores"] = answer["task_scores"][:, : inputs["candidates"].shape[1]]
        return dict(answer)

    def close(self) -> None:
        """Free the GPU."""
        self._plan.close()


def plan_opset() -> int:
    """Opset of graphs that the TensorRT here reads; the newest where there is none."""
    version = tensorrt_version()
    return OPSET_17 if version is not None and is_legacy(version) else OPSET


def build_plan(
    checkpoint: Checkpoint, model: str, graph: Path, plan: Path, seed: int = 0, force: bool = False
) -> Manifest:
    """Build a plan that agrees with the reference in the first way that leads to one.

    Args:
        checkpoint: The reference.
        model: ``mtgr_onnx_rank`` or ``mtgr_onnx_retrieve``.
        graph: Directory of :func:`export_artifact`.
        plan: Where the plan goes; its manifest lies beside it.
        seed: Of the rows that it is compared on.
        force: Keep a plan in low precision also if it is not close enough.

    Raises:
        ConfigurationError: If it cannot be built here, or is not close enough.
    """
    version = tensorrt_version()
    legacy = version is not None and is_legacy(version)
    precision: Precision = Manifest.load(graph).precision  # type: ignore[assignment]
    ways = ways_to("rank" if model.endswith("rank") else "retrieve", legacy, precision)
    with tempfile.TemporaryDirectory(prefix="mtgr.") as folder:
        graphs = {(PLAIN.last, precision): graph}

        def build(way: Way) -> Manifest:
            wanted = way.last, way.source(precision)
            if wanted not in graphs:
                other = Path(folder) / "-".join(wanted)
                export_artifact(checkpoint, model, other, wanted[1], seed, force, plan_opset(), way.last)
                graphs[wanted] = other
            return build_checked_plan(checkpoint, model, graphs[wanted], plan, seed, force, way, precision)

        manifest = build_first(ways, build)
    manifest.save(plan.parent)
    return manifest


def build_checked_plan(
    checkpoint: Checkpoint,
    model: str,
    graph: Path,
    plan: Path,
    seed: int = 0,
    force: bool = False,
    way: Way = PLAIN,
    precision: Precision | None = None,
) -> Manifest:
    """Build a plan of an exported graph in one way and compare it with the reference.

    Args:
        checkpoint: The reference.
        model: ``mtgr_onnx_rank`` or ``mtgr_onnx_retrieve``.
        graph: Directory of :func:`export_artifact`.
        plan: Where the plan goes; its manifest lies beside it.
        seed: Of the rows that it is compared on.
        force: Keep a plan in low precision also if it is not close enough.
        way: Which the graph was exported for.
        precision: Of the plan; None for the graph's own.

    Raises:
        ConfigurationError: If it cannot be built here, or is not close enough.
    """
    own: Precision = Manifest.load(graph).precision  # type: ignore[assignment]
    precision = precision or own
    options = way.options(BuildOptions(max_context=checkpoint.schema.max_context))
    manifest = build_tensorrt_engine(graph / "model.onnx", plan, precision, options)
    requests = sampled_requests(checkpoint, precision, seed).held_out
    engine = PlanEngine(plan, options.max_batch)
    try:
        graph_here = graph_of(checkpoint, model, precision, way.last)
        agreement = compare(graph_here, engine, checkpoint, SHAPES, seed, requests)
    finally:
        engine.close()
    problem = agreement.problem(precision)
    if problem is not None and (precision == "fp32" or not force):
        raise ConfigurationError(f"{manifest.model} in {precision} was not installed: {problem}.")
    details = dict(manifest.details)
    if problem is not None:
        details["forced"] = problem
    compared = 0 if agreement.spearman is None else len(requests)
    parity = agreement.to_dict() | {"shapes": [list(shape) for shape in SHAPES], "requests": compared}
    manifest = dataclasses.replace(manifest, parity=parity, details=details)
    manifest.save(plan.parent)
    return manifest


def export_tensorrt(
    checkpoint: Checkpoint,
    model_repository: Path,
    stack: ExitStack,
    precision: Precision = "fp16",
    force: bool = False,
    seed: int = 0,
) -> list[Manifest]:
    """Stage ``mtgr_tensorrt_rank`` and ``mtgr_tensorrt_retrieve``, or those of them that the network can do.

    Args:
        checkpoint: A trained model.
        model_repository: Where the models go.
        stack: Installs them when it closes without an error, together with whatever else it holds.
        precision: Of weights and activations; retrieval stays in fp32 where this is INT8.
        force: Install a low precision also if it is not close enough.
        seed: Of the rows that graphs and plans are checked on.

    Raises:
        ConfigurationError: If a plan cannot be built here, or is not close enough; what was installed stays.
    """
    manifests = []
    for kind in ("rank", "retrieve"):
        if kind == "retrieve" and kind not in operations(checkpoint.model):
            continue
        name, source = f"mtgr_tensorrt_{kind}", f"mtgr_onnx_{kind}"
        version = stack.enter_context(model_directory(name, model_repository, checkpoint))
        with tempfile.TemporaryDirectory(prefix="mtgr.") as folder:
            graph = Path(folder) / "graph"
            chosen = onnx_precision(source, precision)
            export_artifact(checkpoint, source, graph, chosen, seed, force, plan_opset())
            manifest = build_plan(checkpoint, source, graph, version / PLAN_FILE, seed, force)
        fit_config(version.parent / "config.pbtxt", manifest)
        others = _other_variants(model_repository / name, version.name, manifest, template_hash(name))
        add_variant(version, PLAN_FILE, manifest.details["gpu_variant"])
        keep_variants(version, PLAN_FILE, model_repository / name, others)
        details = dict(manifest.details) | {
            "template": template_hash(name),
            "variants": sorted({manifest.details["gpu_variant"], *others}),
            "opset": manifest.versions["opset"],  # not the project's own where TensorRT reads no newer one
        }
        versions = {package: version for package, version in manifest.versions.items() if package != "opset"}
        manifest = dataclasses.replace(manifest, details=details, versions=versions)
        manifest.save(version)
        manifests.append(manifest)
    return manifests


def _other_variants(installed: Path, version: str, manifest: Manifest, template: str) -> list[str]:
    """Kinds of GPU whose plans of the same model are installed: they stay."""
    try:
        before = Manifest.load(installed / version)
    except ConfigurationError:
        return []
    # One config serves all of them.
    same = (before.checkpoint, before.precision, before.details.get("template"), before.details.get("way"))
    if same != (manifest.checkpoint, manifest.precision, template, manifest.details["way"]):
        return []
    names = before.details.get("variants", [])
    plans = [name for name in names if (installed / version / f"{Path(PLAN_FILE).stem}.{name}.plan").is_file()]
    return [name for name in plans if name != manifest.details["gpu_variant"]]
