"""``python -m perf.vllm_large``: the 8b preset behind the door, in bf16 and fp8, on one GPU and out of one export.

``door``: first and cached requests, one at a time, of servers that run side by side and are measured in turn; then once
more while no processor falls asleep (``perf.awake``). Requests are built before they are sent and answers left unread,
as by perf_analyzer: what a client in Python takes is not the server's.
``users``: concurrent callers, each a user whose context is resident.
``offload``: users who were displaced from the GPU's pages and come back out of the host's memory.

Networks are random, as in ``perf.vllm_gpu``. A file is written as soon as its section is done.

    python -m perf.vllm_large --out "$OUT" --preset 8b
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtgr.bundle import load_bundle
from mtgr.config import ModelConfig, preset, preset_names
from mtgr.engines.vllm_rows import VLLMRowEngine
from mtgr.engines.vllm_settings import SETTINGS_FILE, VLLMSettings
from mtgr.serving.server import TritonServer
from perf.awake import awake
from perf.floors import floor
from perf.load import Outcome, RawCaller, closed_loop
from perf.metrics_page import context_tokens
from perf.record import describe
from perf.repository import built_repository
from perf.swap_blocks import serve_swap_blocks
from perf.synthetic import synthetic_checkpoint
from perf.vllm_door import request_of, wait_for_engine
from perf.vllm_gpu import CANDIDATES, DEVICE, checkpoint, gpu, rows

# Servers of ``door``: changes of the engine's settings.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "bf16": {},
    "bf16-in-process": {"in_process": True},
    "fp8-in-process": {"in_process": True, "quantization": "fp8"},
}
SECTIONS = ("door", "users", "offload")
AWAKE = ", processors awake"


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; 1 if one failed, which does not keep the others from running."""
    parser = argparse.ArgumentParser(prog="python -m perf.vllm_large", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="may be repeated")
    parser.add_argument("--preset", choices=preset_names(), default="8b")
    parser.add_argument("--context", type=int, default=2048, help="tokens")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="server of door; may be repeated")
    parser.add_argument("--rounds", type=int, default=20, help="users of door")
    parser.add_argument("--users", type=int, default=48, help="callers, and users, of users")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each of three measurements of users")
    parser.add_argument("--kv-gib", type=float, default=84, help="memory of the cache, of users")
    parser.add_argument("--quantization", choices=("none", "fp8"), default="fp8", help="of users and offload")
    parser.add_argument("--block-size", type=int, default=64, help="tokens of a page")
    parser.add_argument("--stop-at", type=float, default=float("inf"), help="seconds after which no section begins")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    begin, failed = time.perf_counter(), False
    with tempfile.TemporaryDirectory() as directory:
        repository = exported(Path(directory), options)
        print(f"   exported in {time.perf_counter() - begin:.0f} s", flush=True)
        for name in options.section or SECTIONS:
            start = time.perf_counter()
            if start - begin > options.stop_at:
                print(f"== {name}: left out, {start - begin:.0f} s are over", flush=True)
                continue
            print(f"== {name}", flush=True)
            try:
                result = _SECTION[name](repository, options)
            except Exception as error:  # noqa: BLE001 - the next section may go well
                print(f"   failed: {type(error).__name__}: {error}", flush=True)
                failed = True
                continue
            record = describe(options.seed) | {"gpu": gpu(), "preset": options.preset} | result
            path = options.out / f"large-{name}-{options.preset}.json"
            path.write_text(json.dumps(record, indent=1), encoding="utf-8")
            print(f"   {time.perf_counter() - start:.0f} s, {path}", flush=True)
    return int(failed)


def exported(folder: Path, options: argparse.Namespace) -> Path:
    """A repository of the door and vllm, with more users than any section asks for."""
    model = checkpoint(options.preset, options.seed, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    count = max(2 * (options.rounds + _WARMING), options.users)
    users = {f"user-{index}": options.context for index in range(count)}
    settings = {"gpu_memory_utilization": 0.05, "block_size": options.block_size}
    repository = built_repository(folder, model, users, options.seed, ("vllm",), settings)
    del model  # the servers need its memory
    gc.collect()
    torch.cuda.empty_cache()
    return repository


_WARMING = 3


def changed(repository: Path, name: str, kv_gib: float, changes: Mapping[str, Any]) -> Path:
    """A repository beside another, on the same weights, with other settings of the engine."""
    made = repository.with_name(f"repository-{name}")
    version = Path("mtgr_vllm") / "1"
    shutil.copytree(repository, made, ignore=shutil.ignore_patterns("model.safetensors"), symlinks=True)
    settings = VLLMSettings.load(repository / version / SETTINGS_FILE)
    weights = repository / version / settings.model / "model.safetensors"
    (made / version / settings.model / weights.name).symlink_to(weights.resolve())
    memory = int(kv_gib * (1 << 30))
    dataclasses.replace(settings, kv_cache_memory_bytes=memory, **changes).save(made / version / SETTINGS_FILE)
    return made


@contextmanager
def serving(repositories: Mapping[str, Path], out: Path) -> Iterator[dict[str, TritonServer]]:
    """Servers that start side by side; those that do not start are left out."""
    servers: dict[str, TritonServer] = {}
    with ExitStack() as stack:
        for name, repository in repositories.items():
            servers[name] = stack.enter_context(TritonServer(repository, log=out / f"server-large-{name}.log"))
        for name in list(servers):
            start = time.perf_counter()
            try:
                asyncio.run(wait_for_engine(servers[name], 120.0))
            except Exception as error:  # noqa: BLE001 - the others may be well
                print(f"   {name} does not answer: {error}", flush=True)
                del servers[name]
            else:
                print(f"   {name} answers after {time.perf_counter() - start:.0f} s more", flush=True)
        yield servers


def door(repository: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of first and cached requests of each variant, in turn for each user."""
    token = token_bytes(preset(options.preset))
    kv_gib = 4 * (options.context + 1024) * token / (1 << 30)
    chosen = options.variant or VARIANTS
    repositories = {name: changed(repository, name, kv_gib, VARIANTS[name]) for name in chosen}
    with serving(repositories, options.out) as servers:
        samples = asyncio.run(_door(servers, repository, options, 0))
        with awake():  # and other users, whom nothing knows either
            again = asyncio.run(_door(servers, repository, options, options.rounds + _WARMING))
        samples |= {f"{name}{AWAKE}": found for name, found in again.items()}
    cached = options.context // options.block_size * options.block_size
    table = {}
    for name, found in samples.items():
        is_fp8 = "fp8" in name
        floors = {
            "cold": floor(preset(options.preset), options.context, CANDIDATES, is_fp8=is_fp8).milliseconds,
            "cached": floor(preset(options.preset), options.context, CANDIDATES, cached, is_fp8=is_fp8).milliseconds,
        }
        p50 = {state: statistics.median(values) for state, values in found.items()}
        table[name] = {"milliseconds": found, "p50": p50, "floor": floors}
        print(f"   {name}: cold {p50['cold']:.2f} ms, cached {p50['cached']:.2f} ms", flush=True)
    return {"context": options.context, "candidates": CANDIDATES, "table": table}


async def _door(
    servers: Mapping[str, TritonServer], repository: Path, options: argparse.Namespace, first: int
) -> dict[str, dict[str, list[float]]]:
    items = load_bundle(repository).catalog.raw_ids
    generator = np.random.default_rng(options.seed)
    samples: dict[str, dict[str, list[float]]] = {name: {"cold": [], "cached": []} for name in servers}
    states = ("cold", "cached", "cached", "cached")
    count = options.rounds + _WARMING
    async with AsyncExitStack() as stack:
        callers = {}
        for name, server in servers.items():
            users = np.repeat(np.arange(count), len(states)) + first
            requests = [request_of(f"user-{user}", items, generator) for user in users]
            callers[name] = await stack.enter_async_context(RawCaller(server.grpc_url, requests, timeout=60.0))
        for index in range(count):
            for name, caller in callers.items():
                for place, state in enumerate(states):
                    start = time.perf_counter()
                    await caller(index * len(states) + place)
                    if index >= _WARMING:
                        samples[name][state].append(1e3 * (time.perf_counter() - start))
    return samples


def users(repository: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Answers a second of callers whose contexts are all resident."""
    quantization = None if options.quantization == "none" else options.quantization
    made = changed(repository, "users", options.kv_gib, {"in_process": True, "quantization": quantization})
    with serving({"users": made}, options.out) as servers:
        result = asyncio.run(_users(servers["users"], made, options))
    token = token_bytes(preset(options.preset))
    resident = options.kv_gib * (1 << 30) / (token * options.context)
    print(f"   {token * options.context / 1e9:.3f} GB a user, {resident:.1f} users in {options.kv_gib} GiB", flush=True)
    return result | {
        "quantization": options.quantization,
        "kv_gib": options.kv_gib,
        "user_bytes_computed": token * options.context,
        "users_resident": resident,
    }


async def _users(server: TritonServer, repository: Path, options: argparse.Namespace) -> dict[str, Any]:
    items = load_bundle(repository).catalog.raw_ids
    generator = np.random.default_rng(options.seed)
    requests = [request_of(f"user-{index % options.users}", items, generator) for index in range(20 * options.users)]
    caller = RawCaller(server.grpc_url, requests, timeout=30.0)
    await closed_loop(caller, options.users, options.seconds)  # the contexts, once
    await closed_loop(caller, options.users, 2.0)
    await asyncio.sleep(1.5)  # metrics are brought to the page once a second
    before = context_tokens(server.metrics_url)
    runs = [await closed_loop(caller, options.users, options.seconds) for _ in range(3)]
    await asyncio.sleep(1.5)
    tokens, cached = (now - past for now, past in zip(context_tokens(server.metrics_url), before, strict=True))
    await caller.__aexit__(None, None, None)
    times = np.concatenate([1e3 * run.latencies_of(Outcome.ANSWERED) for run in runs])
    rate = statistics.median(run.goodput() for run in runs)
    p50, p99 = np.percentile(times, [50, 99])
    hits = cached / max(1, tokens)
    print(f"   {rate:.1f}/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms, hits {hits:.1%}", flush=True)
    return {"per_second": rate, "p50": p50, "p99": p99, "hit_ratio": hits, "runs": [run.to_dict() for run in runs]}


def offload(repository: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Cold, cached and reloaded requests of an engine whose pages hold a few users, and the host's memory twelve."""
    token = token_bytes(preset(options.preset))
    user = options.context * token / (1 << 30)
    longest = VLLMSettings.load(repository / "mtgr_vllm" / "1" / SETTINGS_FILE).max_model_len * token / (1 << 30)
    made = changed(
        repository,
        "offload",
        user + 1.5 * longest,
        {
            "in_process": True,
            "quantization": None if options.quantization == "none" else options.quantization,
            "kv_offload_gib": 0 if DEVICE == "cpu" else 12 * user,
        },
    )
    return asyncio.run(_offload(made / "mtgr_vllm" / "1", options))


# Seconds in which a context's pages are copied to the host, behind its first answer and in the way of the next.
_COPIED = 0.3


async def _offload(version: Path, options: argparse.Namespace) -> dict[str, Any]:
    # Shapes and schema of the export; only rows are asked of it.
    model = synthetic_checkpoint(preset("tiny", max_positions=4096), 20_000, options.seed, 2000)
    requests = [rows(model, options.context, CANDIDATES, options.seed + index) for index in range(8)]
    library = serve_swap_blocks() if DEVICE == "cuda" else None
    engine = await VLLMRowEngine.start_warm(version, threads=2)
    times: dict[str, list[float]] = {"cold": [], "cached": [], "reloaded": []}
    hits: dict[str, list[int]] = {state: [] for state in times}
    errors = []

    async def timed(state: str, index: int) -> Any:
        before, start = engine.statistics().context_tokens_cached, time.perf_counter()
        scores = await engine.rank(*requests[index], 60.0)
        times[state].append(1e3 * (time.perf_counter() - start))
        hits[state].append(engine.statistics().context_tokens_cached - before)
        return scores

    try:
        first = []
        for index in range(len(requests)):
            first.append(await timed("cold", index))
            await asyncio.sleep(_COPIED)
            await engine.rank(*requests[index], 60.0)  # wakes the processors, as the requests ahead of the others do
            errors.append(float(np.abs(await timed("cached", index) - first[-1]).max()))
            await asyncio.sleep(0.1)  # this one's own copies
        for _ in range(2):
            for index in range(len(requests)):
                errors.append(float(np.abs(await timed("reloaded", index) - first[index]).max()))
    finally:
        await asyncio.to_thread(engine.shutdown)
    p50 = {state: statistics.median(values) for state, values in times.items()}
    print(f"   {p50}, context tokens found {hits['reloaded']}, largest difference {max(errors):.1e}", flush=True)
    return {
        "p50": p50,
        "milliseconds": times,
        "user_bytes": options.context * token_bytes(preset(options.preset)),  # what a reload copies
        "hits": hits,
        "max_difference": errors,
        "context": options.context,
        "own_copies": library is not None,
    }


def token_bytes(config: ModelConfig) -> int:
    """Bytes of the keys and values of one token."""
    number = 2 if DEVICE == "cuda" else 4
    return config.num_layers * config.num_heads * (config.dqk + config.dv) * number


_SECTION: Mapping[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "door": door,
    "users": users,
    "offload": offload,
}


if __name__ == "__main__":
    sys.exit(main())
