"""Export the ``onnx`` strategy: one graph that ranks, one that retrieves, each checked against PyTorch.

Both graphs are plain tensor arithmetic on INT32 rows: no Range, no ConstantOfShape, no loop, no length input. Batch,
context, and candidate axes vary. In fp16 and bf16 the graphs are typed: weights and activations have the type, and no
tool converts them. In INT8 the ranking graph's weight products are integers; the retrieving one stays in fp32, since
nobody ranks again what it does not find. The reasons stand in README.md beside this file.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim

from export.graphs import rank_graph, retrieve_graph
from export.install import model_directory, template_hash
from export.precision import TOLERANCE, Agreement, Precision, mean_spearman, rounded_fp32, typed
from export.quantize import Inputs, int8_in_pytorch, quantize_for_cpu, quantize_for_tensorrt
from export.requests import LabelledRequest, RealRequests, real_requests
from export.rows import random_rows
from mtgr.checkpoint import Checkpoint, operations
from mtgr.engines.onnx import OnnxEngine
from mtgr.errors import ConfigurationError
from mtgr.evaluation.metrics import auc
from mtgr.files import replaced_directory
from mtgr.manifest import Manifest
from mtgr.schema import FIRST_ID

__all__ = ["OPSET", "SHAPES", "TOLERANCE", "export_artifact", "export_fixed", "export_onnx"]

OPSET = 20
_REQUESTS = 64  # of real users, to compare rankings and AUC on

# Batch, context, and candidates of the shapes that every artifact is checked at.
SHAPES = ((1, 1, 1), (1, 7, 3), (2, 64, 16), (3, 130, 5), (4, 200, 64), (1, 512, 256))

Answer = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class _Graph:
    """What differs between the two graphs."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_shapes: tuple[dict[int, Any], ...] | None
    error: Callable[[Answer, Checkpoint, Tensor, Tensor], float]
    precision: Precision = "fp32"


def export_onnx(
    checkpoint: Checkpoint,
    model_repository: Path,
    stack: ExitStack,
    seed: int = 0,
    precision: Precision = "fp32",
    force: bool = False,
) -> list[Manifest]:
    """Export and check ``mtgr_onnx_rank`` and ``mtgr_onnx_retrieve``, or those of them that the network can do.

    Args:
        checkpoint: A trained model.
        model_repository: Where the models go.
        stack: Installs them when it closes without an error, together with whatever else it holds.
        seed: Of the rows that the graphs are checked on.
        precision: Of weights and activations; not bf16, which ONNX Runtime's CPU provider does not compute in.
        force: Install a graph in low precision also if it is not close enough.

    Raises:
        ConfigurationError: If a graph is not close enough to PyTorch; what was installed before stays.
    """
    manifests = []
    requests = RealRequests() if precision == "fp32" else real_requests(checkpoint, _REQUESTS, seed)
    for graph in _graphs(checkpoint, precision):
        version = stack.enter_context(model_directory(graph.name, model_repository, checkpoint))
        manifests.append(write_artifact(graph, checkpoint, version, requests, seed, force))
    return manifests


def export_artifact(
    checkpoint: Checkpoint, model: str, directory: Path, precision: Precision, seed: int = 0, force: bool = False
) -> Manifest:
    """Write a graph with its manifest into a directory of its own, for TensorRT and for servers elsewhere.

    INT8 graphs have pairs of quantise and dequantise operators with scales of real requests, as TensorRT wants them.

    Args:
        checkpoint: A trained model.
        model: ``mtgr_onnx_rank`` or ``mtgr_onnx_retrieve``.
        directory: Replaced as a whole.
        precision: Of weights and activations.
        seed: Of the rows that the graph is checked on.
        force: Write a graph in low precision also if it is not close enough.

    Raises:
        ConfigurationError: If it is not close enough to PyTorch, or the network cannot do this; what was there stays.
    """
    graph = graph_of(checkpoint, model, precision)
    requests = RealRequests() if graph.precision == "fp32" else real_requests(checkpoint, _REQUESTS, seed)
    with replaced_directory(directory) as staging:
        return write_artifact(graph, checkpoint, staging, requests, seed, force, calibrated=True)


def export_fixed(
    checkpoint: Checkpoint,
    model: str,
    path: Path,
    shape: tuple[int, int, int],
    precision: Precision = "fp32",
    opset: int = OPSET,
) -> None:
    """Write a graph of one shape only: no operator computes a shape, so that a CUDA graph holds all of it.

    Args:
        checkpoint: The model.
        model: ``mtgr_onnx_rank`` or ``mtgr_onnx_retrieve``.
        path: The file; its directory must exist.
        shape: Batch, context tokens, and candidates: a bucket.
        precision: fp32, fp16 or bf16.
        opset: 17 is the newest that TensorRT 8.6 reads.
    """
    graph = graph_of(checkpoint, model, precision)
    batch, context, candidates = shape
    generator = np.random.default_rng(0)
    rows = random_rows(checkpoint.schema, checkpoint.catalog, batch, context, candidates, generator)
    save_graph(graph.module, path, rows[: len(graph.inputs)], replace(graph, dynamic_shapes=None), opset)


def onnx_precision(model: str, precision: Precision) -> Precision:
    """What a model is exported in where ``precision`` is asked for: retrieval has no INT8."""
    return "fp32" if precision == "int8" and model == "mtgr_onnx_retrieve" else precision


def graph_of(checkpoint: Checkpoint, model: str, precision: Precision = "fp32") -> _Graph:
    """The graph that a model's name means.

    Raises:
        ConfigurationError: If the network cannot do what it does.
    """
    for graph in _graphs(checkpoint, precision):
        if graph.name == model:
            return graph
    raise ConfigurationError(f"this checkpoint's network has nothing to do for {model}; export the other model.")


def write_artifact(
    graph: _Graph,
    checkpoint: Checkpoint,
    directory: Path,
    requests: RealRequests,
    seed: int,
    force: bool,
    calibrated: bool = False,
) -> Manifest:
    """Write ``model.onnx`` and its manifest into a directory, checked.

    Args:
        graph: What to export.
        checkpoint: The reference.
        directory: Where the files go.
        requests: Of real users; without them INT8 is calibrated on random rows, and no ranking is compared.
        seed: Of the random rows.
        force: Accept a graph in low precision that is not close enough.
        calibrated: Whether INT8 scales are constants, for TensorRT, or found at run time, which is quickest on a CPU.

    Raises:
        ConfigurationError: If it is not close enough.
    """
    path = directory / "model.onnx"
    save_graph(graph.module, path, _example(checkpoint, len(graph.inputs)), graph)
    details: dict[str, Any] = {}
    if graph.precision == "int8":
        details["int8_products"] = (
            quantize_for_tensorrt(path, path, calibration_inputs(checkpoint, requests, seed))
            if calibrated
            else quantize_for_cpu(path, path)
        )
        details["int8_scales"] = "constant" if calibrated else "dynamic"
        if calibrated:
            details["calibration"] = f"{len(requests.calibration)} real requests" if requests.calibration else "random"
    agreement = check_graph(graph, path, checkpoint, SHAPES, seed, requests.held_out)
    problem = agreement.problem(graph.precision)
    if problem is not None:
        if graph.precision == "fp32" or not force:
            raise ConfigurationError(f"{graph.name} in {graph.precision} was not installed: {problem}.")
        details["forced"] = problem
    compared = 0 if agreement.spearman is None else len(requests.held_out)
    manifest = _manifest(graph, checkpoint, path, agreement, details, compared)
    manifest.save(directory)
    return manifest


def calibration_inputs(checkpoint: Checkpoint, requests: RealRequests, seed: int) -> Iterator[Inputs]:
    """Inputs whose activations give the scales: real requests where there are any, else random rows."""
    for request in requests.calibration:
        yield {"context": request.context, "candidates": request.candidates}
    if not requests.calibration:
        generator = np.random.default_rng(seed)
        for _ in range(8):
            length = min(256, checkpoint.schema.max_context)
            rows = random_rows(checkpoint.schema, checkpoint.catalog, 2, length, 64, generator)
            yield {"context": rows[0].numpy(), "candidates": rows[1].numpy()}


def check_graph(
    graph: _Graph,
    path: Path,
    checkpoint: Checkpoint,
    shapes: Sequence[tuple[int, int, int]],
    seed: int,
    requests: Sequence[LabelledRequest] = (),
) -> Agreement:
    """Compare an exported graph with the reference in fp32.

    Args:
        graph: What was exported.
        path: The file.
        checkpoint: The reference.
        shapes: Batch, context tokens, and candidates of random rows.
        seed: Of the rows.
        requests: Of real users, for rank correlation and AUC of a ranking graph.

    Raises:
        ConfigurationError: If ONNX Runtime cannot run it here.
    """
    engine = _engine(graph, path)
    native = _in_native_precision(graph)
    generator = np.random.default_rng(seed)
    error, native_error = 0.0, 0.0
    for batch, length, candidates in shapes:
        context = min(length, checkpoint.schema.max_context)
        rows = random_rows(checkpoint.schema, checkpoint.catalog, batch, context, candidates, generator)
        inputs = dict(zip(graph.inputs, (row.numpy() for row in rows), strict=False))
        error = _worse(error, graph.error(engine.infer(inputs, graph.outputs), checkpoint, *rows))
        if native is not None:
            native_error = max(native_error, graph.error(_in_pytorch(native, graph, rows), checkpoint, *rows))
    spearman, aucs = None, {}
    if requests and "candidates" in graph.inputs:
        spearman, aucs = _on_requests(engine, checkpoint, requests)
    return Agreement(error, None if native is None else native_error, spearman, aucs)


def _engine(graph: _Graph, path: Path) -> OnnxEngine:
    if graph.precision != "bf16":
        return OnnxEngine(path)
    with tempfile.TemporaryDirectory() as folder:
        rounded = Path(folder) / "model.onnx"
        rounded_fp32(path, rounded)
        return OnnxEngine(rounded)


def _in_native_precision(graph: _Graph) -> nn.Module | None:
    """What PyTorch computes in the graph's precision; None in fp32, where it is the reference itself."""
    if graph.precision == "fp32":
        return None
    return int8_in_pytorch(graph.module) if graph.precision == "int8" else graph.module


def _worse(first: float, second: float) -> float:
    """The larger error; unlike ``max``, one that is no number is kept."""
    return first if first >= second or np.isnan(first) else second


def _in_pytorch(module: nn.Module, graph: _Graph, rows: tuple[Tensor, ...]) -> Answer:
    with torch.inference_mode():
        answer = module(*rows[: len(graph.inputs)])
    outputs = answer if isinstance(answer, tuple) else (answer,)
    return {name: value.numpy() for name, value in zip(graph.outputs, outputs, strict=True)}


def _on_requests(
    engine: OnnxEngine, checkpoint: Checkpoint, requests: Sequence[LabelledRequest]
) -> tuple[float, dict[str, tuple[float, float]]]:
    found, expected = [], []
    for request in requests:
        inputs = {"context": request.context, "candidates": request.candidates}
        found.append(engine.infer(inputs, ["task_scores"])["task_scores"][0])
        with torch.inference_mode():
            rows = torch.from_numpy(request.context), torch.from_numpy(request.candidates)
            expected.append(checkpoint.model(*rows).numpy()[0])
    labels = np.concatenate([request.labels for request in requests])
    before, after = np.concatenate(expected), np.concatenate(found)
    aucs = {
        name: (auc(labels[:, task], before[:, task]), auc(labels[:, task], after[:, task]))
        for task, name in enumerate(checkpoint.schema.task_names)
        if 0 < labels[:, task].mean() < 1
    }
    return mean_spearman(found, expected), aucs


def save_graph(module: nn.Module, path: Path, example: tuple[Tensor, ...], graph: _Graph, opset: int = OPSET) -> None:
    """Trace ``module`` on ``example`` rows and write an ONNX file."""
    trace(module, example, graph.inputs, graph.outputs, graph.dynamic_shapes, opset).save(path)
    onnx.checker.check_model(str(path))


def trace(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: tuple[dict[int, Any], ...] | None,
    opset: int = OPSET,
    optimize: bool = True,
) -> torch.onnx.ONNXProgram:
    """The graph of ``module``, recorded on ``example`` rows; ``optimize`` needs weights that are there."""
    # The exporter speaks of its own deprecated calls and of packages it can do without: nothing a user could act on.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic_shapes,
            verbose=False,
            optimize=optimize,
        )
    assert program is not None
    return program


def rank_axes() -> tuple[dict[int, Any], ...]:
    """Axes that vary of a ranking graph's inputs."""
    batch, context, candidates = Dim("batch", max=4096), Dim("context", max=4096), Dim("candidates", max=16_384)
    return {0: batch, 1: context}, {0: batch, 1: candidates}


def _graphs(checkpoint: Checkpoint, precision: Precision = "fp32") -> tuple[_Graph, ...]:
    axes = rank_axes()
    rank = _Graph(
        "mtgr_onnx_rank",
        typed(rank_graph(checkpoint.model), precision),
        ("context", "candidates"),
        ("task_scores",),
        axes,
        rank_error,
        precision,
    )
    if "retrieve" not in operations(checkpoint.model):
        return (rank,)
    retrieve_precision = onnx_precision("mtgr_onnx_retrieve", precision)
    retrieve = _Graph(
        "mtgr_onnx_retrieve",
        typed(retrieve_graph(checkpoint.model), retrieve_precision),
        ("context",),
        ("items", "scores"),
        axes[:1],
        retrieve_error,
        retrieve_precision,
    )
    return rank, retrieve


def _example(checkpoint: Checkpoint, count: int) -> tuple[Tensor, ...]:
    """Rows to trace with; no dimension is 1, which the tracer would take for a constant."""
    length = min(40, checkpoint.schema.max_context)
    return random_rows(checkpoint.schema, checkpoint.catalog, 2, length, 12, np.random.default_rng(0))[:count]


def rank_error(answer: Answer, checkpoint: Checkpoint, context: Tensor, candidates: Tensor) -> float:
    """Largest difference of task scores."""
    with torch.inference_mode():
        expected = checkpoint.model(context, candidates).numpy()
    return _difference(answer["task_scores"], expected)


def retrieve_error(answer: Answer, checkpoint: Checkpoint, context: Tensor, candidates: Tensor) -> float:
    """Largest difference of cosine similarities: of the item at each place, and of the score beside it.

    Items of almost equal score may change places; the similarity of what stands at a place may not differ.
    """
    with torch.inference_mode():
        logits = checkpoint.model.next_item_logits(context).numpy()
        expected = checkpoint.model.retrieve(context)[1].numpy()
    items = answer["items"].astype(np.int64) - FIRST_ID
    distinct = all(len(np.unique(row)) == len(row) for row in items)
    if items.shape != expected.shape or not distinct or items.min() < 0 or items.max() >= logits.shape[1]:
        return float("inf")
    found = np.take_along_axis(logits, items, axis=1)
    return checkpoint.config.temperature * max(_difference(found, expected), _difference(answer["scores"], expected))


def _difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max(initial=0.0)) if np.isfinite(found).all() else float("inf")


def _manifest(
    graph: _Graph, checkpoint: Checkpoint, path: Path, agreement: Agreement, details: Mapping[str, Any], requests: int
) -> Manifest:
    model = onnx.load(path, load_external_data=False)
    shapes = {
        value.name: [
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
            *(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim),
        ]
        for value in (*model.graph.input, *model.graph.output)
    }
    return Manifest(
        model=graph.name,
        checkpoint=checkpoint.hash,
        schema=checkpoint.schema.hash,
        precision=graph.precision,
        versions={
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "opset": str(OPSET),
        },
        shapes=shapes,
        parity=agreement.to_dict() | {"shapes": [list(shape) for shape in SHAPES], "requests": requests},
        details={
            "retrieve_count": checkpoint.model.retrieve_count,
            "operations": list(operations(checkpoint.model)),
            "nodes": len(model.graph.node),
            "template": template_hash(graph.name),
            **details,
        },
    )
