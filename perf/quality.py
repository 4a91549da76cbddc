"""The table of quality: MTGR, its ablations and its peers on one split of one dataset: ``python -m perf.quality``.

One JSON a cell (model and seed), written when the cell is done, so that an interrupted run goes on where it stopped,
within a cell after its last epoch. The table is made of the cells that are there.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mtgr.data.dataset import Dataset
from mtgr.data.registry import DATASETS, find_dataset
from mtgr.errors import MTGRError
from mtgr.evaluation.quality import BASELINES, score_baseline, score_trained
from mtgr.files import read_json, write_json
from mtgr.peers.zoo import MODELS, find_model
from mtgr.training.loop import Trainer
from mtgr.training.prepare import PreparedData, prepare
from mtgr.training.recipes import QualityRecipe, find_recipe

COLUMNS = ("HR@10", "NDCG@10", "AUC engagement", "GAUC engagement")
PEERS = ("mtgr", "hstu", "sasrec", "dlrm", *BASELINES)
ABLATIONS = tuple(name for name in MODELS if name.startswith("mtgr-"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parse(arguments)
    try:
        recipe = find_recipe(options.dataset)
        if options.epochs:
            recipe = recipe.with_epochs(options.epochs)
        run(options, recipe)
    except MTGRError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.quality", description="Train the peers and print the table.")
    parser.add_argument("--dataset", choices=list(DATASETS), default="movielens-100k")
    parser.add_argument("--protocol", choices=("chronological", "leave-one-out", "temporal"), default="chronological")
    parser.add_argument("--models", nargs="+", choices=[*PEERS, *ABLATIONS], default=[*PEERS, *ABLATIONS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=0, help="instead of the recipe's")
    parser.add_argument("--validate", action="store_true", help="score the validation part, to choose settings")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=Path("build/quality"), help="where cells are kept")
    parser.add_argument("--result", type=Path, help="JSON of all cells; by default quality.json beside them")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, recipe: QualityRecipe) -> None:
    """Fill in the cells that are missing and print the table."""
    torch.set_num_threads(recipe.training.threads)
    entry = find_dataset(options.dataset)
    dataset = entry.factory()
    data = prepare(
        dataset,
        entry.liked_action,
        "validation" if options.validate else "test",
        recipe.max_history,
        recipe.realtime_step,
        options.protocol,
    )
    settings = {"dataset": options.dataset, "protocol": options.protocol, "part": data.part} | recipe.to_dict()
    result = options.result or options.output / "quality.json"
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    # Seed by seed, so that an unfinished table compares all models.
    for seed in options.seeds:
        for name in options.models:
            if name in BASELINES and seed != options.seeds[0]:
                continue  # nothing in them is random
            path = folder / f"{name}-{seed}.json"
            if not _is_done(path, settings):
                write_json(path, {"settings": settings} | _cell(name, seed, data, dataset, recipe, options))
            _write_result(result, settings, folder, options)
    print(table(read_json(result)["cells"]))


def _cell(
    name: str, seed: int, data: PreparedData, dataset: Dataset, recipe: QualityRecipe, options: argparse.Namespace
) -> dict[str, Any]:
    started = time.monotonic()
    if name in BASELINES:
        return {
            "model": name,
            "label": BASELINES[name],
            "seed": seed,
            "scores": score_baseline(name, data, dataset.tasks()),
            "seconds": round(time.monotonic() - started, 1),
        }
    spec = find_model(name)
    own = data.with_schema(spec.schema(data.schema))
    training = recipe.training.with_seed(seed)
    torch.manual_seed(seed)
    model = spec.build(recipe.model, own.schema, own.catalog).to(options.device)
    state = options.output / f"state-{name}-{seed}"
    trainer = Trainer(model, own.train_samples(), training, state)
    trainer.resume()
    epochs: list[float] = []
    trainer.train(lambda _, loss: epochs.append(round(loss, 4)))
    trained = time.monotonic()
    scores = score_trained(model, own)
    shutil.rmtree(state, ignore_errors=True)
    return {
        "model": name,
        "label": spec.label,
        "seed": seed,
        "scores": scores,
        "config": spec.config(recipe.model).to_dict(),
        "losses": epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_seconds": round(trained - started, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def _is_done(path: Path, settings: dict[str, Any]) -> bool:
    return path.is_file() and read_json(path).get("settings") == settings


def _write_result(result: Path, settings: dict[str, Any], folder: Path, options: argparse.Namespace) -> None:
    cells = [read_json(path) for path in sorted(folder.glob("*-*.json"))]
    cells = [cell for cell in cells if cell.pop("settings", None) == settings]
    write_json(
        result,
        {
            "schema": "mtgr-quality/1",
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": f"python -m perf.quality --dataset {options.dataset} --protocol {options.protocol}",
            "git_revision": _git_revision(),
            "versions": {"python": platform.python_version()} | {p: version(p) for p in ("mtgr", "numpy", "torch")},
            "settings": settings,
            "cells": cells,
        },
    )


def _git_revision() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def table(cells: Iterable[dict[str, Any]]) -> str:
    """Markdown: a line a model, mean and standard deviation over seeds."""
    by_model: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        by_model.setdefault(cell["model"], []).append(cell)
    lines = ["| model | " + " | ".join(COLUMNS) + " | seeds |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in (*PEERS, *ABLATIONS):
        if name in by_model:
            own = by_model[name]
            shown = (_mean([cell["scores"][column] for cell in own]) for column in COLUMNS)
            lines.append(f"| {own[0]['label']} | " + " | ".join(shown) + f" | {len(own)} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    sys.exit(main())
