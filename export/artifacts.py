"""Graphs and plans in every precision, beside the model repository: for TensorRT and for servers elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from export.engines import EXPORTERS, Job
from export.onnx import export_artifact
from export.onnx_graphs import onnx_precision
from export.plans import build_plan, plan_opset
from export.precision import PRECISIONS, Precision
from export.report import Exported, parity
from export.tensorrt_files import PLAN_FILE
from export.tensorrt_host import tensorrt_problem
from mtgr.compat.base import ForeignModel
from mtgr.errors import ConfigurationError
from mtgr.files import replaced_directory


def export_artifacts(job: Job, directory: Path, precisions: Sequence[Precision] = PRECISIONS) -> Iterator[Exported]:
    """Write ``<directory>/<precision>/<model>/`` for each precision, and a plan of each where TensorRT is installed.

    What cannot be written, or is not close enough to the reference, costs one line and no more.

    Args:
        job: The checkpoint, and whether low precision is forced.
        directory: Where artifacts go.
        precisions: Which of them.

    Yields:
        A line of the table each.
    """
    for precision in precisions:
        for model in EXPORTERS["onnx"].models_of(job):
            if onnx_precision(model, precision) != precision:
                continue  # the same graph in fp32 is there
            folder = directory / precision / model
            if precision != "fp32" and isinstance(job.checkpoint.model, ForeignModel):
                yield Exported("artifact", f"skipped ({model} in {precision}: only MTGR networks have it)")
                continue
            start = time.perf_counter()
            try:
                manifest = export_artifact(
                    job.checkpoint, model, folder, precision, force=job.force, opset=plan_opset()
                )
            except ConfigurationError as error:
                yield Exported("artifact", f"refused ({error})", seconds=time.perf_counter() - start)
                continue
            words = "; ".join(filter(None, ("written", parity(manifest))))
            yield Exported("artifact", words, manifest, time.perf_counter() - start, folder)
            yield _plan(job, model, folder, directory / precision / model.replace("onnx", "tensorrt"))


def _plan(job: Job, model: str, graph: Path, folder: Path) -> Exported:
    """Build and compare a plan of a graph, if TensorRT and a GPU are there."""
    problem = tensorrt_problem()
    if problem is not None:
        return Exported("tensorrt", f"skipped ({folder.name} in {graph.parent.name}: {problem})")
    start = time.perf_counter()
    try:
        with replaced_directory(folder) as staging:
            manifest = build_plan(job.checkpoint, model, graph, staging / PLAN_FILE, force=job.force)
    except ConfigurationError as error:
        return Exported("tensorrt", f"failed ({error})", seconds=time.perf_counter() - start)
    words = "; ".join(filter(None, ("written", parity(manifest))))
    return Exported("tensorrt", words, manifest, time.perf_counter() - start, folder)
