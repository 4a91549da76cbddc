"""Check the ``compiled`` engine against PyTorch before ``mtgr_baseline`` serves with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from export.differences import COMPARED_REQUESTS, SHAPES, compare_requests, rank_error, retrieve_error
from export.fp8 import fp8_in_pytorch
from export.precision import Agreement, typed
from export.requests import LabelledRequest, real_requests
from export.rows import random_rows
from mtgr.checkpoint import Checkpoint
from mtgr.engines.compiled import CompiledEngine, require_gpu
from mtgr.engines.compiled_network import CompiledPrecision
from mtgr.errors import ConfigurationError
from mtgr.model import MTGR

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compiled_problem(checkpoint: Checkpoint, precision: CompiledPrecision) -> str | None:
    """Why the compiled engine cannot serve this checkpoint here, a sentence; None if it can."""
    if not isinstance(checkpoint.model, MTGR):
        return "baseline: the compiled engine runs MTGR alone; leave out --compiled."
    try:
        require_gpu(precision, DEVICE)
    except ConfigurationError as error:
        return f"baseline: {error}"
    return None


def check_compiled(
    checkpoint: Checkpoint, directory: Path, precision: CompiledPrecision, seed: int = 0
) -> tuple[Agreement, dict[str, Any]]:
    """Compare the engine with the reference in FP32 on the CPU, at random rows and at requests of real users.

    Args:
        checkpoint: The reference.
        directory: Where it lies.
        precision: Of the engine.
        seed: Of the rows.

    Returns:
        How they agree, and what they were compared on.
    """
    engine = CompiledEngine(directory, DEVICE, precision)
    native = _in_native_precision(checkpoint, precision)
    generator = np.random.default_rng(seed)
    errors, native_errors = [0.0], [0.0]
    for batch, length, count in SHAPES:
        context = min(length, checkpoint.schema.max_context)
        rows = random_rows(checkpoint.schema, checkpoint.catalog, batch, context, count, generator)
        inputs = {"context": rows[0].numpy(), "candidates": rows[1].numpy()}
        errors.append(rank_error(engine.infer(inputs), checkpoint, *rows))
        errors.append(retrieve_error(engine.infer({"context": inputs["context"]}), checkpoint, *rows))
        if native is not None:
            with torch.inference_mode():
                scores = native(*rows).numpy()
                items, logits = (part.numpy() for part in native.retrieve(rows[0]))
            native_errors.append(rank_error({"task_scores": scores}, checkpoint, *rows))
            native_errors.append(retrieve_error({"items": items, "scores": logits}, checkpoint, *rows))
    requests = real_requests(checkpoint, COMPARED_REQUESTS, seed).held_out

    def rank(request: LabelledRequest) -> npt.NDArray[Any]:
        inputs = {"context": request.context, "candidates": request.candidates}
        scores: npt.NDArray[Any] = engine.infer(inputs)["task_scores"][0]
        return scores

    spearman, aucs = compare_requests(rank, checkpoint, requests) if requests else (None, {})
    agreement = Agreement(float(np.max(errors)), None if native is None else max(native_errors), spearman, aucs)
    return agreement, {"shapes": [list(shape) for shape in SHAPES], "requests": len(requests)}


def _in_native_precision(checkpoint: Checkpoint, precision: CompiledPrecision) -> MTGR | None:
    """What PyTorch computes in the engine's precision; None in FP32, where it is the reference itself."""
    assert isinstance(checkpoint.model, MTGR)
    if precision == "fp32":
        return None
    if precision == "fp8":
        return typed(fp8_in_pytorch(checkpoint.model, spares_last=True), "fp16")
    return typed(checkpoint.model, precision)
