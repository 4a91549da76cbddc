"""``python -m perf.vllm_gpu``: the vllm strategy on a GPU - parity, cold against warm by preset, overhead, throughput.

Each section writes its raw samples to a file of its own as soon as it is done, so that a run that is cut off loses one
section; with ``--resume`` sections that have a file are left out. Starting an engine takes longer than measuring it, so
several of these may be started at once with one ``--out``: engines start side by side, measurements take turns. Random
networks: no trained checkpoint of these sizes exists, and time does not depend on weights.

    python -m perf.vllm_gpu --out "$OUT"                                  # everything
    python -m perf.vllm_gpu --out "$OUT" --section parity --preset small  # early: does it run, is it right
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import functools
import gzip
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from export.fp8 import fp8_in_pytorch
from export.rows import random_rows
from export.vllm import write_folder
from mtgr.checkpoint import Checkpoint
from mtgr.config import preset, preset_names
from mtgr.engines.vllm_rows import VLLMRowEngine
from mtgr.engines.vllm_settings import SETTINGS_FILE, VLLMSettings
from perf.floors import floor
from perf.record import describe
from perf.synthetic import synthetic_checkpoint

Rows = npt.NDArray[np.int32]
User = tuple[Rows, Rows]

CONTEXTS = (256, 512, 1024, 2048)
CANDIDATES = 256
ROUNDS = 15
PROFILED = 10  # requests
MAX_HISTORY = 2000  # so that a context of 2,048 tokens is not cut
DTYPES = ("float32", "bfloat16", "float16")
SHALLOW = "8b-shallow"  # two layers of a quarter of 8b's width, which take 8b's ways; for parity
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDE = "bfloat16" if DEVICE == "cuda" else "float32"  # what FP8 is not for


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; 0 if all ran, 1 if one failed, which does not keep the others from running."""
    parser = argparse.ArgumentParser(prog="python -m perf.vllm_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="may be repeated")
    parser.add_argument("--preset", action="append", choices=(*preset_names(), SHALLOW), help="of parity and crossover")
    parser.add_argument("--context", type=int, action="append", help="tokens, of crossover and, the first, of overhead")
    parser.add_argument("--kv-gib", type=int, help="memory of the cache, where engines share a GPU; all by default")
    parser.add_argument("--dtype", default=WIDE, help="precision; fp8 is FP8 in the blocks' products")
    parser.add_argument("--in-process", action="store_true", help="engines in threads of this process")
    parser.add_argument("--eager", action="store_true", help="launch kernels one by one, without CUDA graphs")
    parser.add_argument("--users", type=int, default=2000, help="of throughput")
    parser.add_argument("--concurrency", type=int, default=256, help="of throughput")
    parser.add_argument("--seconds", type=float, default=20.0, help="of throughput")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a page")
    parser.add_argument("--traces", type=Path, help="folder that takes the profiler's traces, of overhead")
    parser.add_argument("--start-when", type=Path, metavar="FILE", help="measure when this file is there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in options.section or list(SECTIONS):
        for variant in SECTIONS[name][1](options):
            launched = ("-eager" if options.eager else "") + ("-in-process" if options.in_process else "")
            path = options.out / f"vllm-{name}-{variant}{launched}.json"
            if options.resume and path.exists():
                continue
            print(f"== {name} {variant}", flush=True)
            start = time.perf_counter()
            try:
                result = asyncio.run(SECTIONS[name][0](options, variant))
            except Exception as error:  # noqa: BLE001 - the next section may go well
                print(f"   failed: {type(error).__name__}: {error}", flush=True)
                failed = True
                continue
            path.write_text(json.dumps(describe(options.seed) | {"gpu": gpu()} | result, indent=1), encoding="utf-8")
            print(f"   {time.perf_counter() - start:.0f} s, {path}", flush=True)
    return int(failed)


async def parity(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """fp32 within 1e-5 of PyTorch; low precision within twice PyTorch's own error (DESIGN, "equal")."""
    name, dtype = variant.rsplit("-", 1)
    model = checkpoint(name, options.seed, torch.float32)
    users = [rows(model, length, 64, options.seed) for length in (7, 130, 512, 900, 1500)]
    network = model.model

    def dense(user: User) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            context, candidates = (torch.from_numpy(part)[None].to(DEVICE) for part in user)
            return network(context, candidates)[0].float().cpu().numpy()

    wanted = [dense(user) for user in users]
    folder = Engine(model, options, dtype)
    if dtype == "fp8":
        network = fp8_in_pytorch(network)
    network = network.to(wide(dtype))
    native = max(float(np.abs(dense(user) - one).max()) for user, one in zip(users, wanted, strict=True))
    async with folder as engine:
        worst, apart = {"cold": 0.0, "warm": 0.0}, 0.0
        for user, one in zip(users, wanted, strict=True):
            found = {state: await engine.rank(*user) for state in worst}
            apart = max(apart, float(np.abs(found["warm"] - found["cold"]).max()))
            for state, scores in found.items():
                worst[state] = max(worst[state], float(np.abs(scores - one).max()))
    bound = 1e-5 if dtype == "float32" else 2 * native
    print(f"   {variant}: {worst}, bound {bound:.2e}, apart {apart:.1e}", flush=True)
    return {
        "preset": name,
        "dtype": dtype,
        "spread": float(np.mean([one.std(axis=0).mean() for one in wanted])),
        "max_error": worst,
        "warm_from_cold": apart,
        "pytorch": native,
        "bound": bound,
        "holds": max(worst.values()) <= bound,
    }


async def crossover(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Milliseconds of first and second requests by context, one at a time, with the floor of each."""
    model = checkpoint(name, options.seed, wide(options.dtype))
    table = []
    async with Engine(model, options, options.dtype) as engine:
        for context in options.context or CONTEXTS:
            engine.take_turn()
            samples: dict[str, list[float]] = {"cold": [], "warm": []}
            for index in range(-2, ROUNDS):
                context_rows, first = rows(model, context, CANDIDATES, options.seed + 1000 * context + index)
                second = first.copy()
                second[:, model.schema.item_column] = np.roll(first[:, model.schema.item_column], 1)
                for state, candidates in (("cold", first), ("warm", second)):
                    seconds = await _timed(lambda part=candidates, whole=context_rows: engine.rank(whole, part))
                    if index >= 0:
                        samples[state].append(1e3 * seconds)
            cached = context // engine.settings.block_size * engine.settings.block_size
            floors = {
                "cold": floor(model.config, context, CANDIDATES).milliseconds,
                "warm": floor(model.config, context, CANDIDATES, cached).milliseconds,
            }
            medians = {state: statistics.median(values) for state, values in samples.items()}
            table.append({"context": context, "milliseconds": samples, "p50": medians, "floor": floors})
            print(
                f"   {name} {context}+{CANDIDATES}: cold {medians['cold']:.2f} (floor {floors['cold']:.2f}) "
                f"warm {medians['warm']:.2f} (floor {floors['warm']:.2f}) "
                f"ratio {medians['cold'] / medians['warm']:.2f}",
                flush=True,
            )
    return {"preset": name, "dtype": options.dtype, "graphs": not options.eager, "table": table}


async def overhead(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """What the engine adds to cached and to first requests beyond the GPU's work, which vLLM's profiler tells."""
    name, _ = variant.rsplit("-", 1)
    model = checkpoint(name, options.seed, wide(options.dtype))
    context = (options.context or [1024])[0]
    users = (rows(model, context, CANDIDATES, options.seed + index) for index in itertools.count())
    first = next(users)
    table = {}
    async with Engine(model, options, options.dtype, profiled=True) as engine:
        engine.take_turn()
        for state, asked in (("cached", itertools.repeat(first)), ("cold", users)):
            samples = [
                1e3 * await _timed(functools.partial(engine.rank, *user)) for user in itertools.islice(asked, 60)
            ]
            await engine.engine.profile(True)
            for user in itertools.islice(asked, PROFILED):
                await engine.rank(*user)
            await engine.engine.profile(False)
            busy = engine.busy()
            median, gpu = statistics.median(samples[10:]), sum(busy.values())
            print(
                f"   {name} {context}+{CANDIDATES}, {state}: p50 {median:.2f} ms, GPU busy {gpu:.2f} ms, "
                f"the engine adds {median - gpu:.2f} ms",
                flush=True,
            )
            for kernel, milliseconds in sorted(busy.items(), key=lambda item: -item[1])[:12]:
                print(f"      {milliseconds:7.3f} ms  {kernel[:100]}", flush=True)
            table[state] = {"milliseconds": samples, "p50": median, "gpu_milliseconds": busy}
    return {"preset": name, "dtype": options.dtype, "context": context, "table": table}


async def throughput(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Requests a second of concurrent callers over users of Zipf(1.0) popularity; the dense network in batches."""
    model = checkpoint(name, options.seed, wide(options.dtype))
    generator = np.random.default_rng(options.seed)
    contexts = [rows(model, 512, 1, options.seed + index)[0] for index in range(options.users)]
    candidates = rows(model, 512, CANDIDATES, options.seed)[1]
    popularity = 1 / np.arange(1, options.users + 1)
    order = generator.choice(options.users, 200_000, p=popularity / popularity.sum())
    latencies: list[float] = []
    async with Engine(model, options, options.dtype) as engine:
        position = 0

        async def caller(end: float) -> None:
            nonlocal position
            while time.perf_counter() < end:
                context = contexts[order[position % len(order)]]
                position += 1
                latencies.append(1e3 * await _timed(lambda one=context: engine.rank(one, candidates)))

        engine.take_turn()
        for seconds in (options.seconds / 2, options.seconds):  # the first fills the cache
            latencies.clear()
            before, start = engine.engine.statistics(), time.perf_counter()
            await asyncio.gather(*(caller(start + seconds) for _ in range(options.concurrency)))
            rate = len(latencies) / (time.perf_counter() - start)
        after = engine.engine.statistics()
    tokens = after.context_tokens - before.context_tokens
    hits = (after.context_tokens_cached - before.context_tokens_cached) / max(1, tokens)
    dense = _dense_rate(model, contexts, candidates, options.seconds / 2)
    print(f"   {name}: {rate:.0f}/s, hits {hits:.1%}, dense {dense:.0f}/s, ratio {rate / dense:.2f}", flush=True)
    return {
        "preset": name,
        "dtype": options.dtype,
        "per_second": rate,
        "hit_ratio": hits,
        "dense_per_second": dense,
        "milliseconds": latencies[:20_000],
    }


SECTIONS: dict[str, tuple[Callable[..., Awaitable[Any]], Callable[[argparse.Namespace], list[str]]]] = {
    "parity": (
        parity,
        lambda options: [
            f"{name}-{dtype}"
            for name in options.preset or ["small", "medium"]
            for dtype in (["fp8"] if options.dtype == "fp8" else DTYPES)
        ],
    ),
    "overhead": (
        overhead,
        lambda options: [f"{name}-{options.dtype}" for name in options.preset or ["large"]],
    ),
    "throughput": (throughput, lambda options: options.preset or ["xlarge"]),
    "crossover": (crossover, lambda options: options.preset or [name for name in preset_names() if name != "tiny"]),
}


class Engine:
    """A row engine on a checkpoint, in a folder of its own.

    Args:
        model: Its network.
        options: Of the command line.
        dtype: Precision.
        profiled: Whether ``busy`` will be asked for.
    """

    def __init__(self, model: Checkpoint, options: argparse.Namespace, dtype: str, profiled: bool = False) -> None:
        longest = max(CONTEXTS) + 1024
        settings = VLLMSettings(
            max_model_len=longest,
            max_num_batched_tokens=max(8192, longest),
            dtype=WIDE if dtype == "fp8" else dtype,
            quantization="fp8" if dtype == "fp8" else None,
            in_process=options.in_process,
            block_size=options.block_size,
            # With the cache's memory given it says only what must be free at the start.
            gpu_memory_utilization=0.05 if options.kv_gib else 0.85,
            kv_cache_memory_bytes=options.kv_gib and options.kv_gib << 30,
            enforce_eager=options.eager,
        )
        self.settings = settings
        self._temporary = tempfile.TemporaryDirectory()
        self._lock = (options.out / ".turn").open("w")
        self._folder = Path(self._temporary.name) / "model"
        self._traces = Path(self._temporary.name) / "traces"
        self._profiled = profiled
        self._keep: Path | None = options.traces
        self._start_when: Path | None = options.start_when
        write_folder(model, self._folder / settings.model)
        settings.save(self._folder / SETTINGS_FILE)

    async def __aenter__(self) -> Engine:
        profiler = {
            "profiler": "torch",
            "torch_profiler_dir": str(self._traces),
            "torch_profiler_with_stack": False,
            "torch_profiler_dump_cuda_time_total": False,
            "ignore_frontend": True,
        }
        more = {"profiler_config": profiler} if self._profiled else {}
        start = time.perf_counter()
        self.engine = await VLLMRowEngine.start_warm(self._folder, threads=2, more=more)
        print(f"   started in {time.perf_counter() - start:.1f} s", flush=True)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._lock.close()  # the next one's turn
        await asyncio.to_thread(self.engine.shutdown)
        self._temporary.cleanup()

    def take_turn(self) -> None:
        """Wait until no other run on this GPU measures."""
        while self._start_when is not None and not self._start_when.exists():
            time.sleep(0.2)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    async def rank(self, context: Rows, candidates: Rows) -> npt.NDArray[np.float32]:
        """FP32 [k, T]."""
        return await self.engine.rank(context, candidates, 120.0)

    def busy(self) -> dict[str, float]:
        """Milliseconds of the GPU by kernel or copy, of each of the ``PROFILED`` requests profiled last."""
        trace = max(self._traces.rglob("*.json.gz"), key=lambda path: path.stat().st_mtime_ns)
        if self._keep is not None:
            self._keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(trace, self._keep)
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        total: dict[str, float] = {}
        for event in events:
            if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
                total[event["name"]] = total.get(event["name"], 0.0) + event["dur"] / 1e3 / PROFILED
        return total


def wide(dtype: str) -> torch.dtype:
    """Of what is not in FP8."""
    found: torch.dtype = getattr(torch, WIDE if dtype == "fp8" else dtype)
    return found


def checkpoint(name: str, seed: int, dtype: torch.dtype) -> Checkpoint:
    """A random network of a preset, its tables for 20,000 items; made in ``dtype``, for 8b is 32 GB in fp32."""
    wanted = {"num_layers": 2, "d_model": 2048, "num_heads": 16} if name == SHALLOW else {}
    config = preset("8b" if name == SHALLOW else name, max_positions=4096, **wanted)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            made = synthetic_checkpoint(config, 20_000, seed, MAX_HISTORY)
        made.model.to(DEVICE)  # what was made out of arrays
        return made
    finally:
        torch.set_default_dtype(before)


def rows(model: Checkpoint, context: int, candidates: int, seed: int) -> User:
    """Context INT32 [n, W] and candidates INT32 [k, W] of a random user."""
    generator = np.random.default_rng(seed)
    first, second = random_rows(model.schema, model.catalog, 1, context, candidates, generator)
    return first[0].numpy(), second[0].numpy()


def _dense_rate(model: Checkpoint, contexts: list[Rows], candidates: Rows, seconds: float, batch: int = 8) -> float:
    """Requests a second of the eager network in full batches, which is more than baseline serves."""
    network = model.model
    shared = torch.from_numpy(np.repeat(candidates[None], batch, axis=0)).to(DEVICE)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        chosen = np.stack([contexts[(count + index) % len(contexts)] for index in range(batch)])
        with torch.inference_mode():
            network(torch.from_numpy(chosen).to(DEVICE), shared).float().cpu()
        count += batch
    return count / (time.perf_counter() - start)


async def _timed(call: Callable[[], Awaitable[Any]]) -> float:
    start = time.perf_counter()
    await call()
    return time.perf_counter() - start


def gpu() -> Mapping[str, Any]:
    """The GPU and what drives it; nothing without one."""
    if not torch.cuda.is_available():
        return {}
    return {"name": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}


if __name__ == "__main__":
    sys.exit(main())
