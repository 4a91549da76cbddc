"""Training learns, can be interrupted, and leaves a checkpoint that serves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.bundle import STORE_FILE
from mtgr.checkpoint import build_model, load_checkpoint
from mtgr.config import ModelConfig
from mtgr.data.dataset import BoolArray, Interactions
from mtgr.data.registry import DATASETS, DatasetEntry, find_dataset
from mtgr.data.split import chronological_split
from mtgr.errors import ConfigurationError
from mtgr.features.sqlite import SQLiteStore
from mtgr.model import MTGR
from mtgr.schema import FIRST_ID
from mtgr.training.__main__ import METRICS_FILE, main
from mtgr.training.batches import collate
from mtgr.training.loop import Trainer
from mtgr.training.losses import next_item_loss, task_loss
from mtgr.training.prepare import Part, PreparedData, frontier_weights, prepare
from mtgr.training.recipe import Recipe
from tests.unit.synthetic import LIKED, SyntheticDataset

CONFIG = ModelConfig(
    d_model=16, item_dim=8, feature_dim=4, head_dim=8, num_experts=2, dropout=0.1, embedding_dropout=0.1
)
RECIPE = Recipe(epochs=4, batch_tokens=512, learning_rate=1e-2, column_dropout=0.2, threads=1)


@pytest.fixture(scope="module")
def data() -> PreparedData:
    return prepare(SyntheticDataset(), LIKED, max_history=16, realtime_step=8)


def new_model(data: PreparedData) -> MTGR:
    torch.manual_seed(RECIPE.seed)
    return build_model(CONFIG, data.schema, data.catalog)


class ChangedDataset(SyntheticDataset):
    """The synthetic dataset with other actions in the events ``changed``, BOOL [E]."""

    def __init__(self, changed: BoolArray) -> None:
        super().__init__()
        self._changed = changed

    def interactions(self) -> Interactions:
        log = super().interactions()
        return dataclasses.replace(log, action=np.where(self._changed, 4 - log.action, log.action).astype(np.int32))


def fitted_on(data: PreparedData) -> list[bytes]:
    """All that a model is fitted on."""
    catalog = [getattr(data.catalog, field.name) for field in dataclasses.fields(data.catalog)]
    samples = [getattr(sample, field.name) for sample in data.train_samples() for field in dataclasses.fields(sample)]
    return [np.asarray(value).tobytes() for value in (*catalog, *samples)] + [data.schema.hash.encode()]


def test_parts_are_nested(data: PreparedData) -> None:
    log = SyntheticDataset().interactions()
    split = chronological_split(log, 40, 0.1, 0.2)
    np.testing.assert_array_equal(data.known, split.train | split.validation)
    assert len(data.interactions) == len(log)

    validation = prepare(SyntheticDataset(), LIKED, "validation", max_history=16, realtime_step=8)
    assert (data.part, validation.part) == ("test", "validation")
    np.testing.assert_array_equal(validation.interactions.time, log.time[~split.test])
    np.testing.assert_array_equal(validation.known, split.train[~split.test])
    for prepared in (data, validation):
        assert set(np.concatenate([sample.events for sample in prepared.held_out_samples()])) == set(
            np.flatnonzero(~prepared.known)
        )
        assert not prepared.known[prepared.last].any()


@pytest.mark.parametrize("part", ["validation", "test"])
def test_nothing_held_out_is_fitted_on(part: Part) -> None:
    split = chronological_split(SyntheticDataset().interactions(), 40, 0.1, 0.2)
    held_out = split.test if part == "test" else split.test | split.validation

    def fitted(dataset: SyntheticDataset) -> list[bytes]:
        return fitted_on(prepare(dataset, LIKED, part, max_history=16, realtime_step=8))

    expected = fitted(SyntheticDataset())
    assert fitted(ChangedDataset(held_out)) == expected
    assert fitted(ChangedDataset(~held_out)) != expected


def test_validation_knows_nothing_of_the_test_part() -> None:
    split = chronological_split(SyntheticDataset().interactions(), 40, 0.1, 0.2)
    one, other = (prepare(dataset, LIKED, "validation") for dataset in (SyntheticDataset(), ChangedDataset(split.test)))
    np.testing.assert_array_equal(one.interactions.action, other.interactions.action)
    for task, labels in one.labels.items():
        np.testing.assert_array_equal(labels, other.labels[task])


class InterruptedRunError(Exception):
    pass


def stop_after(epoch: int) -> Any:
    def after_epoch(finished: int, loss: float) -> None:
        if finished == epoch:
            raise InterruptedRunError

    return after_epoch


def test_loss_falls(data: PreparedData) -> None:
    losses: list[float] = []
    model = new_model(data)
    Trainer(model, data.train_samples(), RECIPE).train(lambda _, loss: losses.append(loss))
    assert len(losses) == RECIPE.epochs
    assert losses[-1] < losses[0] - 0.3
    assert not model.training


def test_the_average_is_kept(data: PreparedData) -> None:
    kept, last = new_model(data), new_model(data)
    samples = data.train_samples()
    Trainer(kept, samples, dataclasses.replace(RECIPE, epochs=1)).train()
    with pytest.raises(InterruptedRunError):
        Trainer(last, samples, dataclasses.replace(RECIPE, epochs=1)).train(stop_after(1))
    moved = [float((a - b).detach().abs().max()) for a, b in zip(kept.parameters(), last.parameters(), strict=True)]
    assert max(moved) > 1e-3


@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_equals_uninterrupted(data: PreparedData, tmp_path: Path, stop: int) -> None:
    samples = data.train_samples()
    whole = new_model(data)
    Trainer(whole, samples, RECIPE).train()

    with pytest.raises(InterruptedRunError):
        Trainer(new_model(data), samples, RECIPE, tmp_path / "state").train(stop_after(stop))
    resumed = new_model(data)
    trainer = Trainer(resumed, samples, RECIPE, tmp_path / "state")
    assert trainer.resume()
    assert trainer.epoch == stop
    trainer.train()
    for (name, expected), (_, got) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(expected, got), name


def test_nothing_to_resume(data: PreparedData, tmp_path: Path) -> None:
    assert not Trainer(new_model(data), data.train_samples(), RECIPE, tmp_path / "state").resume()


def test_state_of_another_run_is_refused(data: PreparedData, tmp_path: Path) -> None:
    samples = data.train_samples()
    state = tmp_path / "state"
    with pytest.raises(InterruptedRunError):
        Trainer(new_model(data), samples, RECIPE, state).train(stop_after(1))
    other_recipe = dataclasses.replace(RECIPE, learning_rate=2e-3)
    for trainer in (
        Trainer(new_model(data), samples, other_recipe, state),
        Trainer(new_model(data), samples[1:], RECIPE, state),
        Trainer(
            build_model(dataclasses.replace(CONFIG, dropout=0.0), data.schema, data.catalog), samples, RECIPE, state
        ),
    ):
        with pytest.raises(ConfigurationError, match="another run"):
            trainer.resume()


def queries_and_labels(data: PreparedData, model: MTGR) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(3, 5, CONFIG.item_dim, generator=generator), dim=-1)
    next_items = torch.randint(FIRST_ID, data.catalog.num_items, (3, 5), generator=generator)
    next_items[0, :2] = 0
    context_items = torch.randint(FIRST_ID, data.catalog.num_items, (3, 7), generator=generator)
    context_items[:, 0] = 0  # a profile token
    context_items[1, 3] = next_items[1, 2]  # a label is often among the context's items: later tokens hold it
    return queries, next_items, context_items


def full_softmax(model: MTGR, queries: Tensor, next_items: Tensor, context_items: Tensor) -> Tensor:
    """The loss item by item: cross-entropy over the label and everything that is not in the context."""
    losses = []
    for row, token in (next_items > 0).nonzero().tolist():
        label = int(next_items[row, token])
        allowed = [i for i in range(FIRST_ID, len(model.next_item_head.bias)) if i not in context_items[row].tolist()]
        items = torch.tensor([label, *(item for item in allowed if item != label)])
        logits = model.next_item_head(
            queries[row, token], model.embedding.item.all()[items], model.next_item_head.bias[items]
        )
        losses.append(F.cross_entropy(logits[None], torch.tensor([0])))
    return torch.stack(losses).mean()


def test_next_item_loss_with_all_negatives_is_the_full_softmax(data: PreparedData) -> None:
    model = new_model(data)
    torch.nn.init.normal_(model.next_item_head.bias)
    inputs = queries_and_labels(data, model)
    got = next_item_loss(model, *inputs, num_negatives=10_000, generator=torch.Generator())
    torch.testing.assert_close(got, full_softmax(model, *inputs))


def test_sampled_next_item_loss_estimates_the_full_softmax(data: PreparedData) -> None:
    # At a low temperature few items make the sum, and its logarithm is biased however it is sampled.
    model = build_model(dataclasses.replace(CONFIG, temperature=1.0), data.schema, data.catalog)
    inputs = queries_and_labels(data, model)
    generator = torch.Generator().manual_seed(0)
    sampled = [next_item_loss(model, *inputs, num_negatives=16, generator=generator) for _ in range(200)]
    assert torch.stack(sampled).mean().item() == pytest.approx(full_softmax(model, *inputs).item(), abs=0.03)
    assert torch.stack(sampled).std().item() > 0


def test_next_item_loss_survives_a_user_who_saw_everything(data: PreparedData) -> None:
    model = new_model(data)
    queries, next_items, _ = queries_and_labels(data, model)
    everything = torch.arange(data.catalog.num_items).expand(3, -1)
    loss = next_item_loss(model, queries, next_items, everything, 10_000, torch.Generator())
    loss.backward()
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_padding_has_no_loss(data: PreparedData) -> None:
    samples = sorted(data.train_samples(), key=lambda sample: len(sample.candidates))
    batch = collate([samples[0], samples[-1]])
    assert not batch.valid.all()
    logits = torch.zeros_like(batch.labels)
    changed = torch.where(batch.valid[..., None], logits, 9.0)
    losses = [task_loss(values, batch.labels, batch.weights, batch.valid) for values in (logits, changed)]
    assert losses[0] == losses[1]
    assert losses[0] > 0


def test_frontier_weights_gather_where_users_end(data: PreparedData) -> None:
    known = data.interactions.take(data.known)
    weights = frontier_weights(known, len(data.users))
    sums = np.bincount(known.user, weights)
    np.testing.assert_allclose(sums, sums[0], rtol=1e-4)
    for user in range(3):
        own = weights[known.user == user]
        assert (np.diff(own) >= 0).all()
        assert own[-1] > 10 * own[0]


def test_unknown_dataset() -> None:
    with pytest.raises(ConfigurationError, match="movielens-100k"):
        find_dataset("netflix")


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"learning_rate": 0.0}, {"column_dropout": 1.0}, {"weight_decay": -1.0}]
)
def test_bad_recipes(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        Recipe(**change)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setitem(DATASETS, "synthetic", DatasetEntry(SyntheticDataset, LIKED))
    paths = ["--output", str(tmp_path / "checkpoint"), "--state", str(tmp_path / "state")]
    return ["--dataset", "synthetic", "--epochs", "2", "--threads", "1", *paths]


def test_command_line(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    output = tmp_path / "checkpoint"
    assert not (tmp_path / "state").exists()
    table = capsys.readouterr().out
    for word in ("GAUC engagement", "HR@10", "NDCG@10", "MTGR minus item-kNN"):
        assert word in table
    checkpoint = load_checkpoint(output)
    metrics = json.loads((output / METRICS_FILE).read_text(encoding="utf-8"))
    assert checkpoint.record["metrics"] == metrics
    assert set(metrics["scores"]) == {"MTGR", "popularity", "item rate", "item-kNN"}
    difference = metrics["differences"]["item-kNN"]["AUC engagement"]
    scores = metrics["scores"]
    expected = scores["MTGR"]["AUC engagement"] - scores["item-kNN"]["AUC engagement"]
    assert difference["difference"] == pytest.approx(expected)
    assert difference["low"] <= difference["difference"] <= difference["high"]

    store, log = SQLiteStore(output / STORE_FILE), SyntheticDataset().interactions()
    record = store.get("user-7")
    assert record is not None
    assert record.profile == {"age": 27, "kind": "b"}
    np.testing.assert_array_equal(record.items, log.item[log.user == 7])
    np.testing.assert_array_equal(record.actions, log.action[log.user == 7])
    assert len(store.user_ids()) == 40

    # The same command has nothing to do; another one must not replace what is there unasked.
    before = (output / "config.json").stat().st_mtime_ns
    assert main(command) == 0
    assert "up to date" in capsys.readouterr().out
    assert main([*command, "--seed", "5"]) == 1
    assert "--force" in capsys.readouterr().err
    assert (output / "config.json").stat().st_mtime_ns == before
    assert main([*command, "--seed", "5", "--force"]) == 0
    assert load_checkpoint(output).hash != checkpoint.hash


def test_options_reach_the_recipe(command: list[str], tmp_path: Path) -> None:
    extra = ["--accumulate", "2", "--precision", "bf16", "--stochastic-length", "1.5", "--temperature", "0.1"]
    assert main([*command, *extra, "--activation-checkpointing", "--save-every", "3", "--num-negatives", "7"]) == 0
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    assert isinstance(checkpoint.config, ModelConfig)
    assert checkpoint.config.temperature == 0.1
    recipe = checkpoint.record["recipe"]
    assert (recipe["accumulate"], recipe["precision"], recipe["stochastic_length"]) == (2, "bf16", 1.5)
    assert (recipe["activation_checkpointing"], recipe["save_every"], recipe["num_negatives"]) == (True, 3, 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU to train on")
def test_training_on_a_gpu_that_is_not_there(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--device", "cuda"]) == 1
    assert "--device cpu" in capsys.readouterr().err


def test_validating_writes_nothing(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--validate"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("validation")
    assert "MTGR minus item-kNN" in table
    assert list(tmp_path.iterdir()) == []


def test_command_line_resumes(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    expected = load_checkpoint(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint")

    save = Trainer._save

    def save_and_interrupt(trainer: Trainer, directory: Path) -> None:
        save(trainer, directory)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", save_and_interrupt)
        assert main(command) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()
    assert main([*command, "--resume"]) == 0
    assert "resuming after epoch 1 of 2" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "checkpoint").hash == expected.hash
