"""``python -m perf.vllm_door``: the vllm strategy through the door of a real server, on a GPU.

``crossover``: first and second requests of users by length of their context, one at a time, with the floor of each.
``throughput``: concurrent callers over users of Zipf(1.0) popularity, vllm and baseline in turn on one server.

Starting a server takes longer than measuring it, so several of these may be started at once with one ``--out``: servers
start side by side, measurements take turns. Networks are random, as in ``perf.vllm_gpu``.

    python -m perf.vllm_door --out "$OUT" --section crossover --preset 8b --kv-gib 24
    python -m perf.vllm_door --out "$OUT" --section throughput --preset xlarge --kv-gib 64
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from mtgr.bundle import load_bundle
from mtgr.client import AsyncMTGRClient, RecommendationRequest
from mtgr.config import preset, preset_names
from mtgr.errors import UnavailableError
from mtgr.serving.server import TritonServer
from perf.floors import floor
from perf.load import Outcome, RawCaller, Samples, closed_loop
from perf.metrics_page import context_tokens
from perf.record import describe
from perf.repository import built_repository, set_instances
from perf.synthetic import EPOCH, SPAN
from perf.vllm_gpu import CANDIDATES, CONTEXTS, DEVICE, checkpoint, gpu

MOMENT = EPOCH + SPAN + 60
PAGE = 16


def main(arguments: list[str] | None = None) -> int:
    """Run a section."""
    parser = argparse.ArgumentParser(prog="python -m perf.vllm_door", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--section", choices=("crossover", "throughput"), required=True)
    parser.add_argument("--preset", choices=preset_names(), required=True)
    parser.add_argument("--kv-gib", type=int, default=8, help="memory of the cache")
    parser.add_argument("--context", type=int, action="append", help="tokens, of crossover")
    parser.add_argument("--rounds", type=int, default=15, help="users of each length, of crossover")
    parser.add_argument("--users", type=int, default=2000, help="of throughput")
    parser.add_argument("--concurrency", type=int, default=256, help="of throughput")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each of three measurements a strategy")
    parser.add_argument("--door-instances", type=int, default=1, help="processes of mtgr_features and of mtgr_router")
    parser.add_argument("--start-when", type=Path, metavar="FILE", help="measure when this file is there")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    several = f"-{options.door_instances}" if options.door_instances > 1 else ""
    path = options.out / f"door-{options.section}-{options.preset}{several}.json"
    with tempfile.TemporaryDirectory() as folder:
        measure = crossover if options.section == "crossover" else throughput
        result = measure(Path(folder), options)
    path.write_text(json.dumps(describe(options.seed) | {"gpu": gpu()} | result, indent=1), encoding="utf-8")
    print(f"   {path}", flush=True)
    return 0


def crossover(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of first and second requests by context."""
    contexts = options.context or list(CONTEXTS)
    warming = 3
    with started(folder, options, dict.fromkeys(contexts, options.rounds + warming)) as server:
        table = asyncio.run(_crossover(server, folder, contexts, options, warming))
    return {"preset": options.preset, "precision": PRECISION, "table": table}


async def _crossover(
    server: TritonServer, folder: Path, contexts: list[int], options: argparse.Namespace, warming: int
) -> list[dict[str, Any]]:
    items = load_bundle(folder / "repository").catalog.raw_ids
    generator = np.random.default_rng(options.seed)
    table = []
    async with AsyncMTGRClient(server.grpc_url, timeout=60) as client:
        for context in contexts:
            samples: dict[str, list[float]] = {"cold": [], "warm": []}
            for index in range(options.rounds + warming):
                for state in samples:
                    taken = await rank_ms(client, request_of(f"user-{context}-{index}", items, generator))
                    if index >= warming:
                        samples[state].append(taken)
            config, cached = preset(options.preset), context // PAGE * PAGE
            floors = {
                "cold": floor(config, context, CANDIDATES).milliseconds,
                "warm": floor(config, context, CANDIDATES, cached).milliseconds,
            }
            medians = {state: statistics.median(values) for state, values in samples.items()}
            table.append({"context": context, "milliseconds": samples, "p50": medians, "floor": floors})
            print(
                f"   {options.preset} {context}+{CANDIDATES}: cold {medians['cold']:.2f} (floor {floors['cold']:.2f}) "
                f"warm {medians['warm']:.2f} (floor {floors['warm']:.2f}) "
                f"ratio {medians['cold'] / medians['warm']:.2f}",
                flush=True,
            )
    return table


def throughput(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Answers a second of concurrent callers."""
    with started(folder, options, {512: options.users}, ("baseline", "vllm")) as server:
        return asyncio.run(_throughput(server, folder, options))


async def _throughput(server: TritonServer, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    items = load_bundle(folder / "repository").catalog.raw_ids
    generator = np.random.default_rng(options.seed)
    popularity = 1 / np.arange(1, options.users + 1)
    users = generator.choice(options.users, 12_000, p=popularity / popularity.sum())
    runs: dict[str, list[Samples]] = {"vllm": [], "baseline": []}
    callers = {}
    for strategy in runs:
        requests = [
            request_of(f"user-512-{user}", items, generator, strategy)
            for user in tqdm(users, desc=f"requests of {strategy}", leave=False)
        ]
        callers[strategy] = RawCaller(server.grpc_url, requests, timeout=20.0)
    for strategy, caller in callers.items():  # fills the cache, and lets the door find out what engines bear
        await closed_loop(caller, options.concurrency, options.seconds)
        print(f"   {strategy} is warm", flush=True)
    hits = []
    for _ in range(3):
        for strategy, caller in callers.items():
            before = context_tokens(server.metrics_url)
            runs[strategy].append(samples := await closed_loop(caller, options.concurrency, options.seconds))
            await asyncio.sleep(1.5)  # metrics are brought to the page once a second
            if strategy == "vllm":
                context, cached = (
                    now - past for now, past in zip(context_tokens(server.metrics_url), before, strict=True)
                )
                hits.append(cached / context)
            times = 1e3 * samples.latencies_of(Outcome.ANSWERED)
            print(
                f"   {strategy}: {samples.goodput():.0f}/s, p50 {np.percentile(times, 50):.0f} ms, "
                f"p99 {np.percentile(times, 99):.0f} ms, {samples.to_dict()['counts']}",
                flush=True,
            )
    for caller in callers.values():
        await caller.__aexit__(None, None, None)
    rates = {strategy: statistics.median(one.goodput() for one in several) for strategy, several in runs.items()}
    print(f"   ratio {rates['vllm'] / rates['baseline']:.2f}, hit ratio {statistics.median(hits):.1%}", flush=True)
    return {
        "preset": options.preset,
        "precision": PRECISION,
        "concurrency": options.concurrency,
        "door_instances": options.door_instances,
        "users": options.users,
        "per_second": rates,
        "hit_ratios": hits,
        "runs": {strategy: [one.to_dict() for one in several] for strategy, several in runs.items()},
    }


def request_of(
    user: str, items: npt.NDArray[np.int64], generator: np.random.Generator, strategy: str = "vllm"
) -> RecommendationRequest:
    """A user's request at ``MOMENT`` for candidates drawn from ``items``."""
    candidates = generator.choice(items, CANDIDATES, replace=False)
    return RecommendationRequest(user, None, candidates, request_time=MOMENT, strategy=strategy)


async def rank_ms(client: AsyncMTGRClient, request: RecommendationRequest) -> float:
    """Milliseconds that a caller waits for the scores of a request."""
    start = time.perf_counter()
    await client.infer(request)
    return 1e3 * (time.perf_counter() - start)


PRECISION = {"vllm": "bf16" if DEVICE == "cuda" else "fp32", "baseline": "fp32"}


@contextmanager
def started(
    folder: Path,
    options: argparse.Namespace,
    users: dict[int, int],
    strategies: tuple[str, ...] = ("vllm",),
) -> Iterator[TritonServer]:
    """A server on a new repository, and the turn to measure it; ``users`` of each length of context."""
    start = time.perf_counter()
    on_disk = "baseline" in strategies  # which computes in fp32
    model = checkpoint(options.preset, options.seed, torch.float32 if on_disk or DEVICE == "cpu" else torch.bfloat16)
    repository = built_repository(
        folder,
        model,
        {f"user-{context}-{index}": context for context, count in users.items() for index in range(count)},
        options.seed,
        strategies,
        {"kv_cache_memory_bytes": options.kv_gib << 30, "gpu_memory_utilization": 0.05, "enforce_eager": False},
    )
    for name in ("mtgr_features", "mtgr_router"):
        set_instances(repository, name, options.door_instances)
    del model  # the server needs its memory
    gc.collect()
    torch.cuda.empty_cache()
    print(f"   exported in {time.perf_counter() - start:.0f} s", flush=True)
    with (
        (options.out / ".turn").open("w") as lock,
        TritonServer(repository, log=options.out / f"server-{options.section}-{options.preset}.log") as server,
    ):
        asyncio.run(wait_for_engine(server))
        print(f"   vllm answers after {time.perf_counter() - start:.0f} s", flush=True)
        while options.start_when is not None and not options.start_when.exists():
            time.sleep(0.2)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield server


async def wait_for_engine(server: TritonServer, seconds: float = 300.0) -> None:
    """Ask until vLLM, which starts behind the ready server, answers."""
    end = time.perf_counter() + seconds
    async with AsyncMTGRClient(server.grpc_url, timeout=60) as client:
        while True:
            try:
                await client.rank("nobody", [1], strategy="vllm", request_time=MOMENT)
                return
            except UnavailableError:
                if time.perf_counter() > end:
                    raise
                await asyncio.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
