"""``python -m perf.bench_vllm``: what a cached context saves, with onnx and baseline beside it. Ratios within one run.

Latency, one request at a time, engines alone and through the door: the first request of a user (cold), the second one
with other candidates (warm), and the same two requests of the dense engines, interleaved. Throughput through the door:
a closed loop of concurrent callers over users whom vLLM has seen before.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from export.rows import random_rows
from mtgr.bundle import load_bundle
from mtgr.checkpoint import Checkpoint, load_checkpoint
from mtgr.client import AsyncMTGRClient
from mtgr.config import ModelConfig, preset, preset_names
from mtgr.engines.baseline import BaselineEngine
from mtgr.engines.onnx import OnnxEngine
from mtgr.engines.vllm_rows import VLLMRowEngine
from mtgr.serving.server import TritonServer
from perf.metrics_page import context_tokens
from perf.record import ROOT, describe, store
from perf.repository import CONFIG, built_repository, set_threads
from perf.synthetic import EPOCH, SPAN, synthetic_checkpoint

CONTEXT, CANDIDATES = 512, 64
TARGET = 4.0  # cold over warm, of the engine
MOMENT = EPOCH + SPAN + 60

Samples = dict[str, list[float]]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if the target is met, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m perf.bench_vllm", description=__doc__)
    parser.add_argument("--preset", choices=preset_names(), help="network; by default that of all benchmarks on a CPU")
    parser.add_argument("--threads", type=int, default=2, help="of each engine")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each throughput measurement, taken three times")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="bench-vllm-cpu", help="file name in perf/results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        repository, model = prepare(Path(folder), options)
        engine = asyncio.run(engine_latency(repository, model, options))
        with TritonServer(repository) as server:
            door = asyncio.run(door_latency(server, repository, options))
            throughput, hits = asyncio.run(door_throughput(server, repository, options))
    return report(options, {"engine": engine, "door": door}, throughput, hits)


def prepare(folder: Path, options: argparse.Namespace) -> tuple[Path, Checkpoint]:
    """A repository with every engine on a random network, and more users than are asked for."""
    model = synthetic_checkpoint(network(options), num_items=20_000, seed=options.seed)
    users = {f"user-{index}": CONTEXT for index in range(options.rounds + 64)}
    repository = built_repository(folder, model, users, options.seed, ("baseline", "onnx", "vllm"))
    set_threads(repository, options.threads)
    return repository, load_checkpoint(folder / "checkpoint")


def network(options: argparse.Namespace) -> ModelConfig:
    """The network that is measured."""
    return preset(options.preset) if options.preset else CONFIG


async def engine_latency(repository: Path, model: Checkpoint, options: argparse.Namespace) -> Samples:
    """Milliseconds of engines in process: rows in, scores out."""
    torch.set_num_threads(options.threads)
    baseline = BaselineEngine(repository / "mtgr_baseline" / "1")
    onnx = OnnxEngine(repository / "mtgr_onnx_rank" / "1" / "model.onnx", options.threads)
    vllm = await VLLMRowEngine.start_warm(repository / "mtgr_vllm" / "1", options.threads)
    generator = np.random.default_rng(options.seed)

    async def users() -> AsyncIterator[Mapping[str, Callable[[], Awaitable[Any]]]]:
        while True:
            context, first = (
                rows.numpy() for rows in random_rows(model.schema, model.catalog, 1, CONTEXT, CANDIDATES, generator)
            )
            second = first.copy()
            second[0, :, model.schema.item_column] = generator.integers(2, model.schema.num_items, CANDIDATES)
            inputs = {"context": context, "candidates": second}

            async def dense(engine: Any, *outputs: Any, inputs: Any = inputs) -> Any:
                return engine.infer(inputs, *outputs)

            yield {
                "vllm cold": lambda context=context, first=first: vllm.rank(context[0], first[0]),
                "vllm warm": lambda context=context, second=second: vllm.rank(context[0], second[0]),
                "onnx": lambda dense=dense: dense(onnx, ["task_scores"]),
                "baseline": lambda dense=dense: dense(baseline),
            }

    try:
        return await _in_turn(users(), options.rounds, "engines")
    finally:
        vllm.shutdown()


async def door_latency(server: TritonServer, repository: Path, options: argparse.Namespace) -> Samples:
    """Milliseconds of ranking through the door."""
    items = load_bundle(repository).catalog.raw_ids
    generator = np.random.default_rng(options.seed)
    async with AsyncMTGRClient(server.grpc_url, timeout=60) as client:

        def ask(user: str, strategy: str) -> Callable[[], Awaitable[Any]]:
            candidates = generator.choice(items, CANDIDATES, replace=False)
            return lambda: client.rank(user, candidates, strategy=strategy, request_time=MOMENT)

        async def users() -> AsyncIterator[Mapping[str, Callable[[], Awaitable[Any]]]]:
            for index in range(options.rounds + 10):
                user = f"user-{index}"
                yield {
                    "vllm cold": ask(user, "vllm"),
                    "vllm warm": ask(user, "vllm"),
                    "onnx": ask(user, "onnx"),
                    "baseline": ask(user, "baseline"),
                }

        return await _in_turn(users(), options.rounds, "door")


async def door_throughput(
    server: TritonServer, repository: Path, options: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], float]:
    """By strategy: answers a second in each of three rounds, and the milliseconds of every answer; vLLM's hit ratio."""
    items = load_bundle(repository).catalog.raw_ids
    generator = np.random.default_rng(options.seed)
    users = [f"user-{index}" for index in range(64)]
    results: dict[str, dict[str, Any]] = {
        name: {"per_second": [], "milliseconds": []} for name in ("vllm", "onnx", "baseline")
    }
    async with AsyncMTGRClient(server.grpc_url, timeout=60) as client:
        for user in users:  # whom vLLM has not seen is measured above
            await client.rank(user, items[:CANDIDATES], strategy="vllm", request_time=MOMENT)
        before = context_tokens(server.metrics_url)
        for _ in tqdm(range(3), desc="throughput", leave=False):
            for name, result in results.items():
                count = len(result["milliseconds"])
                start = time.perf_counter()

                async def caller(name: str = name, result: Any = result, end: float = start + options.seconds) -> None:
                    while (begin := time.perf_counter()) < end:
                        user = str(generator.choice(users))
                        candidates = generator.choice(items, CANDIDATES, replace=False)
                        await client.rank(user, candidates, strategy=name, request_time=MOMENT)
                        result["milliseconds"].append((time.perf_counter() - begin) * 1e3)

                await asyncio.gather(*(caller() for _ in range(options.concurrency)))
                answers = len(result["milliseconds"]) - count
                result["per_second"].append(answers / (time.perf_counter() - start))
    await asyncio.sleep(1.5)  # metrics are brought to the page once a second
    context, cached = (now - past for now, past in zip(context_tokens(server.metrics_url), before, strict=True))
    return results, cached / context


def report(
    options: argparse.Namespace, latency: Mapping[str, Samples], throughput: Mapping[str, Any], hits: float
) -> int:
    """Print the table and keep the samples."""
    config = network(options)
    print(
        f"\nd {config.d_model}, {config.num_layers} layers, {CONTEXT} context, {CANDIDATES} candidates, "
        f"{options.threads} threads; milliseconds at p50, one request at a time\n"
    )
    names = list(next(iter(latency.values())))
    print(f"{'':12}" + "".join(f"{name:>12}" for name in names) + f"{'cold / warm':>14}{'onnx / warm':>14}")
    ratios = {}
    for title, samples in latency.items():
        medians = {name: statistics.median(values) for name, values in samples.items()}
        ratios[title] = medians["vllm cold"] / medians["vllm warm"]
        cells = "".join(f"{medians[name]:12.1f}" for name in names)
        print(f"{title:12}{cells}{ratios[title]:13.2f}x{medians['onnx'] / medians['vllm warm']:13.2f}x")
    print(f"\nthrough the door, {options.concurrency} callers, warm; context tokens found in the cache: {hits:.1%}\n")
    print(f"{'':12}{'answers/s':>12}{'p50 ms':>10}{'p99 ms':>10}")
    for name, result in throughput.items():
        p50, p99 = np.percentile(result["milliseconds"], [50, 99])
        print(f"{name:12}{statistics.median(result['per_second']):12.1f}{p50:10.1f}{p99:10.1f}")
    result = describe(options.seed) | {
        "config": config.to_dict(),
        "context": CONTEXT,
        "candidates": CANDIDATES,
        "threads": options.threads,
        "concurrency": options.concurrency,
        "milliseconds": dict(latency),
        "throughput": dict(throughput),
        "hit_ratio": hits,
    }
    print(f"\nraw samples: {store(options.name, result).relative_to(ROOT)}")
    print(f"engine, cold over warm: {ratios['engine']:.2f} (at least {TARGET:.0f})")
    return 0 if ratios["engine"] >= TARGET else 1


async def _in_turn(
    users: AsyncIterator[Mapping[str, Callable[[], Awaitable[Any]]]], rounds: int, title: str
) -> Samples:
    """Milliseconds of each call; cold goes before warm, the dense engines before, between, and after them in turn."""
    samples: Samples = {}
    progress = tqdm(range(-3, rounds), desc=title, leave=False)
    for index in progress:
        runs = await anext(users)
        names = list(runs)
        shift = index % 3
        order = names if shift == 0 else [*names[2:], *names[:2]] if shift == 1 else [names[i] for i in (0, 3, 1, 2)]
        for name in order:
            start = time.perf_counter()
            await runs[name]()
            if index >= 0:  # the first rounds warm up
                samples.setdefault(name, []).append((time.perf_counter() - start) * 1e3)
    return {name: samples[name] for name in ("vllm cold", "vllm warm", "onnx", "baseline")}


if __name__ == "__main__":
    sys.exit(main())
