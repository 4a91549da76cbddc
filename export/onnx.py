"""Export the ``onnx`` strategy: one graph that ranks, one that retrieves, each checked against PyTorch.

Both graphs are plain tensor arithmetic on INT32 rows: no Range, no ConstantOfShape, no loop, no length input. Batch,
context, and candidate axes vary. In fp16 and bf16 the graphs are typed: weights and activations have the type, and no
tool converts them. In INT8 the ranking graph's weight products are integers; the retrieving one stays in fp32, since
nobody ranks again what it does not find. The reasons stand in README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.agreement import check_graph
from export.differences import COMPARED_REQUESTS, SHAPES
from export.install import model_directory, template_hash
from export.last_token import LastToken
from export.onnx_graphs import Graph, example_rows, graph_of, graphs_of
from export.precision import Agreement, Precision
from export.quantize import Inputs, quantize_for_cpu, quantize_for_tensorrt
from export.requests import RealRequests, real_requests
from export.rows import random_rows
from export.trace import OPSET, save_graph, shapes_of, versions
from mtgr.checkpoint import Checkpoint, operations
from mtgr.errors import ConfigurationError
from mtgr.files import replaced_directory
from mtgr.manifest import Manifest


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
    requests = sampled_requests(checkpoint, precision, seed)
    for graph in graphs_of(checkpoint, precision):
        version = stack.enter_context(model_directory(graph.name, model_repository, checkpoint))
        manifests.append(write_artifact(graph, checkpoint, version, requests, seed, force))
    return manifests


def export_artifact(
    checkpoint: Checkpoint,
    model: str,
    directory: Path,
    precision: Precision,
    seed: int = 0,
    force: bool = False,
    opset: int = OPSET,
    last: LastToken = "products",
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
        opset: 17 is the newest that TensorRT 8.6 reads.
        last: How retrieval computes its last token.

    Raises:
        ConfigurationError: If it is not close enough to PyTorch, or the network cannot do this; what was there stays.
    """
    graph = graph_of(checkpoint, model, precision, last)
    requests = sampled_requests(checkpoint, graph.precision, seed)
    with replaced_directory(directory) as staging:
        return write_artifact(graph, checkpoint, staging, requests, seed, force, calibrated=True, opset=opset)


def sampled_requests(checkpoint: Checkpoint, precision: Precision, seed: int) -> RealRequests:
    """Requests that an artifact is calibrated and compared on; none in fp32, where errors alone tell enough."""
    return RealRequests() if precision == "fp32" else real_requests(checkpoint, COMPARED_REQUESTS, seed)


def write_artifact(
    graph: Graph,
    checkpoint: Checkpoint,
    directory: Path,
    requests: RealRequests,
    seed: int,
    force: bool,
    calibrated: bool = False,
    opset: int = OPSET,
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
        opset: Of the graph.

    Raises:
        ConfigurationError: If it is not close enough.
    """
    path = directory / "model.onnx"
    save_graph(graph.module, path, example_rows(checkpoint, len(graph.inputs)), graph, opset)
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
    manifest = manifest_of(graph, checkpoint, path, agreement, details, compared)
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


def manifest_of(
    graph: Graph,
    checkpoint: Checkpoint,
    path: Path,
    agreement: Agreement,
    details: Mapping[str, Any],
    requests: int = 0,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
) -> Manifest:
    """Describe a graph.

    Args:
        graph: What was exported.
        checkpoint: Where from.
        path: The file.
        agreement: How it agrees with the reference.
        details: Whatever else is to be known.
        requests: Of real users, on which rankings were compared.
        shapes: Of random rows that it was compared on.
    """
    model = onnx.load(path, load_external_data=False)
    return Manifest(
        model=graph.name,
        checkpoint=checkpoint.hash,
        schema=checkpoint.schema.hash,
        precision=graph.precision,
        versions=versions(model.opset_import[0].version),
        shapes=shapes_of(model),
        parity=agreement.to_dict() | {"shapes": [list(shape) for shape in shapes], "requests": requests},
        details={
            "retrieve_count": checkpoint.model.retrieve_count,
            "operations": list(operations(checkpoint.model)),
            "nodes": len(model.graph.node),
            "template": template_hash(graph.name),
            **details,
        },
    )
