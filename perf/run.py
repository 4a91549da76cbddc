"""``python -m perf.run`` (``make perf``): every ready strategy under the same traffic, on a real server.

1. The server is started and warmed up; what each strategy bears at each level decides how many requests a point takes.
2. Sweeps by perf_analyzer: callers that wait for their answers, then rates. Strategies take turns within each repeat,
   so that noise falls on all alike, and get the same visits in the same order. ``direct_onnx`` is the engine itself,
   called with ready rows: what the door is measured against.
3. The key figures: ``auto`` in an open loop at 70% of what it bears, by the load generator, with visits of a user in
   order, newcomers, and bad requests.

The result (``perf/results_format.py``) goes to ``perf/results/NAME.json``. By default the model repository's own
checkpoint and users are measured; ``--preset`` measures a random network of that size with users of its own.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import numpy as np

from mtgr.bundle import Bundle, load_bundle
from mtgr.config import preset_names
from mtgr.engines.compiled_network import CompiledPrecision
from mtgr.errors import ConfigurationError, MTGRError
from mtgr.manifest import MANIFEST_FILE, Manifest, latest_version
from mtgr.routing.strategies import AUTO, STRATEGIES
from mtgr.serving.command import server_command
from mtgr.serving.find import find_installation
from mtgr.serving.server import TritonServer
from perf.analyzer import Analyzer, find_analyzer
from perf.measure import DIRECT, Bench, mismatches, wait_until_ready
from perf.model_memory import model_memory
from perf.record import ROOT, describe
from perf.results_format import Kpi, Machine, PerfResult, Point, Run, save
from perf.verdicts import SATURATION_SHARE, point_line, saturation, table, verdicts
from perf.watch import triton_version
from perf.workload import Visit, WorkloadConfig, stored_traffic, summary

BAD_SHARE = 0.005
_LEAST, _MOST = 20, 20_000  # requests of a point
_MOST_FILLING = 4_000
_DONE = "complete"  # of a repository that was built to the end


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        strategies: Those to compare, as far as they are ready.
        concurrency: Callers that wait for their answers.
        rate_shares: Rates of the rate sweep, as parts of what each strategy bears.
        repeats: Of every point of the sweeps.
        seconds: Of a point, about.
        fill: Visits that caches are filled with at first; twice as many as there are users if not given.
        warm_seconds: Of load before, for each strategy and level.
        kpi_seconds: Of the open loop; 0 leaves the key figures out.
        kpi_warm_seconds: Of the same load before it.
        traffic: What traffic.
    """

    strategies: tuple[str, ...] = ("baseline", "onnx", "tensorrt", "vllm", AUTO, DIRECT)
    concurrency: tuple[int, ...] = (1, 8, 32)
    rate_shares: tuple[float, ...] = (0.5, 0.8)
    repeats: int = 3
    seconds: float = 3.0
    fill: int | None = None
    warm_seconds: float = 2.0
    kpi_seconds: float = 20.0
    kpi_warm_seconds: float = 10.0
    traffic: WorkloadConfig = field(default_factory=WorkloadConfig)


@dataclass
class Measured:
    """What was seen."""

    points: list[Point]
    visits: list[Visit]
    kpi: Kpi | None
    sent: int
    distinct: int


def main(arguments: list[str] | None = None) -> int:
    """Run it; 0 if all was measured and counts agree, 1 if counts do not, 2 with one sentence if it cannot be done."""
    options = _parser().parse_args(arguments)
    try:
        plan = _plan(options)
        analyzer = find_analyzer(options.perf_analyzer)
        with tempfile.TemporaryDirectory() as folder, _repository(options, Path(folder)) as repository:
            result, problems = run(plan, repository, analyzer, Path(folder), options)
        path = save(result, options.out / f"{options.name}.json")
    except MTGRError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n" + table(result))
    for line in (*verdicts(result), *problems):
        print(line)
    print(f"result: {path}")
    return 1 if problems else 0


def run(
    plan: Plan, repository: Path, analyzer: Analyzer, folder: Path, options: argparse.Namespace
) -> tuple[PerfResult, list[str]]:
    """Measure on a server of its own.

    Returns:
        The result, and where the server's counts are others than the client's.
    """
    started, load_before = _now(), os.getloadavg()[0]
    bundle = load_bundle(repository)
    environment = {"MTGR_POLICY": str(options.policy.resolve())} if options.policy else {}
    arguments = ["--metrics-interval-ms=200"]
    with TritonServer(repository, log=options.server_log, extra_args=arguments, environment=environment) as server:
        bench = Bench(server, bundle, analyzer, folder)
        names = [name for name in plan.strategies if name != DIRECT]
        ready = wait_until_ready(server, bundle, names, options.start_seconds)
        if DIRECT in plan.strategies and "onnx" in ready:
            ready.append(DIRECT)
        if not ready:
            raise ConfigurationError(f"none of {', '.join(names)} is ready; run `make export`.")
        print(f"measuring {', '.join(ready)}", flush=True)
        measured = measure(bench, bundle, plan, ready)
        memory = model_memory(server.pid)
        triton = triton_version(server)
    origin = describe(plan.traffic.seed)
    revision = str(origin["revision"])
    result = PerfResult(
        run=Run(
            id=f"{options.name}-{started}",
            started=started,
            finished=_now(),
            command=["python", *sys.orig_argv[1:]],
            seed=plan.traffic.seed,
            git_revision=revision.removesuffix("+changes"),
            git_dirty=revision.endswith("+changes"),
            repeats=plan.repeats,
            preset=options.preset or "installed",
            checkpoint_version=_checkpoint(repository),
        ),
        machine=_machine(load_before),
        versions=dict(origin["versions"])
        | {"triton": triton, "perf_analyzer": analyzer.version, "system": platform.platform()},
        threads=thread_counts(repository),
        workload=replace(
            summary(plan.traffic, measured.visits),
            requests_generated=measured.sent,
            unique_payloads=measured.distinct,
        ),
        points=measured.points,
        kpi=measured.kpi,
        memory=memory,
    )
    return result, [line for point in measured.points if not point.errors for line in mismatches(point)]


def measure(bench: Bench, bundle: Bundle, plan: Plan, strategies: Sequence[str]) -> Measured:
    """All points, in the order in which they are to be reported."""
    traffic = stored_traffic(bundle, plan.traffic)
    visits: list[Visit] = []

    def take(count: int) -> list[Visit]:
        visits.extend(taken := traffic.take(count))
        return taken

    # As after a while of service: caches know those who come often.
    fill = traffic.take(min(2 * len(traffic.users.ids), _MOST_FILLING) if plan.fill is None else plan.fill)
    for strategy in [name for name in ("vllm", AUTO) if name in strategies]:
        bench.fill(strategy, fill, max(plan.concurrency))
    warm = traffic.take(2_000)
    rates = {
        (strategy, level): bench.closed_rate(strategy, warm, level, plan.warm_seconds)
        for level in plan.concurrency
        for strategy in strategies
    }
    points: list[Point] = []

    def add(point: Point) -> None:
        points.append(point)
        print(point_line(point), flush=True)

    def count(rate: float) -> int:
        return int(np.clip(rate * plan.seconds, _LEAST, _MOST))

    for repeat in range(plan.repeats):
        for level in plan.concurrency:
            shared = take(max(max(count(rates[strategy, level]), level) for strategy in strategies))
            for strategy in _turns(strategies, repeat):
                # All of them get the same visits, the quicker ones more.
                rate = rates[strategy, level]
                part = shared[: max(count(rate), level)]
                add(bench.concurrency(strategy, part, level, repeat, len(part) / max(rate, 1.0)))
    borne = {strategy: saturation(points, strategy) for strategy in strategies}
    for repeat in range(plan.repeats):
        for share in plan.rate_shares:
            # A second's at least: perf_analyzer wants them.
            rated = {
                strategy: (rate := float(f"{share * borne[strategy]:.3g}"), max(count(rate), math.ceil(rate)))
                for strategy in strategies
                if strategy != DIRECT
            }
            shared = take(max(number for _, number in rated.values()))
            for strategy in _turns(list(rated), repeat):
                rate, number = rated[strategy]
                add(bench.request_rate(strategy, shared[:number], rate, repeat, plan.traffic.seed + repeat))
    kpi = None
    if plan.kpi_seconds and AUTO in borne:
        rate = float(f"{SATURATION_SHARE * borne[AUTO]:.3g}")
        # A user's visits are sent in turn: who asked more than once a second would wait for answers of his own.
        traffic.config = replace(plan.traffic, bad_share=BAD_SHARE, apart=math.ceil(rate))
        if plan.kpi_warm_seconds:
            # The sweeps before left pauses, in which the caches forgot.
            early = traffic.take(int(rate * plan.kpi_warm_seconds * 1.2) + 20)
            bench.warm_open(AUTO, early, rate, plan.kpi_warm_seconds, plan.traffic.seed + 1)
        crowd = take(int(rate * plan.kpi_seconds * 1.2) + 20)
        add(bench.open_loop(AUTO, crowd, rate, plan.kpi_seconds, plan.traffic.seed))
        kpi = Kpi(rate=rate, saturation=borne[AUTO], point=len(points) - 1)
    return Measured(points, visits, kpi, bench.sent["requests"], bench.sent["distinct"])


def thread_counts(repository: Path) -> dict[str, int]:
    """What bounds the threads of a server on this repository."""
    _, environment = server_command(find_installation())
    counts = {"OMP_NUM_THREADS": int(environment["OMP_NUM_THREADS"])}
    for config in sorted(repository.glob("*/config.pbtxt")):
        text = config.read_text(encoding="utf-8")
        for key, value in re.findall(r'key: "(\w*thread\w*)"\s+value: { string_value: "(\d+)" }', text):
            counts[f"{config.parent.name}.{key}"] = int(value)
        if instances := re.search(r"instance_group \[ { count: (\d+)", text):
            counts[f"{config.parent.name}.instances"] = int(instances[1])
    return counts


def _turns(strategies: Sequence[str], repeat: int) -> list[str]:
    """Another one goes first each time, and every other time the order is the other way round."""
    shift = repeat % len(strategies)
    turned = [*strategies[shift:], *strategies[:shift]]
    return turned[::-1] if repeat % 2 else turned


def _parser() -> argparse.ArgumentParser:
    plan = Plan()
    parser = argparse.ArgumentParser(prog="python -m perf.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model-repository", type=Path, default=ROOT / "model_repository")
    parser.add_argument("--preset", choices=preset_names(), help="measure a random network of this size instead")
    parser.add_argument("--users", type=int, default=2000, help="with --preset: users in the store")
    parser.add_argument("--kv-gib", type=int, default=4, help="with --preset: memory of vLLM's cache")
    parser.add_argument(
        "--vllm", action="append", default=[], metavar="KEY=VALUE", help="with --preset: an engine argument of vLLM"
    )
    parser.add_argument(
        "--compiled", choices=get_args(CompiledPrecision), help="with --preset: baseline is the compiled engine"
    )
    parser.add_argument(
        "--work", type=Path, help="with --preset: folder of its repository, taken as it is if it is there"
    )
    parser.add_argument("--door-instances", type=int, default=1, help="with --preset: of mtgr_features")
    parser.add_argument("--router-instances", type=int, help="with --preset: of mtgr_router; as --door-instances")
    parser.add_argument("--feature-cache-mib", type=int, help="with --preset: of each process of mtgr_features")
    parser.add_argument("--policy", type=Path, help="policy file of the server; the profile's by default")
    parser.add_argument("--strategy", action="append", choices=plan.strategies, help="may be repeated; all by default")
    parser.add_argument("--concurrency", type=_numbers, default=plan.concurrency, metavar="1,8,32")
    parser.add_argument("--rate-shares", type=_shares, default=plan.rate_shares, metavar="0.5,0.8")
    parser.add_argument("--repeats", type=int, default=plan.repeats)
    parser.add_argument("--seconds", type=float, default=plan.seconds, help="of a point, about")
    parser.add_argument("--fill", type=int, help="visits before all, for caches; twice the users by default")
    parser.add_argument("--warm-seconds", type=float, default=plan.warm_seconds)
    parser.add_argument("--kpi-seconds", type=float, default=plan.kpi_seconds, help="0 leaves the key figures out")
    parser.add_argument(
        "--kpi-warm-seconds", type=float, default=plan.kpi_warm_seconds, help="of the same load before it"
    )
    parser.add_argument("--history", type=float, default=plan.traffic.history_median, help="median events of a user")
    parser.add_argument("--candidates", type=float, default=plan.traffic.candidates_median, help="median of a request")
    parser.add_argument("--zipf", type=float, default=plan.traffic.zipf, help="exponent of the users' popularity")
    parser.add_argument(
        "--repeat-share", type=float, default=plan.traffic.repeat_share, help="requests of who was here a moment ago"
    )
    parser.add_argument(
        "--new-user-share", type=float, default=plan.traffic.new_user_share, help="requests of users nobody knows"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-seconds", type=float, default=300.0, help="for an engine to answer")
    parser.add_argument("--perf-analyzer", type=Path, help="the executable; found by default")
    parser.add_argument("--server-log", type=Path, help="file for the server's output")
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results")
    parser.add_argument("--name", default="perf")
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    if options.repeats < 1 or options.seconds <= 0:
        raise ConfigurationError("--repeats and --seconds must be positive.")
    return Plan(
        strategies=tuple(options.strategy or Plan.strategies),
        concurrency=options.concurrency,
        rate_shares=options.rate_shares,
        repeats=options.repeats,
        seconds=options.seconds,
        fill=options.fill,
        warm_seconds=options.warm_seconds,
        kpi_seconds=options.kpi_seconds,
        kpi_warm_seconds=options.kpi_warm_seconds,
        traffic=WorkloadConfig(
            zipf=options.zipf,
            history_median=options.history,
            candidates_median=options.candidates,
            repeat_share=options.repeat_share,
            new_user_share=options.new_user_share,
            seed=options.seed,
        ),
    )


@contextmanager
def _repository(options: argparse.Namespace, folder: Path) -> Iterator[Path]:
    """The repository to measure: the one given, or one with a random network of a preset."""
    if options.preset is None:
        yield options.model_repository
        return
    if options.work is not None:
        folder = options.work
        if (folder / _DONE).is_file():
            yield folder / "repository"
            return
    import torch

    from export.vllm import parse_settings
    from perf.repository import built_repository, set_feature_cache, set_instances
    from perf.vllm_gpu import DEVICE, checkpoint

    wanted = options.strategy or ["baseline", "vllm"]
    strategies = [name for name in wanted if name in STRATEGIES]
    dense = bool({"baseline", "onnx", "tensorrt"} & set(strategies))  # which start from fp32 weights
    model = checkpoint(options.preset, options.seed, torch.float32 if dense or DEVICE == "cpu" else torch.bfloat16)
    generator = np.random.default_rng(options.seed)
    # More events than a first visit shows, so that there are new ones for the next.
    events = 2 * generator.lognormal(np.log(options.history), WorkloadConfig.history_sigma, options.users)
    most = model.schema.max_history + model.schema.realtime_step - 1
    lengths = len(model.schema.profile) + np.clip(events.astype(int), 2, most)
    # The memory is given, so that engines that start together do not measure one another's.
    engine = {"kv_cache_memory_bytes": options.kv_gib << 30, "gpu_memory_utilization": 0.05, "enforce_eager": False}
    settings = (engine if DEVICE == "cuda" else {}) | parse_settings(options.vllm)
    repository = built_repository(
        folder,
        model,
        {f"user-{index}": int(length) for index, length in enumerate(lengths)},
        options.seed,
        strategies,
        settings or None,
        options.compiled,
    )
    set_instances(repository, "mtgr_features", options.door_instances)
    set_instances(repository, "mtgr_router", options.router_instances or options.door_instances)
    if options.feature_cache_mib is not None:
        set_feature_cache(repository, options.feature_cache_mib)
    (folder / _DONE).touch()
    del model  # the server needs its memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    yield repository


def _machine(load_before: float) -> Machine:
    gpu = driver = None
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
        gpu, driver = (part.strip() for part in done.stdout.splitlines()[0].split(",", 1))
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cpu = str(describe(0)["machine"]["cpu"])
    return Machine(cpu, len(os.sched_getaffinity(0)), memory, gpu, driver, round(load_before, 2))


def _checkpoint(repository: Path) -> str:
    for strategy in STRATEGIES.values():
        version = latest_version(repository / strategy.rank_model)
        if version is not None and (version / MANIFEST_FILE).is_file():
            return Manifest.load(version).checkpoint
    return "unknown"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


if __name__ == "__main__":
    sys.exit(main())
