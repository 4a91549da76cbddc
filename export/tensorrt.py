"""Build a TensorRT plan from an exported graph: TensorRT 10 and 11, and 8.6 through ``export.tensorrt_compat``.

Networks are strongly typed: precision lives in the ONNX graph, and the builder neither lowers nor raises it. A plan is
made for the GPU and the TensorRT that build it; build where it serves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

from export import tensorrt_compat as compat
from export.tensorrt_device import Gpu, first_gpu
from export.tensorrt_profiles import MAX_BATCH, Profile, bucket_profiles
from mtgr.errors import ConfigurationError
from mtgr.files import write_json
from mtgr.manifest import MANIFEST_FILE, Manifest
from mtgr.routing.buckets import CONTEXT_BUCKETS

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Hardware = Literal["ampere_plus", "same_compute_capability"]

PLAN_FILE = "model.plan"
SUPPORTED = (10, 11)
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|insufficient memory|cannot allocate|bad_alloc", re.IGNORECASE)
_OPERATOR = re.compile(
    r"(?:No importer registered for op|Unsupported (?:operator|ONNX op)\w*):?\s*(\w+)", re.IGNORECASE
)
_BAR_EVERY_S = 2.0


@dataclass(frozen=True)
class BuildOptions:
    """How a plan is built.

    Attributes:
        max_context: Tokens of the longest context.
        max_batch: The config's ``max_batch_size``.
        workspace_gib: GPU memory that the builder's layers may use, in GiB.
        optimization_level: 0 (quick to build) to 5 (quick to run).
        hardware: GPUs other than this one that the plan shall run on; None for this one only.
        version_compatible: Whether later TensorRT versions may load the plan; costs some speed.
        tf32: Whether fp32 products may round to TF32; off, as parity asks for.
        blas: Whether 8.6 may use cuBLAS and cuDNN.
        timing_cache: File that keeps the timings of kernels from build to build; None for no such file.
    """

    max_context: int = CONTEXT_BUCKETS[-1]
    max_batch: int = MAX_BATCH
    workspace_gib: float = 8.0
    optimization_level: int = 3
    hardware: Hardware | None = None
    version_compatible: bool = False
    tf32: bool = False
    blas: bool = True
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.optimization_level <= 5:
            raise ConfigurationError(f"optimization_level is {self.optimization_level}; it must be 0 to 5.")
        if self.workspace_gib <= 0:
            raise ConfigurationError(f"workspace_gib is {self.workspace_gib}; it must be positive.")
        if self.hardware is not None and self.hardware not in get_args(Hardware):
            raise ConfigurationError(f"hardware is {self.hardware}; it must be one of {', '.join(get_args(Hardware))}.")


def tensorrt_problem() -> str | None:
    """Why this host cannot build plans, a sentence; None if it can."""
    try:
        _load_tensorrt()
        _gpu()
    except ConfigurationError as error:
        return str(error)
    return None


def build_tensorrt_engine(
    onnx_path: str | Path,
    engine_path: str | Path,
    precision: Precision = "fp16",
    options: BuildOptions | None = None,
) -> Manifest:
    """Build a plan from a graph and write it with its manifest and the builder's log.

    The plan appears whole or not at all; the manifest beside it names the plan's hash (:func:`check_plan`). The log
    (``<plan>.log``) is kept of builds that fail, too.

    Args:
        onnx_path: A rank or retrieve graph; external data beside it.
        engine_path: Where the plan goes, usually ``<model>/1/model.plan``.
        precision: What the graph is typed in.
        options: How to build.

    Returns:
        The manifest, without parity: nobody has compared the plan yet.

    Raises:
        ConfigurationError: If there is no GPU, no usable TensorRT or no memory, or the graph is not one that TensorRT
            can build in this precision.
    """
    source, target, options = Path(onnx_path), Path(engine_path), options or BuildOptions()
    if precision not in get_args(Precision):
        raise ConfigurationError(f"precision is {precision}; it must be one of {', '.join(get_args(Precision))}.")
    if not source.is_file():
        raise ConfigurationError(f"there is no graph at {source}; run `make export`.")
    trt, version = _load_tensorrt()
    if compat.is_legacy(version) and precision == "bf16":
        raise ConfigurationError(f"TensorRT {trt.__version__} has no bf16; build fp16 or install TensorRT 10 or 11.")
    gpu = _gpu()
    target.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with target.with_suffix(".log").open("w", encoding="utf-8") as log:
        built = _Build(trt, version, options, log).run(source, precision)
    _write(target, built.plan)
    manifest = _manifest(source, built, precision, options, gpu, trt.__version__, time.perf_counter() - start)
    write_json(manifest_path(target), dataclasses.asdict(manifest))
    return manifest


def manifest_path(plan: Path) -> Path:
    """Where the manifest of a plan lies: that of ``model.plan`` is the model's own."""
    return plan.with_name(MANIFEST_FILE if plan.name == PLAN_FILE else f"{plan.stem}.{MANIFEST_FILE}")


def check_plan(plan: Path, manifest: Manifest) -> None:
    """See to it that a plan is the one that its manifest describes.

    Raises:
        ConfigurationError: If it is missing or another one.
    """
    if not plan.is_file() or _sha256(plan) != manifest.details.get("plan_sha256"):
        raise ConfigurationError(f"{plan} is not the plan that its manifest describes; export it again.")


@dataclass(frozen=True)
class _Built:
    plan: Any  # a buffer of the plan's bytes
    profiles: tuple[Profile, ...]
    shapes: dict[str, list[Any]]
    layers: int


class _Build:
    """One build: parse, set up, and let the builder work, with everything it says in a log.

    Args:
        trt: The module ``tensorrt``.
        version: Its major and minor version.
        options: How to build.
        log: Where its messages go.
    """

    def __init__(self, trt: Any, version: tuple[int, int], options: BuildOptions, log: TextIO) -> None:
        self._trt = trt
        self._legacy = compat.is_legacy(version)
        self._options = options
        self._errors: list[str] = []
        self._logger = _logger(trt, log, self._errors)

    def run(self, source: Path, precision: Precision) -> _Built:
        """Build the graph at ``source``.

        Raises:
            ConfigurationError: If that is not possible; one sentence.
        """
        trt, options = self._trt, self._options
        try:
            builder = trt.Builder(self._logger)
            network = self._network(builder)
            parser = trt.OnnxParser(network, self._logger)
            if not parser.parse_from_file(str(source)):
                raise ConfigurationError(_parse_problem(source, parser))
            found = graph_precision(trt, network)
            if found != precision:
                raise ConfigurationError(
                    f"{source} is a graph in {found}, not in {precision}; export it with `--precision {precision}`."
                )
            profiles = bucket_profiles(_inputs(network), options.max_context, options.max_batch)
            config = self._config(builder, network, profiles, precision)
            plan = builder.build_serialized_network(network, config)
        except (
            MemoryError,
            RuntimeError,
            TypeError,
        ) as error:  # bindings raise TypeError where a factory gives nothing
            raise ConfigurationError(self._problem(source, str(error))) from error
        if plan is None:
            raise ConfigurationError(self._problem(source, "the builder gave no reason"))
        self._keep_timings(config)
        return _Built(plan, profiles, _shapes(trt, network), network.num_layers)

    def _network(self, builder: Any) -> Any:
        if self._legacy:
            return compat.legacy_network(self._trt, builder)
        return builder.create_network(1 << int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def _config(self, builder: Any, network: Any, profiles: tuple[Profile, ...], precision: Precision) -> Any:
        trt, options = self._trt, self._options
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gib * 2**30))
        config.builder_optimization_level = options.optimization_level
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if options.tf32:
            config.set_flag(trt.BuilderFlag.TF32)
        else:
            config.clear_flag(trt.BuilderFlag.TF32)
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware == "ampere_plus":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        elif options.hardware == "same_compute_capability":
            if self._legacy:
                raise ConfigurationError("TensorRT 8.6 knows no same_compute_capability; use ampere_plus or none.")
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
        if self._legacy:
            compat.allow_precision(trt, config, network, precision)
            if not options.blas:
                compat.without_blas(trt, config)
        else:
            config.progress_monitor = _progress(trt)
        for entry in profiles:
            profile = builder.create_optimization_profile()
            for name, (smallest, tuned, largest) in entry.shapes.items():
                profile.set_shape(name, smallest, tuned, largest)
            config.add_optimization_profile(profile)
        if options.timing_cache is not None:
            known = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
            if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
                # Of another GPU or version: begin anew.
                config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        return config

    def _keep_timings(self, config: Any) -> None:
        if self._options.timing_cache is not None:
            self._options.timing_cache.parent.mkdir(parents=True, exist_ok=True)
            _write(self._options.timing_cache, config.get_timing_cache().serialize())

    def _problem(self, source: Path, reason: str) -> str:
        said = [*self._errors, reason]
        if any(_OUT_OF_MEMORY.search(line) for line in said):
            return (
                f"memory ran out while TensorRT built {source}; free the GPU, or build for a smaller max_batch "
                f"(it is {self._options.max_batch}) or max_context ({self._options.max_context})."
            )
        return f"TensorRT cannot build {source}: {_one_line(said[0])}; its log has the rest."


def graph_precision(trt: Any, network: Any) -> Precision:
    """What a parsed network is typed in: its quantizers, else its low-precision tensors, tell."""
    kinds = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.QUANTIZE:
            return "int8"
        kinds.update(layer.get_output(place).dtype for place in range(layer.num_outputs))
    if trt.DataType.HALF in kinds:
        return "fp16"
    return "bf16" if getattr(trt.DataType, "BF16", None) in kinds else "fp32"


def _load_tensorrt() -> tuple[Any, tuple[int, int]]:
    """The module and its (major, minor) version."""
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:  # also where the bindings are there and the libraries are not
        raise ConfigurationError(
            f"TensorRT cannot be imported ({_one_line(str(error))}); install tensorrt 10 or 11 from NVIDIA's index, "
            "or export inside NVIDIA's Triton image."
        ) from error
    numbers = re.match(r"(\d+)\.(\d+)", getattr(trt, "__version__", ""))
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if version[0] not in SUPPORTED and not compat.is_legacy(version):
        raise ConfigurationError(
            f"TensorRT {getattr(trt, '__version__', 'of no version')} is installed; plans are built with 10, 11 or 8.6."
        )
    return trt, version


def _gpu() -> Gpu:
    gpu = first_gpu()
    if gpu is None:
        raise ConfigurationError(
            "there is no NVIDIA GPU on this host; build plans on the kind of GPU that serves them."
        )
    return gpu


def _inputs(network: Any) -> dict[str, tuple[int, ...]]:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    return {tensor.name: tuple(tensor.shape) for tensor in tensors}


def _shapes(trt: Any, network: Any) -> dict[str, list[Any]]:
    names = {trt.DataType.INT32: "int32", trt.DataType.FLOAT: "float", trt.DataType.HALF: "float16"}
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    tensors += [network.get_output(index) for index in range(network.num_outputs)]
    return {tensor.name: [names.get(tensor.dtype, str(tensor.dtype)), *tensor.shape] for tensor in tensors}


def _parse_problem(source: Path, parser: Any) -> str:
    errors = [parser.get_error(index).desc() for index in range(parser.num_errors)] or ["the parser gave no reason"]
    for text in errors:
        operator = _OPERATOR.search(text)
        if operator:
            return f"TensorRT has no operator {operator[1]}, which {source} uses; export the graph for TensorRT anew."
    return f"TensorRT cannot parse {source}: {_one_line(errors[0])}; export the graph for TensorRT anew."


def _logger(trt: Any, log: TextIO, errors: list[str]) -> Any:
    """A logger that writes everything to ``log`` and keeps errors.

    The class is made here, as its base exists only where TensorRT does.
    """

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            name = getattr(severity, "name", str(severity))
            log.write(f"{time.strftime('%H:%M:%S')} {name}: {msg}\n")
            if name in ("ERROR", "INTERNAL_ERROR"):
                log.flush()
                errors.append(msg)

    return Log()


def _progress(trt: Any, stream: TextIO | None = None) -> Any:
    """A monitor that prints the outermost phase's steps, every few seconds; Ctrl-C ends the build at a step."""

    class Progress(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._outer: dict[str, int] = {}
            self._next = time.monotonic() + _BAR_EVERY_S
            self._stopped = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._outer[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name in self._outer and time.monotonic() >= self._next:
                    self._next = time.monotonic() + _BAR_EVERY_S
                    print(f"  TensorRT: {phase_name}, {step} of {self._outer[phase_name]}", file=stream or sys.stderr)
            except KeyboardInterrupt:
                self._stopped = True
            return not self._stopped

        def phase_finish(self, phase_name: str) -> None:
            self._outer.pop(phase_name, None)

    return Progress()


def _manifest(
    source: Path, built: _Built, precision: Precision, options: BuildOptions, gpu: Gpu, version: str, seconds: float
) -> Manifest:
    origin = _origin(source)
    digest = hashlib.sha256(built.plan)
    return Manifest(
        model=origin.model.replace("_onnx_", "_tensorrt_") if origin else source.stem,
        checkpoint=origin.checkpoint if origin else "",
        schema=origin.schema if origin else "",
        precision=precision,
        versions={**(origin.versions if origin else {}), "tensorrt": version},
        shapes=built.shapes,
        parity={"max_abs_error": None},
        details={
            **(origin.details if origin else {}),
            "gpu": gpu.name,
            "gpu_variant": gpu.variant,
            "plan_sha256": digest.hexdigest(),
            "plan_bytes": memoryview(built.plan).nbytes,
            "layers": built.layers,
            "profiles": [_as_lists(entry.shapes) for entry in built.profiles],
            "options": {
                entry.name: getattr(options, entry.name)
                for entry in dataclasses.fields(options)
                if entry.name != "timing_cache"
            },
            "seconds": round(seconds, 1),
        },
    )


def _origin(source: Path) -> Manifest | None:
    """The graph's own manifest, which tells the checkpoint; None for a graph from elsewhere."""
    try:
        return Manifest.load(source.parent)
    except (ConfigurationError, FileNotFoundError):
        return None


def _as_lists(shapes: Mapping[str, tuple[tuple[int, ...], ...]]) -> dict[str, list[list[int]]]:
    return {name: [list(shape) for shape in triple] for name, triple in shapes.items()}


def _write(path: Path, data: Any) -> None:
    """Write bytes in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".;")[:300]
