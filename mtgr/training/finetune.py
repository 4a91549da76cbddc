"""Adapt a checkpoint to a new domain: ``python -m mtgr.training.finetune``.

The item table grows by the items that the checkpoint does not know, the parameters go on from where they are, each
group at its own learning rate, and the held-out events of the new items are scored before and after.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mtgr.bundle import STORE_FILE
from mtgr.checkpoint import CONFIG_FILE, Checkpoint, build_model, load_checkpoint, save_checkpoint
from mtgr.config import ModelConfig, preset, preset_names
from mtgr.data.dataset import Dataset
from mtgr.data.registry import DATASETS, find_dataset
from mtgr.data.samples import Sample
from mtgr.errors import ConfigurationError, MTGRError
from mtgr.features.modalities import read_modalities
from mtgr.features.sqlite import write_store
from mtgr.features.store import UserRecord
from mtgr.files import read_json, replaced_directory, write_json
from mtgr.model import MTGR
from mtgr.training.adaptation import Domain, Scored, compare, domains_of, score, table
from mtgr.training.domain import GrownDataset, NarrowedDataset
from mtgr.training.growth import grown_model, grown_schema
from mtgr.training.loop import Trainer
from mtgr.training.prepare import PreparedData, prepare
from mtgr.training.recipe import Recipe

Group = Literal["items", "heads", "trunk"]

METRICS_FILE = "metrics.json"

# Shorter than training: only the new items start from nothing. Their group's rate is the peak given here.
_RECIPE = Recipe(epochs=3, learning_rate=2e-3, weight_decay=0.1)
_DEMO_DATASET, _DEMO_CATEGORY = "movielens-100k", "Sci-Fi"
_DEMO_EPOCHS = 4


@dataclass(frozen=True)
class GroupRates:
    """Learning rates of the parameter groups, as shares of the recipe's; a group of rate 0 is frozen.

    Attributes:
        items: What belongs to single items: their table, content and biases.
        heads: What turns outputs into scores.
        trunk: All else: embeddings of the other columns, and the blocks.
    """

    items: float = 1.0
    heads: float = 0.3
    trunk: float = 0.1

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: If one is negative or no number, or nothing is left to train.
        """
        rates = dataclasses.astuple(self)
        if not all(np.isfinite(rate) and rate >= 0 for rate in rates) or not any(rates):
            raise ConfigurationError("learning-rate groups: rates must not be negative, and one of them positive.")

    def rate(self, group: Group) -> float:
        """The share of a group."""
        return float(getattr(self, group))


def group_of(parameter: str) -> Group:
    """The learning-rate group of a parameter, by its name in the network."""
    if parameter.startswith(("embedding.item.", "wide_terms.")) or parameter == "next_item_head.bias":
        return "items"
    return "heads" if parameter.startswith(("task_heads.", "next_item_head.")) else "trunk"


def fine_tune(
    model: MTGR,
    samples: Sequence[Sample],
    recipe: Recipe,
    rates: GroupRates,
    after_epoch: Callable[[int, float], None] | None = None,
) -> None:
    """Go on training a model in place; frozen groups keep every bit.

    Args:
        model: The network.
        samples: Training samples.
        recipe: Settings; its learning rate is that of a group of rate 1.
        rates: The groups' shares of it.
        after_epoch: Called with the number of finished epochs and the epoch's mean loss.
    """
    trainer = Trainer(model, samples, recipe)
    groups: dict[tuple[Group, bool], list[torch.nn.Parameter]] = {}
    frozen: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        group = group_of(name)
        if rates.rate(group):
            groups.setdefault((group, parameter.ndim > 1), []).append(parameter)
        else:
            parameter.requires_grad_(False)
            frozen.append(parameter)
    trainer.optimizer = torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": recipe.weight_decay if is_matrix else 0.0,
                "share": rates.rate(group),
            }
            for (group, is_matrix), parameters in groups.items()
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    # The trainer sets one learning rate for all before every step.
    hook = trainer.optimizer.register_step_pre_hook(_apply_shares)
    try:
        trainer.train(after_epoch)
    finally:
        hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)


def _apply_shares(optimizer: torch.optim.Optimizer, *unused: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= group["share"]


def adapt_data(dataset: Dataset, parent: Checkpoint) -> PreparedData:
    """The dataset split as for training, with the parent's rows and both catalogues' items.

    Raises:
        ConfigurationError: If the parent cannot express it.
    """
    merged = GrownDataset(dataset, parent.schema, parent.catalog)
    data = prepare(merged, parent.schema.liked_action)
    return dataclasses.replace(data, schema=grown_schema(parent.schema, data))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parse(arguments)
    try:
        if options.demo:
            _make_parent(options)
        _run(options)
    except MTGRError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mtgr.training.finetune", description="Adapt a checkpoint to new items, and show what it gains."
    )
    parser.add_argument("--parent", type=Path, help="checkpoint to start from (default: build/checkpoint)")
    parser.add_argument("--dataset", choices=list(DATASETS), default=_DEMO_DATASET, help="the log and items of today")
    parser.add_argument("--output", type=Path, default=Path("build/finetuned"), help="checkpoint directory to write")
    parser.add_argument("--freeze", choices=("nothing", "trunk"), default="nothing", help="what keeps its parameters")
    rates = GroupRates()
    parser.add_argument("--items-rate", type=float, default=rates.items, help="share of the learning rate for items")
    parser.add_argument("--heads-rate", type=float, default=rates.heads, help="the same for the heads")
    parser.add_argument("--trunk-rate", type=float, default=rates.trunk, help="the same for the rest")
    parser.add_argument(
        "--modality",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="item embeddings: FILE.safetensors with vectors and ids, or FILE.npy:IDS.npy; may be repeated",
    )
    parser.add_argument(
        "--compare", action="store_true", help="also the other way to freeze, and training from scratch"
    )
    parser.add_argument("--epochs", type=int, default=_RECIPE.epochs)
    parser.add_argument("--learning-rate", type=float, default=_RECIPE.learning_rate)
    parser.add_argument("--seed", type=int, default=_RECIPE.seed)
    parser.add_argument("--threads", type=int, default=_RECIPE.threads, help="threads of PyTorch")
    parser.add_argument("--demo", action="store_true", help="first train a parent without the items of a category")
    parser.add_argument("--category", action="append", help=f"what the demo holds back (default: {_DEMO_CATEGORY})")
    parser.add_argument("--preset", choices=preset_names(), default="tiny", help="size of the demo's network")
    parser.add_argument("--parent-epochs", type=int, default=_DEMO_EPOCHS, help="epochs of the demo's parent")
    options = parser.parse_args(arguments)
    if options.parent is None:
        options.parent = Path("build/finetune-parent" if options.demo else "build/checkpoint")
    return options


def _run(options: argparse.Namespace) -> None:
    started = time.monotonic()
    recipe = dataclasses.replace(
        _RECIPE,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        seed=options.seed,
        threads=options.threads,
    )
    trunk = 0.0 if options.freeze == "trunk" else options.trunk_rate
    rates = GroupRates(options.items_rate, options.heads_rate, trunk)
    embeddings = read_modalities(options.modality)
    check_replaceable(options.output)
    if options.output.resolve() == options.parent.resolve():
        raise ConfigurationError(f"{options.parent} is the parent and would be replaced; name another --output.")
    parent = load_checkpoint(options.parent)
    torch.set_num_threads(recipe.threads)
    _say(f"preparing {options.dataset}")
    dataset = find_dataset(options.dataset).factory()
    data = adapt_data(dataset, parent)
    domains = domains_of(data, parent)
    model = grown_model(parent, data.schema, data.catalog, embeddings)
    grown = model.next_item_head.bias.numel() - parent.schema.num_items
    _say(f"{grown} new items beside {len(parent.catalog.raw_ids)} known ones; scoring the checkpoint as it is")
    stages = {"before": [score(model, data, domain) for domain in domains]}
    samples = data.train_samples()
    if options.compare:
        stages |= _others(model, data, domains, samples, recipe, rates)
    label = "trunk frozen" if trunk == 0 else "fine-tuned"
    _say(f"fine-tuning ({label})")
    trained = time.monotonic()
    fine_tune(model, samples, recipe, rates)
    seconds = time.monotonic() - trained
    stages[label] = [score(model, data, domain) for domain in domains]
    adaptations = [
        compare(data, domain, {stage: scored[index] for stage, scored in stages.items()})
        for index, domain in enumerate(domains)
    ]
    metrics = {adaptation.domain: adaptation.to_dict() for adaptation in adaptations}
    record = {
        "dataset": options.dataset,
        "parent": {"hash": parent.hash, "path": str(options.parent), "record": _summary(parent.record)},
        "new_items": grown,
        "modalities": {name: matrix.hash for name, matrix in embeddings.items()},
        "recipe": recipe.to_dict(),
        "rates": dataclasses.asdict(rates),
        "metrics": metrics,
        "training_seconds": round(seconds, 1),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("mtgr", "numpy", "torch")},
    }
    with replaced_directory(options.output) as staging:
        save_checkpoint(Checkpoint(model, model.config, data.schema, data.catalog, record), staging)
        write_json(staging / METRICS_FILE, metrics)
        _write_store(staging / STORE_FILE, data)
    print(table(adaptations))
    print(f"\n{options.output}: {seconds:.0f} s of fine-tuning, {time.monotonic() - started:.0f} s in all")


def _others(
    model: MTGR,
    data: PreparedData,
    domains: Sequence[Domain],
    samples: Sequence[Sample],
    recipe: Recipe,
    rates: GroupRates,
) -> dict[str, list[Scored]]:
    """The same data and recipe for a network that starts from nothing, and for the other way to freeze."""
    stages = {}
    torch.manual_seed(recipe.seed)
    fresh = build_model(model.config, data.schema, data.catalog)
    for (name, tensor), known in zip(fresh.named_buffers(), model.buffers(), strict=True):
        if name.endswith(".vectors"):
            tensor.copy_(known)
    other = dataclasses.replace(rates, trunk=GroupRates().trunk if rates.trunk == 0 else 0.0)
    label = "trunk frozen" if other.trunk == 0 else "fine-tuned"
    for name, network, shares in (("from scratch", fresh, GroupRates(1, 1, 1)), (label, copy.deepcopy(model), other)):
        _say(f"training for comparison ({name})")
        fine_tune(network, samples, recipe, shares)
        stages[name] = [score(network, data, domain) for domain in domains]
    return stages


def _make_parent(options: argparse.Namespace) -> None:
    """Train the demo's parent: on the events that adaptation may know, without the items of some categories.

    Raises:
        ConfigurationError: If there is another checkpoint in its place.
    """
    entry = find_dataset(options.dataset)
    dataset = entry.factory()
    categories = sorted(options.category or [_DEMO_CATEGORY])
    recipe = dataclasses.replace(Recipe(), epochs=options.parent_epochs, seed=options.seed, threads=options.threads)
    made_of = {
        "dataset": options.dataset,
        "without": categories,
        "model": preset(options.preset).to_dict(),
        "recipe": recipe.to_dict(),
    }
    if (options.parent / CONFIG_FILE).is_file():
        record = load_checkpoint(options.parent).record
        if any(record.get(key) != value for key, value in made_of.items()):
            raise ConfigurationError(f"{options.parent} is another checkpoint; remove it, or name another --parent.")
        return
    check_replaceable(options.parent)
    # What is held out of the whole log is held out here, too.
    narrowed = NarrowedDataset(dataset, categories, prepare(dataset, entry.liked_action).known)
    _say(f"training a parent on {narrowed.name} ({len(narrowed.items())} items)")
    data = prepare(narrowed, entry.liked_action)
    config: ModelConfig = preset(options.preset)
    torch.manual_seed(recipe.seed)
    model = build_model(config, data.schema, data.catalog)
    Trainer(model, data.train_samples(), recipe).train()
    with replaced_directory(options.parent) as staging:
        save_checkpoint(Checkpoint(model, config, data.schema, data.catalog, made_of), staging)
        _write_store(staging / STORE_FILE, data)


def check_replaceable(directory: Path) -> None:
    """Refuse a directory that this command did not write: it would be replaced as a whole.

    Raises:
        ConfigurationError: If it holds anything but a checkpoint that names its parent.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    config = directory / CONFIG_FILE
    values = read_json(config) if config.is_file() else {}
    if "parent" not in values.get("record", {}):
        raise ConfigurationError(
            f"{directory} was not written by fine-tuning and would be replaced; name another directory."
        )


def _write_store(path: Path, data: PreparedData) -> None:
    """Every user's profile and log, for a feature store."""
    offsets, log = data.interactions.offsets(len(data.users)), data.interactions
    slices = [slice(int(start), int(end)) for start, end in pairwise(offsets)]
    write_store(
        path,
        (
            (user.id, UserRecord(user.profile, log.item[own], log.action[own], log.time[own]))
            for user, own in zip(data.users, slices, strict=True)
        ),
    )


def _summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """A parent's record without its metrics, which stand beside the parent."""
    return {key: value for key, value in record.items() if key not in ("metrics", "differences")}


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
