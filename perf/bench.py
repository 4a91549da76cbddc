"""``python -m perf.bench``: onnx against baseline, and what the door costs. Ratios within one run.

Engines are compared in process with equal thread counts, rounds interleaved so that noise falls on both alike. The
door's cost is the difference, through a running server, between a request to ``mtgr`` and the same rows sent straight
to the engine, again interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from export.rows import random_rows
from mtgr.bundle import load_bundle
from mtgr.checkpoint import load_checkpoint
from mtgr.client import MTGRClient
from mtgr.engines.baseline import BaselineEngine
from mtgr.engines.onnx import OnnxEngine
from mtgr.features.candidates import candidate_rows
from mtgr.features.extract import FeatureExtractor
from mtgr.features.state import CandidateState
from mtgr.routing.buckets import CANDIDATE_BUCKETS, CONTEXT_BUCKETS, bucket, pad
from mtgr.serving.server import TritonServer
from perf.record import ROOT, describe, store
from perf.repository import CONFIG, set_threads, synthetic_repository
from perf.synthetic import EPOCH, SPAN

CONTEXT, CANDIDATES = 512, 64
TARGETS = {"batch 1": 1.15, "batch 8": 2.0, "door": 3.0}

Samples = dict[str, list[float]]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if every target is met, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m perf.bench", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="bench-cpu", help="file name in perf/results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        repository = synthetic_repository(Path(folder), 32, CONTEXT, options.seed)
        model = load_checkpoint(Path(folder) / "checkpoint")
        set_threads(repository, options.threads)
        engines = {
            f"batch {batch}": compare_engines(repository, model, batch, options.threads, options.rounds, options.seed)
            for batch in (1, 8)
        }
        door = measure_door(repository, options.requests, options.seed)
    return _report(options, engines, door)


def compare_engines(repository: Path, model: Any, batch: int, threads: int, rounds: int, seed: int) -> Samples:
    """Milliseconds of full batches: every context has all its tokens."""
    torch.set_num_threads(threads)
    baseline = BaselineEngine(repository / "mtgr_baseline" / "1")
    onnx = OnnxEngine(repository / "mtgr_onnx_rank" / "1" / "model.onnx", threads)
    generator = np.random.default_rng(seed)
    users = [random_rows(model.schema, model.catalog, 1, CONTEXT, CANDIDATES, generator) for _ in range(batch)]
    inputs = {
        "context": np.concatenate([context.numpy() for context, _ in users]),
        "candidates": np.concatenate([candidates.numpy() for _, candidates in users]),
    }
    runs: Mapping[str, Callable[[], Any]] = {
        "baseline": lambda: baseline.infer(inputs),
        "onnx": lambda: onnx.infer(inputs, ["task_scores"]),
    }
    return _interleaved(runs, rounds, f"batch {batch}")


def measure_door(repository: Path, requests: int, seed: int) -> Samples:
    """Milliseconds of ranking 64 candidates through the door, and of the same rows straight to the engine."""
    bundle = load_bundle(repository)
    extractor = FeatureExtractor(bundle.schema, bundle.catalog, bundle.store())
    generator = np.random.default_rng(seed)
    users = bundle.store().user_ids()
    moment = EPOCH + SPAN + 60
    with TritonServer(repository) as server, MTGRClient(server.grpc_url) as client:
        import tritonclient.grpc as grpc

        engine = grpc.InferenceServerClient(server.grpc_url)
        state: dict[str, Any] = {}

        def draw() -> None:
            user = str(generator.choice(users))
            candidates = generator.choice(bundle.catalog.raw_ids, CANDIDATES, replace=False)
            tensors = {
                "user_id": np.array([[user.encode()]], dtype=np.object_),
                "candidates": candidates[None],
                "request_time": np.array([[moment]]),
            }
            features = extractor.extract(tensors)
            user_state = CandidateState.from_array(features.candidate_state, bundle.schema.epoch)
            rows = candidate_rows(bundle.schema, bundle.catalog, user_state, bundle.catalog.to_internal(candidates))
            context = pad(features.context, bucket(len(features.context), CONTEXT_BUCKETS))
            inputs = {"context": context, "candidates": pad(rows, bucket(len(rows), CANDIDATE_BUCKETS))}
            state["call"] = (user, candidates)
            state["inputs"] = [
                grpc.InferInput(name, list(array.shape), "INT32").set_data_from_numpy(array)
                for name, array in inputs.items()
            ]

        runs: Mapping[str, Callable[[], Any]] = {
            "engine": lambda: engine.infer("mtgr_onnx_rank", state["inputs"]).as_numpy("task_scores"),
            "door": lambda: client.rank(*state["call"], strategy="onnx", request_time=moment),
        }
        return _interleaved(runs, requests, "door", draw)


def _interleaved(
    runs: Mapping[str, Callable[[], Any]], rounds: int, title: str, before: Callable[[], None] | None = None
) -> Samples:
    samples: Samples = {name: [] for name in runs}
    for index in tqdm(range(-3, rounds), desc=title, leave=False):
        if before is not None:
            before()
        # Whoever goes second finds warm caches: take turns.
        for name, run in list(runs.items())[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            run()
            if index >= 0:  # the first rounds warm up
                samples[name].append((time.perf_counter() - start) * 1e3)
    return samples


def _report(options: argparse.Namespace, engines: Mapping[str, Samples], door: Samples) -> int:
    verdicts = []
    print(
        f"d {CONFIG.d_model}, {CONFIG.num_layers} layers, {CONTEXT} context, {CANDIDATES} candidates, "
        f"{options.threads} threads\n"
    )
    print(f"{'':10}{'baseline':>12}{'onnx':>12}{'ratio':>9}{'target':>9}")
    for name, samples in engines.items():
        medians = {engine: statistics.median(values) for engine, values in samples.items()}
        ratio = medians["baseline"] / medians["onnx"]
        verdicts.append(ratio >= TARGETS[name])
        print(f"{name:10}{medians['baseline']:9.1f} ms{medians['onnx']:9.1f} ms{ratio:8.2f}x{TARGETS[name]:8.2f}x")
    added = statistics.median(door["door"]) - statistics.median(door["engine"])
    verdicts.append(added <= TARGETS["door"])
    print(
        f"\ndoor {statistics.median(door['door']):.1f} ms, engine alone {statistics.median(door['engine']):.1f} ms "
        f"at p50: the door adds {added:.2f} ms (at most {TARGETS['door']:.0f})"
    )
    result = describe(options.seed) | {
        "config": CONFIG.to_dict(),
        "context": CONTEXT,
        "candidates": CANDIDATES,
        "threads": options.threads,
        "milliseconds": {**engines, "door": door},
    }
    print(f"raw samples: {store(options.name, result).relative_to(ROOT)}")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
