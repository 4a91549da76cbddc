"""``python -m perf.vllm_parallel``: the vllm strategy on one GPU and divided over several - equality, and time.

Engines of each number of ranks run side by side out of one export and are measured in turn, user by user: what the
machine does to one it does to the other. Scores are compared with PyTorch in FP32 by the rule for low precision (at
most twice the error of PyTorch in the same precision), and with one rank's. Networks are random, as in
``perf.vllm_gpu``. A file is written as soon as its variant is done.

    python -m perf.vllm_parallel --out "$OUT"                     # 8b on one GPU and on two, 2,048 + 256 tokens
    python -m perf.vllm_parallel --out "$OUT" --preset medium --ranks 1 --ranks 3
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from export.fp8 import fp8_in_pytorch
from export.vllm import write_folder
from mtgr.checkpoint import Checkpoint
from mtgr.config import preset, preset_names
from mtgr.engines.vllm_rows import VLLMRowEngine
from mtgr.engines.vllm_settings import SETTINGS_FILE, VLLMSettings, kv_token_bytes
from mtgr.model import MTGR
from perf.floors import floor
from perf.record import describe
from perf.vllm_gpu import CANDIDATES, DEVICE, WIDE, User, checkpoint, gpu, rows

Scores = npt.NDArray[np.float32]

# What is not FP8 is in bf16 on a GPU and fp32 on a CPU.
VARIANTS = ("wide", "fp8")
COMPARED = 2  # users
_WARMING = 3  # users whose times are left out
_BYTES = 2 if DEVICE == "cuda" else 4  # of a number in the cache

# Multicast over NVLink, which vLLM and NCCL would use for sums, is off where hosts are shared.
_ENVIRONMENT = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def main(arguments: list[str] | None = None) -> int:
    """Run the variants; 1 if one failed or missed the rule, which does not keep the others from running."""
    parser = argparse.ArgumentParser(prog="python -m perf.vllm_parallel", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--preset", choices=preset_names(), default="8b")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="may be repeated; both by default")
    parser.add_argument("--ranks", type=int, action="append", help="GPUs of an engine; may be repeated; 1 and 2")
    parser.add_argument("--context", type=int, default=2048, help="tokens")
    parser.add_argument("--rounds", type=int, default=20, help="users whose requests are timed")
    parser.add_argument("--block-size", type=int, default=64, help="tokens of a page")
    parser.add_argument("--eager", action="store_true", help="launch kernels one by one, without CUDA graphs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    problem = _problem(options)
    if problem is not None:
        parser.error(problem)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        weights, users, references = _prepared(Path(directory), options)
        for variant in _variants(options):
            print(f"== {variant}", flush=True)
            start = time.perf_counter()
            try:
                result = asyncio.run(_measured(weights, variant, users, references, options))
            except Exception as error:  # noqa: BLE001 - the next variant may go well
                print(f"   failed: {type(error).__name__}: {error}", flush=True)
                failed = True
                continue
            failed |= not result["holds"]
            path = options.out / f"parallel-{options.preset}-{variant}{'-eager' if options.eager else ''}.json"
            record = describe(options.seed) | {"gpu": gpu(), "gpus": torch.cuda.device_count()} | result
            path.write_text(json.dumps(record, indent=1), encoding="utf-8")
            print(f"   {time.perf_counter() - start:.0f} s, {path}", flush=True)
    return int(failed)


def _variants(options: argparse.Namespace) -> Sequence[str]:
    return options.variant or VARIANTS


def _ranks(options: argparse.Namespace) -> list[int]:
    return sorted(set(options.ranks or (1, 2)))


def _problem(options: argparse.Namespace) -> str | None:
    """Why this cannot be measured; None if it can."""
    heads, most = preset(options.preset).num_heads, max(_ranks(options))
    for size in _ranks(options):
        if size < 1 or heads % size:
            return f"--ranks {size} does not divide the {heads} heads of {options.preset}"
    if DEVICE == "cuda" and torch.cuda.device_count() < most:
        return f"--ranks {most} needs as many GPUs, and there are {torch.cuda.device_count()}"
    if not 1 <= options.context <= 2048:
        return "--context must be 1 to 2048"
    if options.rounds < 1:
        return "--rounds must be at least 1"
    return None


def _prepared(
    folder: Path, options: argparse.Namespace
) -> tuple[Path, list[User], Mapping[str, tuple[list[Scores], float]]]:
    """The exported weights, users to ask for, and by variant PyTorch's scores of the first and its error."""
    start = time.perf_counter()
    model = checkpoint(options.preset, options.seed, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    users = [
        rows(model, options.context, CANDIDATES, options.seed + index)
        for index in range(max(options.rounds + _WARMING, COMPARED))
    ]
    write_folder(model, folder / "checkpoint")
    print(f"   exported in {time.perf_counter() - start:.0f} s", flush=True)
    references = _references(model, users[:COMPARED], _variants(options))
    print(f"   compared in PyTorch after {time.perf_counter() - start:.0f} s", flush=True)
    del model  # the engines need its memory
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return folder / "checkpoint", users, references


def _references(
    model: Checkpoint, users: Sequence[User], variants: Sequence[str]
) -> dict[str, tuple[list[Scores], float]]:
    """By variant: FP32 scores, each [k, T], and the largest error of PyTorch in the variant's precision."""
    network, narrow = model.model, next(model.model.parameters()).dtype
    rounded = {"wide": [_dense(network, user) for user in users]}
    if "fp8" in variants:
        twin = fp8_in_pytorch(network)
        rounded["fp8"] = [_dense(twin, user) for user in users]
        del twin
    network.float()  # with the weights that the engines have: what was rounded stays so
    exact = [_dense(network, user) for user in users]
    network.to(narrow)
    return {variant: (exact, _largest(rounded[variant], exact)) for variant in variants}


def _dense(network: MTGR, user: User) -> Scores:
    with torch.inference_mode():
        context, candidates = (torch.from_numpy(part)[None].to(DEVICE) for part in user)
        scores: Scores = network(context, candidates)[0].float().cpu().numpy()
    return scores


async def _measured(
    weights: Path,
    variant: str,
    users: Sequence[User],
    references: Mapping[str, tuple[list[Scores], float]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Scores and times of a variant's engines."""
    exact, native = references[variant]
    # In fp32 nothing is rounded: what is left is the order of sums.
    bound = max(1e-5, 2 * native)
    ranks = _ranks(options)
    engines: dict[int, VLLMRowEngine] = {}
    scores: dict[int, list[Scores]] = {size: [] for size in ranks}
    milliseconds: dict[int, dict[str, list[float]]] = {size: {"cold": [], "cached": []} for size in ranks}
    hits: dict[int, int] = dict.fromkeys(ranks, 0)
    memory: dict[int, list[int]] = {}
    with tempfile.TemporaryDirectory() as directory:
        try:
            for size in ranks:
                start, before = time.perf_counter(), _used_bytes()
                version = _version(Path(directory) / str(size), weights, variant, size, options)
                engines[size] = await VLLMRowEngine.start_warm(version, threads=1 if DEVICE == "cpu" else 2)
                memory[size] = [now - past for now, past in zip(_used_bytes(), before, strict=True)]
                print(f"   {size} ranks: started in {time.perf_counter() - start:.1f} s", flush=True)
            for index, (context, candidates) in enumerate(users):
                for size, engine in engines.items():
                    for state in ("cold", "cached", "cached", "cached"):
                        before_hits, start = engine.statistics().context_tokens_cached, time.perf_counter()
                        found = await engine.rank(context, candidates, 120.0)
                        if index >= _WARMING:
                            milliseconds[size][state].append(1e3 * (time.perf_counter() - start))
                        hits[size] += engine.statistics().context_tokens_cached - before_hits
                        if index < COMPARED and state == "cold":
                            scores[size].append(found)
        finally:
            for engine in engines.values():
                await asyncio.to_thread(engine.shutdown)
    config, is_fp8 = preset(options.preset), variant == "fp8"
    cached = options.context // options.block_size * options.block_size
    floors = {
        state: floor(config, options.context, CANDIDATES, tokens, is_fp8=is_fp8).milliseconds
        for state, tokens in (("cold", 0), ("cached", cached))
    }
    first, table = ranks[0], {}
    for size in ranks:
        p50 = {state: statistics.median(values) for state, values in milliseconds[size].items()}
        table[str(size)] = {
            "milliseconds": milliseconds[size],
            "p50": p50,
            "speedup": {state: statistics.median(milliseconds[first][state]) / value for state, value in p50.items()},
            # Operations and bytes of one rank at its best, without what ranks tell each other.
            "floor": {state: value / size for state, value in floors.items()},
            "max_error": _largest(scores[size], exact),
            "max_difference": _largest(scores[size], scores[first]),
            "kv_bytes_per_user": kv_token_bytes(config, _BYTES, size) * options.context,
            "gpu_bytes": memory[size],
            "context_tokens_cached": hits[size],
        }
        print(
            f"   {size} ranks: cold {p50['cold']:.2f} ms, cached {p50['cached']:.2f} ms, error "
            f"{table[str(size)]['max_error']:.1e} (PyTorch {native:.1e}), apart "
            f"{table[str(size)]['max_difference']:.1e}",
            flush=True,
        )
    # Every repeated request found all whole pages of its context.
    complete = all(count == 3 * cached * len(users) for count in hits.values())
    return {
        "preset": options.preset,
        "variant": variant,
        "dtype": WIDE,
        "graphs": not options.eager and DEVICE == "cuda",
        "context": options.context,
        "candidates": CANDIDATES,
        "pytorch": native,
        "bound": bound,
        "spread": float(np.mean([one.std(axis=0).mean() for one in exact])),
        "holds": complete and all(entry["max_error"] <= bound for entry in table.values()),
        "ranks": table,
    }


def _version(directory: Path, weights: Path, variant: str, size: int, options: argparse.Namespace) -> Path:
    """A version directory on the exported weights."""
    longest = options.context + 1024
    token = kv_token_bytes(preset(options.preset), _BYTES, size)
    settings = VLLMSettings(
        max_model_len=longest,
        max_num_batched_tokens=max(4096, longest),
        max_num_seqs=16,
        dtype=WIDE,
        quantization="fp8" if variant == "fp8" else None,
        tensor_parallel_size=size,
        block_size=options.block_size,
        enforce_eager=options.eager,
        # With the cache's memory given it says only what must be free at the start.
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=8 * (longest + options.block_size) * token,
    )
    directory.mkdir()
    settings.save(directory / SETTINGS_FILE)
    (directory / settings.model).mkdir()
    shutil.copy(weights / "config.json", directory / settings.model)
    (directory / settings.model / "model.safetensors").symlink_to(weights / "model.safetensors")
    return directory


def _used_bytes() -> list[int]:
    """Memory in use on each GPU, whoever uses it."""
    if DEVICE != "cuda":
        return []
    return [total - free for free, total in map(torch.cuda.mem_get_info, range(torch.cuda.device_count()))]


def _largest(found: Sequence[Scores], wanted: Sequence[Scores]) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(found, wanted, strict=True))


if __name__ == "__main__":
    sys.exit(main())
