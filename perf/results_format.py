"""The file of one performance run: what was measured, on what, and how to measure it again.

One JSON object a run (schema ``mtgr-perf/1``), one line a point. A point's latency samples stand in it or, if they are
many, in a file ``<name>.samples.json.gz`` next to the result.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.errors import ConfigurationError
from mtgr.files import read_json

SCHEMA = "mtgr-perf/1"
INLINE_SAMPLES = 20_000
STRATEGIES = ("baseline", "onnx", "tensorrt", "vllm", "auto", "direct_onnx")
MODES = ("concurrency", "request_rate", "open_loop")
TOOLS = ("perf_analyzer", "load_generator")


@dataclass(frozen=True)
class Run:
    """Origin of a result.

    Attributes:
        id: Names the run.
        started: ISO 8601, UTC.
        finished: ISO 8601, UTC.
        command: What to run again.
        seed: Of the traffic and of the arrivals.
        git_revision: Of the code.
        git_dirty: Whether the code had changes on top of it.
        repeats: How often each point was measured.
        preset: Size of the network.
        checkpoint_version: Hash of the weights.
    """

    id: str
    started: str
    finished: str
    command: list[str]
    seed: int
    git_revision: str
    git_dirty: bool
    repeats: int
    preset: str
    checkpoint_version: str


@dataclass(frozen=True)
class Machine:
    """Where it ran; ``load_before`` is the system's load average before the run, which says who else was busy."""

    cpu: str
    cores: int
    memory_bytes: int
    gpu: str | None
    driver: str | None
    load_before: float


@dataclass(frozen=True)
class Spread:
    """Percentiles of a count, such as events of a user's history."""

    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Spread:
        """Of these values; zeros of none."""
        array = np.asarray(values, dtype=np.float64)
        if not array.size:
            return cls(0.0, 0.0, 0.0)
        return cls(*(round(float(np.percentile(array, q)), 3) for q in (50, 99, 100)))


@dataclass(frozen=True)
class WorkloadSummary:
    """The traffic as it was generated, not as it was meant to be.

    Attributes:
        users: Different users asked for.
        zipf: Exponent of the users' popularity.
        requests_generated: Requests of all files and streams.
        unique_payloads: Different ones among them.
        history_lengths: Events of the users asked for, one value a request.
        candidates: Candidates of a request.
        new_user_share: Part of the requests whose user nobody knows.
        repeat_share: Part of the requests whose user had asked before.
        bad_share: Part of the requests that must be refused; none of those that perf_analyzer sends.
        events_between_visits: Mean number of real-time events that a user has from one visit to the next.
    """

    users: int
    zipf: float
    requests_generated: int
    unique_payloads: int
    history_lengths: Spread
    candidates: Spread
    new_user_share: float
    repeat_share: float
    bad_share: float
    events_between_visits: float


@dataclass(frozen=True)
class Latency:
    """Milliseconds."""

    p50: float
    p90: float
    p95: float
    p99: float
    mean: float
    max: float

    @classmethod
    def of(cls, samples_ms: npt.ArrayLike) -> Latency:
        """Of these samples; zeros of none."""
        array = np.asarray(samples_ms, dtype=np.float64)
        if not array.size:
            return cls(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        quantiles = np.percentile(array, (50, 90, 95, 99)).tolist()
        return cls(*(round(float(value), 3) for value in (*quantiles, array.mean(), array.max())))


@dataclass(frozen=True)
class ModelCounts:
    """What Triton counted for one model while a point was measured.

    Attributes:
        requests: Requests that succeeded.
        inferences: The same with each request's batch.
        executions: Calls of the model, each of one request or of several merged ones.
        queue_ms: Mean wait of a request, in milliseconds, as the next three.
        compute_input_ms: Mean time to prepare a request's inputs.
        compute_infer_ms: Mean time in the model.
        compute_output_ms: Mean time to take out a request's outputs.
        batch_sizes: Executions by their number of inferences.
        total_ms: Mean time of a request in the server, of which an ensemble reports nothing else.
    """

    requests: int
    inferences: int
    executions: int
    queue_ms: float
    compute_input_ms: float
    compute_infer_ms: float
    compute_output_ms: float
    batch_sizes: dict[str, int] = field(default_factory=dict)
    total_ms: float = 0.0

    @property
    def mean_batch(self) -> float:
        """Inferences an execution; 0 without any."""
        return self.inferences / self.executions if self.executions else 0.0


@dataclass(frozen=True)
class CacheRatios:
    """Parts of look-ups that were answered from memory; None where nothing was looked up."""

    feature_hit_ratio: float | None = None
    prefix_hit_ratio: float | None = None


@dataclass(frozen=True)
class Gpu:
    """Means over a point, but for memory, of which it is the most, and energy, which is the sum; over all GPUs."""

    utilization: float
    memory_used_bytes: int
    memory_total_bytes: int
    power_watts: float | None
    energy_joules: float | None


@dataclass(frozen=True)
class Point:
    """One measurement: a strategy at a level of load.

    Attributes:
        strategy: What the requests asked for; ``direct_onnx`` calls the engine with ready rows.
        mode: Of load: callers that wait for their answers, or a rate that does not.
        level: Callers, or requests a second.
        repeat: From 0.
        tool: What sent the requests.
        command: Its command line; empty for the load generator, which is called in process.
        seconds: Length of the measurement.
        requests: Answers and errors within it.
        errors: Those that were not answered, by their code.
        offered_rate: Requests a second that were to be sent, where that was given.
        throughput: Answers a second.
        latency_ms: Of the answers.
        latency_samples_ms: Each of them.
        answered_by: Answers by the strategy that served, in the router's count.
        models: Triton's counts, by model.
        stages_ms: Mean milliseconds of each stage of the door, by its name.
        cache: Hit ratios.
        gpu: None on a machine without one.
        server_memory_bytes: Most resident memory of the server's processes together.
        cpu_seconds: Processor time of the server's processes.
        client_lag_ms: p99 of how late the client itself sent, for the load generator: where it nears the latency, the
            client was what was slow.
        rightly_refused: Bad requests that were refused, which is neither an answer nor an error.
    """

    strategy: str
    mode: str
    level: float
    repeat: int
    tool: str
    command: list[str]
    seconds: float
    requests: int
    errors: dict[str, int]
    offered_rate: float | None
    throughput: float
    latency_ms: Latency
    latency_samples_ms: list[float] = field(repr=False)
    answered_by: dict[str, int]
    models: dict[str, ModelCounts]
    stages_ms: dict[str, float]
    cache: CacheRatios
    gpu: Gpu | None
    server_memory_bytes: int
    cpu_seconds: float
    client_lag_ms: float | None = None
    rightly_refused: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("strategy", self.strategy, STRATEGIES),
            ("mode", self.mode, MODES),
            ("tool", self.tool, TOOLS),
        ):
            if value not in allowed:
                raise ConfigurationError(f"{name} is '{value}'; it must be one of {', '.join(allowed)}.")

    @property
    def error_share(self) -> float:
        """Part of the requests that were not answered."""
        return sum(self.errors.values()) / self.requests if self.requests else 0.0


@dataclass(frozen=True)
class ModelMemory:
    """What the processes of a model hold, shared pages in part; ``gpu_bytes`` is None where it is not known."""

    host_bytes: int
    gpu_bytes: int | None


@dataclass(frozen=True)
class Kpi:
    """Which point the key figures are read from.

    Attributes:
        rate: Requests a second that were offered, open loop.
        saturation: Most answers a second that the sweep found.
        point: Index of the point.
    """

    rate: float
    saturation: float
    point: int


@dataclass(frozen=True)
class PerfResult:
    """A whole run; see the module.

    Attributes:
        run: Origin.
        machine: Where it ran.
        versions: Of programs and packages, by name.
        threads: Thread counts of what computes, by setting.
        workload: Traffic.
        points: Measurements in the order in which they ran.
        kpi: Where the key figures stand; None if they were not measured.
        memory: By model, after all points; empty in results of before this was measured.
        schema: Name and version of this format.
    """

    run: Run
    machine: Machine
    versions: dict[str, str]
    threads: dict[str, int]
    workload: WorkloadSummary
    points: list[Point]
    kpi: Kpi | None = None
    memory: dict[str, ModelMemory] = field(default_factory=dict)
    schema: str = SCHEMA

    def __post_init__(self) -> None:
        if self.kpi is not None and not 0 <= self.kpi.point < len(self.points):
            raise ConfigurationError(f"kpi.point is {self.kpi.point}, but there are {len(self.points)} points.")

    def of(self, strategy: str, mode: str, level: float) -> list[Point]:
        """The repeats of a point."""
        return [point for point in self.points if (point.strategy, point.mode, point.level) == (strategy, mode, level)]


def save(result: PerfResult, path: Path) -> Path:
    """Write a result, and its sidecar if it needs one, each in one step.

    Returns:
        ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = dataclasses.asdict(result)
    points, aside = whole.pop("points"), {}
    sidecar = path.with_name(f"{path.stem}.samples.json.gz")
    for index, point in enumerate(points):
        if len(point["latency_samples_ms"]) > INLINE_SAMPLES:
            aside[str(index)] = point["latency_samples_ms"]
            point["latency_samples_ms"] = {"file": sidecar.name, "key": str(index)}
    if aside:
        _replace(sidecar, gzip.compress(json.dumps(aside).encode(), mtime=0))
    ordered = {"schema": whole.pop("schema"), **whole}
    head = json.dumps(ordered, indent=1, allow_nan=False)[: -len("\n}")]
    lines = ",\n  ".join(json.dumps(point, allow_nan=False) for point in points)
    _replace(path, f'{head},\n "points": [\n  {lines}\n ]\n}}\n'.encode())
    return path


def load(path: Path) -> PerfResult:
    """Read a result back.

    Raises:
        ConfigurationError: If the file, or its sidecar, is missing, of another schema, or not what the schema says.
    """
    value = read_json(path)
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA:
        raise ConfigurationError(f"{path} has schema {schema!r}, not '{SCHEMA}': write it anew with `make perf`.")
    try:
        for point in value.get("points", ()):
            if isinstance(reference := point.get("latency_samples_ms"), dict):
                point["latency_samples_ms"] = _sidecar(path.with_name(reference["file"]))[reference["key"]]
        return typing.cast(PerfResult, _decoded(PerfResult, value, ""))
    except ConfigurationError as error:
        raise ConfigurationError(f"{path} is not a valid result: {error}") from error
    except (KeyError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"{path} is not a valid result: {error!r} in its latency samples.") from error


def _sidecar(path: Path) -> dict[str, list[float]]:
    try:
        samples: dict[str, list[float]] = json.loads(gzip.decompress(path.read_bytes()))
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path}, which holds its latency samples, is missing; keep the two together.") from (
            error
        )
    except (OSError, EOFError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}.") from error
    return samples


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _decoded(kind: Any, value: Any, where: str) -> Any:
    """``value`` as an instance of ``kind``; ``where`` names its place in the file."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if value is None:
            return None
        return _decoded(next(one for one in arguments if one is not types.NoneType), value, where)
    if dataclasses.is_dataclass(kind):
        return _decoded_dataclass(kind, value, where)
    if origin is list:
        _check(isinstance(value, list), where, "a list", value)
        return [_decoded(arguments[0], one, f"{where}[{index}]") for index, one in enumerate(value)]
    if origin is dict:
        _check(isinstance(value, dict), where, "an object", value)
        return {key: _decoded(arguments[1], one, f"{where}.{key}") for key, one in value.items()}
    if kind is float:
        _check(isinstance(value, int | float) and not isinstance(value, bool), where, "a number", value)
        return float(value)
    _check(isinstance(value, kind) and (kind is bool) == isinstance(value, bool), where, _WORDS[kind], value)
    return value


_WORDS: Mapping[type, str] = {str: "a string", int: "a whole number", bool: "true or false"}


def _decoded_dataclass(kind: Any, value: Any, where: str) -> Any:
    _check(isinstance(value, dict), where, "an object", value)
    hints = typing.get_type_hints(kind)
    required = {one.name for one in dataclasses.fields(kind) if _is_required(one)}
    prefix = f"{where}." if where else ""
    if missing := sorted(required - value.keys()):
        raise ConfigurationError(f"{prefix}{missing[0]} is missing.")
    if unknown := sorted(value.keys() - hints.keys()):
        raise ConfigurationError(f"{prefix}{unknown[0]} is not a field of '{SCHEMA}'.")
    return kind(**{name: _decoded(hints[name], one, f"{prefix}{name}") for name, one in value.items()})


def _is_required(one: dataclasses.Field[Any]) -> bool:
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING


def _check(holds: bool, where: str, wanted: str, value: Any) -> None:
    if not holds:
        raise ConfigurationError(f"{where or 'the file'} must be {wanted}, not {json.dumps(value)[:60]}.")
