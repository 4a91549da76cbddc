"""``python -m perf.int8_cpu``: INT8 graphs against fp32 ones in ONNX Runtime on a CPU, speed and ranking in one run.

Speed is of the ranking graph of random networks of several sizes, and of a trained checkpoint; ranking is of the
trained checkpoint, on held-out requests of its dataset. Rounds of all graphs are interleaved, so that noise falls on
all alike.
"""

from __future__ import annotations

import argparse
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
import torch

from export.agreement import check_graph
from export.differences import SHAPES
from export.onnx import calibration_inputs
from export.onnx_graphs import graph_of
from export.quantize import quantize_for_cpu, quantize_for_tensorrt
from export.requests import real_requests
from export.rows import random_rows
from export.trace import save_graph
from mtgr.checkpoint import Checkpoint, load_checkpoint
from mtgr.config import preset
from mtgr.engines.onnx import OnnxEngine
from perf.record import describe, store
from perf.repository import CONFIG
from perf.synthetic import synthetic_checkpoint

CONTEXT, CANDIDATES = 512, 64
TARGET_SPEED, TARGET_SPEARMAN = 1.15, 0.99
MODEL = "mtgr_onnx_rank"


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if the targets are met, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m perf.int8_cpu", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/checkpoint"))
    parser.add_argument("--network", action="append", help="bench, or a preset; by default bench, small and medium")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="int8-cpu", help="file name in perf/results")
    parser.add_argument("--output", type=Path, help="file to write instead")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    trained = load_checkpoint(options.checkpoint)
    with graphs(trained, options.seed) as paths:
        print("trained checkpoint ...", flush=True)
        ranking = {name: compare_ranking(path, trained, options.requests, options.seed) for name, path in paths.items()}
        speed = {"trained": compare_speed(paths, trained, options)}
    for name in options.network or ("bench", "small", "medium"):
        print(f"{name} ...", flush=True)
        config = CONFIG if name == "bench" else preset(name)
        network = synthetic_checkpoint(config, num_items=20_000, seed=options.seed)
        with graphs(network, options.seed) as paths:
            speed[name] = compare_speed(paths, network, options)
    result = describe(options.seed) | {"threads": options.threads, "ranking": ranking, "milliseconds": speed}
    result["ratios"] = {
        network: {
            batch: {
                name: statistics.median(samples["fp32"]) / statistics.median(samples[name])
                for name in samples
                if name != "fp32"
            }
            for batch, samples in batches.items()
        }
        for network, batches in speed.items()
    }
    print(json.dumps({"ratios": result["ratios"], "ranking": ranking}, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    else:
        store(options.name, result)
    fast = [network["batch 1"]["int8"] for name, network in result["ratios"].items() if name != "trained"]
    return 0 if min(fast) >= TARGET_SPEED and ranking["int8"]["spearman"] >= TARGET_SPEARMAN else 1


@contextmanager
def graphs(checkpoint: Checkpoint, seed: int) -> Iterator[dict[str, Path]]:
    """Ranking graphs in fp32, in INT8 as the onnx strategy has it, and in INT8 as TensorRT has it."""
    graph = graph_of(checkpoint, MODEL)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("fp32", "int8", "int8-qdq")}
        rows = random_rows(checkpoint.schema, checkpoint.catalog, 2, 40, 12, np.random.default_rng(seed))
        save_graph(graph.module, paths["fp32"], rows, graph)
        quantize_for_cpu(paths["fp32"], paths["int8"])
        requests = real_requests(checkpoint, 64, seed)
        quantize_for_tensorrt(paths["fp32"], paths["int8-qdq"], calibration_inputs(checkpoint, requests, seed))
        yield paths


def compare_ranking(path: Path, checkpoint: Checkpoint, count: int, seed: int) -> dict[str, Any]:
    """Error, rank correlation and AUC beside the reference's."""
    graph = graph_of(checkpoint, MODEL)
    requests = real_requests(checkpoint, count, seed).held_out
    return check_graph(graph, path, checkpoint, SHAPES, seed, requests).to_dict() | {"requests": len(requests)}


def compare_speed(
    paths: dict[str, Path], checkpoint: Checkpoint, options: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by batch size and graph; every context has all its tokens."""
    engines = {name: OnnxEngine(path, options.threads) for name, path in paths.items()}
    generator = np.random.default_rng(options.seed)
    samples: dict[str, dict[str, list[float]]] = {}
    for batch in (1, 8):
        users = [
            random_rows(checkpoint.schema, checkpoint.catalog, 1, CONTEXT, CANDIDATES, generator) for _ in range(batch)
        ]
        inputs = {
            "context": np.concatenate([context.numpy() for context, _ in users]),
            "candidates": np.concatenate([candidates.numpy() for _, candidates in users]),
        }
        times: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(options.rounds + 1):
            for name, engine in engines.items():
                start = time.perf_counter()
                engine.infer(inputs, ["task_scores"])
                if number:  # the first one warms up
                    times[name].append((time.perf_counter() - start) * 1e3)
        samples[f"batch {batch}"] = times
    return samples


if __name__ == "__main__":
    sys.exit(main())
