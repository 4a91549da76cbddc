"""Build a TensorRT plan from an exported graph: TensorRT 10 and 11, and 8.6 through ``export.tensorrt_compat``.

Networks are strongly typed: precision lives in the ONNX graph, and the builder neither lowers nor raises it. A plan is
made for the GPU and the TensorRT that build it; build where it serves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, get_args

from export import tensorrt_compat as compat
from export.tensorrt_device import Gpu
from export.tensorrt_files import manifest_path, origin_of, write_bytes
from export.tensorrt_host import load_tensorrt, this_gpu
from export.tensorrt_log import file_logger, one_line, progress_monitor
from export.tensorrt_options import BuildOptions, Precision
from export.tensorrt_profiles import Profile, bucket_profiles
from mtgr.errors import ConfigurationError
from mtgr.files import write_json
from mtgr.manifest import Manifest

_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|insufficient memory|cannot allocate|bad_alloc", re.IGNORECASE)
_OPERATOR = re.compile(
    r"(?:No importer registered for op|Unsupported (?:operator|ONNX op)\w*):?\s*(\w+)", re.IGNORECASE
)


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
    trt, version = load_tensorrt()
    if compat.is_legacy(version) and precision == "bf16":
        raise ConfigurationError(f"TensorRT {trt.__version__} has no bf16; build fp16 or install TensorRT 10 or 11.")
    gpu = this_gpu()
    target.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with target.with_suffix(".log").open("w", encoding="utf-8") as log:
        built = _Build(trt, version, options, log).run(source, precision)
    write_bytes(target, built.plan)
    manifest = _manifest(source, built, precision, options, gpu, trt.__version__, time.perf_counter() - start)
    write_json(manifest_path(target), dataclasses.asdict(manifest))
    return manifest


@dataclass(frozen=True)
class _Built:
    plan: Any  # a buffer of the plan's bytes
    profiles: tuple[Profile, ...]
    shapes: dict[str, list[Any]]
    layers: int
    constraints: str  # whether 8.6 kept parts in fp32 that the graph says are: obeyed, preferred, dropped; or none


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
        self._logger = file_logger(trt, log, self._errors)

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
            # 8.6 calls an fp16 graph fp32, and may build an fp16 plan of either.
            if found != precision and not (self._legacy and (found, precision) == ("fp32", "fp16")):
                raise ConfigurationError(
                    f"{source} is a graph in {found}, not in {precision}; export it with `--precision {precision}`."
                )
            profiles = bucket_profiles(_inputs(network), options.max_context, options.max_batch, options.split)
            config = self._config(builder, profiles)
            constraints = "none"
            if self._legacy:
                constraints = compat.allow_precision(trt, config, network, precision, options.free)
            plan = builder.build_serialized_network(network, config)
            for loosened in compat.relaxations(trt, config, network) if self._legacy and plan is None else ():
                constraints, plan = loosened, builder.build_serialized_network(network, config)
                if plan is not None:
                    break
        except (
            MemoryError,
            RuntimeError,
            TypeError,
        ) as error:  # bindings raise TypeError where a factory gives nothing
            raise ConfigurationError(self._problem(source, str(error))) from error
        if plan is None:
            raise ConfigurationError(self._problem(source, "the builder gave no reason"))
        self._keep_timings(config)
        return _Built(plan, profiles, _shapes(trt, network), network.num_layers, constraints)

    def _network(self, builder: Any) -> Any:
        if self._legacy:
            return compat.legacy_network(self._trt, builder)
        return builder.create_network(1 << int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def _config(self, builder: Any, profiles: tuple[Profile, ...]) -> Any:
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
            if not options.blas:
                compat.without_blas(trt, config)
        else:
            config.progress_monitor = progress_monitor(trt)
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
            write_bytes(self._options.timing_cache, config.get_timing_cache().serialize())

    def _problem(self, source: Path, reason: str) -> str:
        said = [*self._errors, reason]
        if any(_OUT_OF_MEMORY.search(line) for line in said):
            return (
                f"memory ran out while TensorRT built {source}; free the GPU, or build for a smaller max_batch "
                f"(it is {self._options.max_batch}) or max_context ({self._options.max_context})."
            )
        return f"TensorRT cannot build {source}: {one_line(said[0])}; its log has the rest."


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
    return f"TensorRT cannot parse {source}: {one_line(errors[0])}; export the graph for TensorRT anew."


def _manifest(
    source: Path, built: _Built, precision: Precision, options: BuildOptions, gpu: Gpu, version: str, seconds: float
) -> Manifest:
    origin = origin_of(source)
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
            "constraints": built.constraints,
            "profiles": [_as_lists(entry.shapes) for entry in built.profiles],
            "options": {
                entry.name: getattr(options, entry.name)
                for entry in dataclasses.fields(options)
                if entry.name != "timing_cache"
            },
            "seconds": round(seconds, 1),
        },
    )


def _as_lists(shapes: Mapping[str, tuple[tuple[int, ...], ...]]) -> dict[str, list[list[int]]]:
    return {name: [list(shape) for shape in triple] for name, triple in shapes.items()}
