"""The engines that can be exported, by strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from export.baseline import export_baseline
from export.compiled import compiled_problem
from export.onnx import export_onnx
from export.onnx_graphs import onnx_precision
from export.plans import export_tensorrt
from export.precision import Precision
from export.tensorrt_host import gpu_variant, installed_tensorrt, tensorrt_problem
from export.trace import OPSET
from export.vllm import export_vllm, is_checked, vllm_problem, vllm_settings
from mtgr.checkpoint import Checkpoint, operations
from mtgr.compat.base import ForeignModel
from mtgr.engines.compiled_network import CompiledPrecision
from mtgr.manifest import Manifest
from mtgr.routing.strategies import STRATEGIES
from mtgr.vllm_plugin import versions as vllm_versions


@dataclass(frozen=True)
class Job:
    """What an export starts from.

    Attributes:
        checkpoint: The checkpoint, loaded.
        directory: Where it lies.
        model_repository: Where models go.
        vllm: Engine arguments other than the defaults.
        check_vllm: Whether vLLM is started once to check what it answers.
        precision: Of the onnx strategy's graphs.
        force: Whether a low precision is installed also if it is not close enough to fp32.
        compiled: Precision in which ``mtgr_baseline`` runs the compiled engine; None for the eager one.
        plan_precision: Of the tensorrt strategy's plans.
    """

    checkpoint: Checkpoint
    directory: Path
    model_repository: Path
    vllm: Mapping[str, Any] = field(default_factory=dict)
    check_vllm: bool = True
    precision: Precision = "fp32"
    force: bool = False
    compiled: CompiledPrecision | None = None
    plan_precision: Precision = "fp16"


@dataclass(frozen=True)
class Exporter:
    """How one strategy is exported.

    Attributes:
        strategy: Its name.
        stage: Makes and checks its models; they are installed when the stack closes.
        problem: Why this machine cannot export this checkpoint, a sentence; None if it can.
        is_current: Whether a model of this checkpoint, template and versions is also what the job asks for.
        is_optional: Whether an export that asks for no strategy by name goes on without it where it fails.
    """

    strategy: str
    stage: Callable[[Job, ExitStack], list[Manifest]]
    problem: Callable[[Job], str | None] = lambda job: None
    is_current: Callable[[Job, Manifest], bool] = lambda job, manifest: True
    is_optional: bool = False

    @property
    def models(self) -> tuple[str, ...]:
        """Its Triton models."""
        return STRATEGIES[self.strategy].models

    def models_of(self, job: Job) -> tuple[str, ...]:
        """Those of them that the checkpoint's network has something to do for."""
        if "retrieve" in operations(job.checkpoint.model):
            return self.models
        return (STRATEGIES[self.strategy].rank_model,)


def _is_current_vllm(job: Job, manifest: Manifest) -> bool:
    settings = vllm_settings(job.checkpoint, job.vllm).to_dict()
    return manifest.details.get("settings") == settings and (is_checked(manifest) or not job.check_vllm)


def _is_current_baseline(job: Job, manifest: Manifest) -> bool:
    is_compiled = manifest.details.get("engine") == "compiled"
    return is_compiled == (job.compiled is not None) and manifest.precision == (job.compiled or "fp32")


def _is_current_onnx(job: Job, manifest: Manifest) -> bool:
    return manifest.precision == onnx_precision(manifest.model, job.precision)


def _baseline_problem(job: Job) -> str | None:
    return None if job.compiled is None else compiled_problem(job.checkpoint, job.compiled)


def _onnx_problem(job: Job) -> str | None:
    if job.precision == "fp32":
        return None
    if isinstance(job.checkpoint.model, ForeignModel):
        return f"onnx: {job.checkpoint.model.config.network} networks are exported in fp32 only; leave out --precision."
    if job.precision == "bf16":
        return "onnx: ONNX Runtime's CPU provider does not compute in bf16; choose fp16, int8 or fp32."
    return None


def _is_current_tensorrt(job: Job, manifest: Manifest) -> bool:
    precision = onnx_precision(manifest.model.replace("tensorrt", "onnx"), job.plan_precision)
    return (manifest.precision, manifest.details.get("gpu_variant")) == (precision, gpu_variant())


def _tensorrt_problem(job: Job) -> str | None:
    if isinstance(job.checkpoint.model, ForeignModel) and job.plan_precision != "fp32":
        return f"tensorrt: {job.checkpoint.model.config.network} networks are exported in fp32; add --precision fp32."
    problem = tensorrt_problem()
    return None if problem is None else f"tensorrt: {problem}"


def _vllm_problem(job: Job) -> str | None:
    if isinstance(job.checkpoint.model, ForeignModel):
        return f"vllm: the plugin has no {job.checkpoint.model.config.network} network; export other engines."
    return vllm_problem(job.checkpoint, job.vllm)


EXPORTERS: dict[str, Exporter] = {
    exporter.strategy: exporter
    for exporter in (
        Exporter(
            "baseline",
            lambda job, stack: [
                export_baseline(
                    job.checkpoint, job.directory, *_into(job, stack), compiled=job.compiled, force=job.force
                )
            ],
            _baseline_problem,
            _is_current_baseline,
        ),
        Exporter(
            "onnx",
            lambda job, stack: export_onnx(
                job.checkpoint, *_into(job, stack), precision=job.precision, force=job.force
            ),
            _onnx_problem,
            _is_current_onnx,
        ),
        Exporter(
            "tensorrt",
            lambda job, stack: export_tensorrt(job.checkpoint, *_into(job, stack), job.plan_precision, job.force),
            _tensorrt_problem,
            _is_current_tensorrt,
            is_optional=True,
        ),
        Exporter(
            "vllm",
            lambda job, stack: [export_vllm(job.checkpoint, *_into(job, stack), job.vllm, job.check_vllm)],
            _vllm_problem,
            _is_current_vllm,
        ),
    )
}


def installed_version(name: str) -> str | None:
    """Version of a package as manifests record it; the opset is a package's version for this purpose."""
    if name == "opset":
        return str(OPSET)
    if name == "vllm":
        return vllm_versions.installed_version()
    if name == "tensorrt":  # its distribution has other names inside NVIDIA's image
        return installed_tensorrt()
    if name == "torch":  # its distribution leaves out what follows the plus sign
        import torch

        return torch.__version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _into(job: Job, stack: ExitStack) -> tuple[Path, ExitStack]:
    return job.model_repository, stack
