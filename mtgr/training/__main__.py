"""Train a checkpoint from a dataset: ``python -m mtgr.training``."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mtgr.bundle import STORE_FILE
from mtgr.checkpoint import CONFIG_FILE, Checkpoint, build_model, save_checkpoint
from mtgr.config import preset, preset_names
from mtgr.data.registry import DATASETS, find_dataset
from mtgr.errors import ConfigurationError, MTGRError, UnavailableError
from mtgr.features.modalities import describe, read_modalities
from mtgr.features.sqlite import write_store
from mtgr.features.store import UserRecord
from mtgr.files import read_json, replaced_directory, write_json
from mtgr.schema import ROW_FORMAT
from mtgr.training.evaluate import evaluate
from mtgr.training.loop import PROGRESS_FILE, Trainer
from mtgr.training.parallel import Workers
from mtgr.training.prepare import PreparedData, prepare
from mtgr.training.recipe import Recipe

METRICS_FILE = "metrics.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parse(arguments)
    try:
        _run(options)
    except MTGRError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on after the last finished epoch.", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mtgr.training", description="Train a checkpoint and evaluate it.")
    parser.add_argument("--dataset", choices=list(DATASETS), default="movielens-100k")
    parser.add_argument("--output", type=Path, default=Path("build/checkpoint"), help="checkpoint directory to write")
    parser.add_argument("--preset", choices=preset_names(), default="tiny", help="size of the network")
    parser.add_argument("--state", type=Path, default=Path("build/training-state"), help="where epochs are kept")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same settings")
    parser.add_argument("--force", action="store_true", help="train even if the checkpoint is there")
    parser.add_argument(
        "--validate", action="store_true", help="fit without the validation part, score it, and write no checkpoint"
    )
    defaults = Recipe()
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--batch-tokens", type=int, default=defaults.batch_tokens)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=defaults.threads, help="threads of PyTorch")
    parser.add_argument("--num-negatives", type=int, default=defaults.num_negatives, help="of the next-item loss")
    parser.add_argument("--accumulate", type=int, default=defaults.accumulate, help="micro-batches in a step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=defaults.precision, help="of the computation")
    parser.add_argument("--activation-checkpointing", action="store_true", help="compute blocks again going backwards")
    parser.add_argument(
        "--stochastic-length", type=float, default=0.0, metavar="ALPHA", help="in (1, 2): thin long histories (HSTU)"
    )
    parser.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="keep the state within epochs too")
    parser.add_argument("--temperature", type=float, help="of the next-item head, instead of the preset's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--modality",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="item embeddings (docs/multimodal.md): FILE.safetensors, or FILE.npy:IDS.npy; may be repeated",
    )
    parser.add_argument("--modality-precision", choices=("fp32", "fp16"), default="fp32", help="they are stored in")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> None:
    device = _device(options.device)
    workers = Workers.join(on_gpus=device.type == "cuda")
    try:
        _train(options, device, workers)
    finally:
        workers.leave()


def _train(options: argparse.Namespace, device: torch.device, workers: Workers) -> None:
    names = {field.name for field in dataclasses.fields(Recipe)}
    recipe = Recipe(**{key: value for key, value in vars(options).items() if key in names})
    config = preset(options.preset, **({} if options.temperature is None else {"temperature": options.temperature}))
    embeddings = read_modalities(options.modality)
    config = dataclasses.replace(config, modalities=describe(embeddings, options.modality_precision))
    made_of = {"dataset": options.dataset, "model": config.to_dict(), "recipe": recipe.to_dict(), "rows": ROW_FORMAT}
    if embeddings:
        made_of["modalities"] = {name: matrix.hash for name, matrix in embeddings.items()}
    _check_replaceable(options.output, CONFIG_FILE)
    _check_replaceable(options.state, PROGRESS_FILE)
    if not options.force and not options.validate and _is_made(options.output, made_of):
        if workers.leads:
            print(f"{options.output} is up to date; --force trains it again.")
        return

    started = time.monotonic()
    if workers.leads:
        print(f"preparing {options.dataset}", file=sys.stderr)
    entry = find_dataset(options.dataset)
    dataset = entry.factory()
    data = prepare(dataset, entry.liked_action, "validation" if options.validate else "test")
    torch.manual_seed(recipe.seed)
    model = build_model(config, data.schema, data.catalog)
    if model.embedding.item.modalities is not None:
        model.embedding.item.modalities.fill(embeddings, data.catalog)
    model.to(device)
    trainer = Trainer(model, data.train_samples(), recipe, options.state, workers)
    if options.resume and trainer.resume() and workers.leads:
        print(f"resuming after epoch {trainer.epoch} of {recipe.epochs}", file=sys.stderr)
    trained = time.monotonic()
    trainer.train()
    training_seconds = time.monotonic() - trained
    if not workers.leads:
        return

    print("evaluating against the baselines", file=sys.stderr)
    report = evaluate(model, data, dataset.tasks())
    if not options.validate:
        record = made_of | {
            "metrics": report.to_dict(),
            "training_seconds": round(training_seconds, 1),
            "versions": {"python": platform.python_version()} | {p: version(p) for p in ("mtgr", "numpy", "torch")},
        }
        with replaced_directory(options.output) as staging:
            save_checkpoint(Checkpoint(model.cpu(), config, data.schema, data.catalog, record), staging)
            write_json(staging / METRICS_FILE, report.to_dict())
            write_store(staging / STORE_FILE, _records(data))
    shutil.rmtree(options.state, ignore_errors=True)
    print(report.table())
    print(
        f"\n{'nothing written' if options.validate else options.output}: "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{training_seconds:.0f} s of training, {time.monotonic() - started:.0f} s in all"
    )


def _device(name: str) -> torch.device:
    """The device to train on; of several GPUs the process's own.

    Raises:
        UnavailableError: If there is no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("there is no GPU that PyTorch can use; train with --device cpu.")
    return torch.device(name)


def _check_replaceable(directory: Path, marker: str) -> None:
    """Refuse a directory that this command did not write: it would be replaced as a whole.

    Raises:
        ConfigurationError: If it holds files, but no ``marker``.
    """
    if directory.exists() and not (
        directory.is_dir() and ((directory / marker).is_file() or not any(directory.iterdir()))
    ):
        raise ConfigurationError(
            f"{directory} was not written by training and would be replaced; name another directory."
        )


def _is_made(output: Path, made_of: dict[str, Any]) -> bool:
    """Whether ``output`` holds a checkpoint made of the same settings.

    Raises:
        ConfigurationError: If it holds something else, which training would replace.
    """
    if not output.exists():
        return False
    record = read_json(output / CONFIG_FILE).get("record", {}) if (output / CONFIG_FILE).is_file() else {}
    if any(record.get(key) != value for key, value in made_of.items()):
        raise ConfigurationError(
            f"{output} holds a checkpoint of other settings; replace it with --force, or give another --output."
        )
    return True


def _records(data: PreparedData) -> Iterator[tuple[str, UserRecord]]:
    """Every user's profile and whole log, for the demo's feature store."""
    offsets = data.interactions.offsets(len(data.users))
    for index, user in enumerate(data.users):
        own = slice(int(offsets[index]), int(offsets[index + 1]))
        log = data.interactions
        yield user.id, UserRecord(user.profile, log.item[own], log.action[own], log.time[own])


if __name__ == "__main__":
    sys.exit(main())
