"""A checkpoint adapted to new items: it keeps what it knows, learns what is new, and says where it comes from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtgr.bundle import STORE_FILE
from mtgr.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from mtgr.config import ModelConfig
from mtgr.data.dataset import Interactions, Task
from mtgr.data.registry import DATASETS, DatasetEntry
from mtgr.errors import ConfigurationError
from mtgr.features.modalities import ItemEmbeddings, describe
from mtgr.features.sqlite import SQLiteStore
from mtgr.model import MTGR
from mtgr.model.modalities import ItemModalities
from mtgr.schema import FIRST_COLUMN, FIRST_ID, SLOT_COLUMN, TYPE_COLUMN, TokenType
from mtgr.training import finetune
from mtgr.training.adaptation import NEW_ITEMS, OTHER_ITEMS, Domain, compare, domains_of, score, table
from mtgr.training.domain import GrownDataset, NarrowedDataset, catalog_items
from mtgr.training.finetune import GroupRates, adapt_data, fine_tune, group_of, main
from mtgr.training.growth import NEW, grown_model, parent_ids
from mtgr.training.prepare import PreparedData, prepare
from mtgr.training.recipe import Recipe
from tests.unit.synthetic import LIKED, SyntheticDataset

CONFIG = ModelConfig(d_model=16, item_dim=8, feature_dim=4, head_dim=8, num_experts=2)
RECIPE = Recipe(epochs=2, batch_tokens=512, learning_rate=1e-2, weight_decay=0.0, threads=1)
HELD_BACK = "third"


def randomised(model: MTGR) -> MTGR:
    """Also what starts at zero has a value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("wide_terms.") or name == "next_item_head.bias":
                parameter.normal_(std=0.3)
    return model.eval()


def make_parent(modalities: dict[str, ItemEmbeddings] | None = None, held_back: str = HELD_BACK) -> Checkpoint:
    """A random network on the items that are not held back."""
    data = prepare(NarrowedDataset(SyntheticDataset(), [held_back]), LIKED, max_history=16, realtime_step=8)
    config = dataclasses.replace(CONFIG, modalities=describe(modalities or {}))
    torch.manual_seed(0)
    model = randomised(build_model(config, data.schema, data.catalog))
    if modalities:
        item_modalities(model).fill(modalities, data.catalog)
    return Checkpoint(model, config, data.schema, data.catalog, {"dataset": "narrowed"}, "parent's hash")


def item_modalities(model: Any) -> ItemModalities:
    found = model.embedding.item.modalities
    assert isinstance(found, ItemModalities)
    return found


@pytest.fixture(scope="module")
def parent() -> Checkpoint:
    return make_parent()


@pytest.fixture(scope="module")
def data(parent: Checkpoint) -> PreparedData:
    return adapt_data(SyntheticDataset(), parent)


def known_rows(parent: Checkpoint, data: PreparedData) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Context and candidate rows of known items only, as the parent has them and as the grown model does."""
    generator = np.random.default_rng(1)
    schema = parent.schema
    raw = generator.choice(parent.catalog.raw_ids, 30)
    context = np.zeros((1, 20, schema.width), dtype=np.int32)
    context[..., TYPE_COLUMN] = [TokenType.HISTORY] * 12 + [TokenType.REALTIME] * 8
    candidates = np.zeros((1, 10, schema.width), dtype=np.int32)
    candidates[..., TYPE_COLUMN] = TokenType.CANDIDATE
    rows = np.concatenate([context, candidates], axis=1)
    rows[..., SLOT_COLUMN] = np.arange(30)
    for column in range(FIRST_COLUMN + 2, schema.width):
        names = (schema.event_columns, schema.candidate_columns)
        sizes = [schema.column_size(n[column - FIRST_COLUMN]) if column - FIRST_COLUMN < len(n) else 1 for n in names]
        rows[:, :20, column] = generator.integers(0, sizes[0], 20)
        rows[:, 20:, column] = generator.integers(0, sizes[1], 10)
    result = []
    for catalog in (parent.catalog, data.catalog):
        rows[..., FIRST_COLUMN] = catalog.to_internal(raw)
        result.append([torch.from_numpy(part.copy()) for part in (rows[:, :20], rows[:, 20:])])
    return result[0], result[1]


def assert_same_answers(parent: Checkpoint, model: MTGR, data: PreparedData) -> None:
    before, after = known_rows(parent, data)
    with torch.inference_mode():
        scores = parent.model(*before)
        torch.testing.assert_close(model(*after), scores, rtol=0, atol=1e-6)
        logits = parent.model.next_item_logits(before[0])[0]
        place = torch.from_numpy(data.catalog.to_internal(parent.catalog.raw_ids)) - FIRST_ID
        torch.testing.assert_close(model.next_item_logits(after[0])[0][place], logits, rtol=0, atol=1e-4)
    assert scores.std(dim=1).min() > 1e-3


# --- growth ------------------------------------------------------------------------------------------------------


def test_what_the_parent_knows_stays(parent: Checkpoint, data: PreparedData) -> None:
    """Items are found by their raw ids, which new ones stand between, and side features by their categories' names."""
    assert len(data.catalog.raw_ids) == 24
    assert len(parent.catalog.raw_ids) == 16
    assert data.schema.categories == ("even", "odd", "third") != parent.schema.categories
    source = parent_ids(parent.catalog, data.catalog)
    assert (np.diff(source[source != NEW]) > 0).all()
    assert (np.flatnonzero(source == NEW) % 3 == (3 + FIRST_ID - 1) % 3).all()
    assert_same_answers(parent, grown_model(parent, data.schema, data.catalog), data)


def test_categories_are_found_by_name() -> None:
    parent = make_parent(held_back="even")
    data = adapt_data(SyntheticDataset(), parent)
    assert (parent.schema.categories, data.schema.categories) == (("odd", "third"), ("even", "odd", "third"))
    assert_same_answers(parent, grown_model(parent, data.schema, data.catalog), data)


def test_new_items_start_at_the_mean_of_the_known_ones(parent: Checkpoint, data: PreparedData) -> None:
    model = grown_model(parent, data.schema, data.catalog)
    new = np.flatnonzero(parent_ids(parent.catalog, data.catalog) == NEW)
    table, old = model.embedding.item.table.weight, parent.model.embedding.item.table.weight[FIRST_ID:]
    for item in new:
        torch.testing.assert_close(table[item], old.mean(dim=0))
    assert float(model.next_item_head.bias[new[0]]) == pytest.approx(float(parent.model.next_item_head.bias[2:].mean()))
    assert len(model.wide_terms.table.weight) == len(parent.model.wide_terms.table.weight) + len(new)
    np.testing.assert_array_equal(model.embedding.item.features.numpy(), data.catalog.features)


def test_schema_but_for_items_is_the_parents(parent: Checkpoint, data: PreparedData) -> None:
    changed = {"name", "num_items", "items_hash", "categories"}
    for field in dataclasses.fields(parent.schema):
        same = getattr(parent.schema, field.name) == getattr(data.schema, field.name)
        assert same == (field.name not in changed), field.name
    assert data.schema.items_hash == data.catalog.hash


def test_items_that_left_the_log_are_still_known(parent: Checkpoint) -> None:
    narrowed = NarrowedDataset(SyntheticDataset(), ["even"])  # odd items only, the third ones among them
    data = adapt_data(narrowed, parent)
    assert sorted(data.catalog.raw_ids.tolist()) == [i for i in range(1, 25) if i % 2 or i % 3]
    assert_same_answers(parent, grown_model(parent, data.schema, data.catalog), data)
    restored = catalog_items(parent.schema, parent.catalog)
    items = {item.id: item for item in SyntheticDataset().items()}
    for item in restored:
        assert item.categories == tuple(sorted(items[item.id].categories))
        assert item.year is not None
        assert items[item.id].year // 10 == item.year // 10  # type: ignore[operator]


def some_embeddings(ids: list[int], width: int, seed: int) -> ItemEmbeddings:
    vectors = np.random.default_rng(seed).normal(size=(len(ids), width)).astype(np.float32)
    return ItemEmbeddings(np.array(ids, dtype=np.int64), vectors)


def test_content_of_known_items_stays_and_that_of_new_ones_is_taken() -> None:
    parent = make_parent({"text": some_embeddings([1, 2, 4, 5], 6, 1)})
    data = adapt_data(SyntheticDataset(), parent)
    given = {"text": some_embeddings([3, 5, 6], 6, 2), "image": some_embeddings([1, 3], 4, 3)}
    model = grown_model(parent, data.schema, data.catalog, given)
    assert [modality.name for modality in model.config.modalities] == ["text", "image"]
    text, old = item_modalities(model)["text"].vectors, item_modalities(parent.model)["text"].vectors
    anew = given["text"].aligned(data.catalog)[0]
    at, was = data.catalog.to_internal, parent.catalog.to_internal
    for item in (1, 2, 4):  # as the parent knows them
        assert torch.equal(text[int(at(item))], old[int(was(item))])
    for item in (3, 5, 6):  # given, for a new item or anew
        np.testing.assert_array_equal(text[int(at(item)), :-1].numpy(), anew[int(at(item))])
        assert text[int(at(item)), -1] == 0
    for item in (7, 9):  # neither
        assert text[int(at(item))].tolist() == [0.0] * 6 + [1.0]
    assert not item_modalities(model)["image"].project.weight.any()
    # A modality that the parent has not had changes nothing before it is trained.
    unchanged = grown_model(parent, data.schema, data.catalog, {"image": given["image"]})
    assert_same_answers(parent, unchanged, data)


class OtherTasks(SyntheticDataset):
    def tasks(self) -> tuple[Task, ...]:
        return super().tasks()[:2]


class MoreActions(SyntheticDataset):
    def interactions(self) -> Interactions:
        log = super().interactions()
        return dataclasses.replace(log, action=log.action + 3)


class Earlier(SyntheticDataset):
    def interactions(self) -> Interactions:
        log = super().interactions()
        return dataclasses.replace(log, time=log.time - 900_000_000)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [(OtherTasks(), "have the tasks"), (MoreActions(), "8 kinds of action"), (Earlier(), "before the checkpoint")],
)
def test_data_that_the_parent_cannot_express_are_refused(
    parent: Checkpoint, dataset: SyntheticDataset, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        adapt_data(dataset, parent)


def test_a_catalogue_without_known_items_is_refused(parent: Checkpoint) -> None:
    data = prepare(NarrowedDataset(SyntheticDataset(), ["even"]), LIKED)
    with pytest.raises(ConfigurationError, match="lacks items"):
        grown_model(parent, data.schema, data.catalog)


@pytest.mark.parametrize("without", [["nothing"], ["odd", "even"], []])
def test_a_narrowed_dataset_leaves_something_out_and_something_in(without: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="categor"):
        NarrowedDataset(SyntheticDataset(), without)


# --- training ----------------------------------------------------------------------------------------------------


def changes(before: dict[str, torch.Tensor], model: MTGR) -> dict[str, float]:
    return {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}


def test_groups_learn_at_their_rates_and_frozen_ones_not_at_all(parent: Checkpoint, data: PreparedData) -> None:
    """Adam moves a parameter by its learning rate at most, or hardly more, in a step."""
    samples = data.train_samples()
    for rates in (GroupRates(1.0, 0.1, 0.01), GroupRates(1.0, 0.1, 0.0)):
        model = grown_model(parent, data.schema, data.catalog)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        recipe = dataclasses.replace(RECIPE, epochs=1)
        fine_tune(model, samples, recipe, rates)
        moved = changes(before, model)
        largest = {group: max(v for n, v in moved.items() if group_of(n) == group) for group in ("items", "heads")}
        trunk = max(v for n, v in moved.items() if group_of(n) == "trunk")
        assert largest["items"] > 2 * largest["heads"] > 0
        assert trunk == 0 if rates.trunk == 0 else 0 < 2 * trunk < largest["heads"]
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_every_parameter_has_its_group(parent: Checkpoint) -> None:
    groups: dict[str, set[str]] = {}
    for name, _ in make_parent({"text": some_embeddings([1], 3, 0)}).model.named_parameters():
        groups.setdefault(group_of(name), set()).add(name)
    assert groups["items"] == {
        "embedding.item.table.weight",
        "embedding.item.project.weight",
        "embedding.item.modalities.text.project.weight",
        "wide_terms.table.weight",
        "next_item_head.bias",
    }
    assert all(name.startswith(("task_heads.", "next_item_head.project.")) for name in groups["heads"])
    assert {name.split(".")[0] for name in groups["trunk"]} == {"embedding", "blocks", "output_norm"}


@pytest.mark.parametrize("rates", [{"items": -0.1}, {"items": 0, "heads": 0, "trunk": 0}, {"trunk": float("nan")}])
def test_impossible_rates_are_refused(rates: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="learning-rate groups"):
        GroupRates(**rates)


# --- before and after --------------------------------------------------------------------------------------------


def test_domains_are_held_out_events_of_new_and_other_items(parent: Checkpoint, data: PreparedData) -> None:
    new, other = domains_of(data, parent)
    assert (new.name, other.name) == (NEW_ITEMS, OTHER_ITEMS)
    assert not (data.known & (new.events | other.events)).any()
    np.testing.assert_array_equal(~data.known, new.events ^ other.events)
    assert (data.interactions.item[new.events] % 3 == 0).all()
    assert (data.interactions.item[other.events] % 3 != 0).all()
    for domain in (new, other):
        users = data.interactions.user[domain.queries]
        assert len(np.unique(users)) == len(users) > 20
        for query, user in zip(domain.queries, users, strict=True):
            assert not (domain.events & (data.interactions.user == user))[query + 1 :].any()


def test_adaptation_learns_the_new_items(parent: Checkpoint, data: PreparedData) -> None:
    model = grown_model(parent, data.schema, data.catalog)
    domains = domains_of(data, parent)
    before = [score(model, data, domain) for domain in domains]
    fine_tune(model, data.train_samples(), dataclasses.replace(RECIPE, epochs=12), GroupRates(1.0, 1.0, 1.0))
    after = [score(model, data, domain) for domain in domains]
    adaptations = [
        compare(data, domain, {"before": before[index], "after": after[index]}) for index, domain in enumerate(domains)
    ]
    new = adaptations[0].scores
    assert new["after"]["GAUC engagement"] > max(0.8, new["before"]["GAUC engagement"] + 0.2)
    assert adaptations[0].differences["after"]["GAUC engagement"].low > 0
    text = table(adaptations)
    assert text.splitlines()[0].split() == ["new", "items", f"({domains[0].events.sum()}", "events)", "before", "after"]
    assert f"{new['after']['GAUC engagement']:.4f}*" in text
    assert "HR@10" in text
    json.dumps(adaptations[0].to_dict(), allow_nan=False)


def test_a_domain_without_events_is_left_out(data: PreparedData) -> None:
    everything = Checkpoint(build_model(CONFIG, data.schema, data.catalog), CONFIG, data.schema, data.catalog)
    assert [domain.name for domain in domains_of(data, everything)] == [OTHER_ITEMS]
    assert not len(Domain.of("none", data, np.zeros(len(data.known), dtype=np.bool_)).queries)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "synthetic", DatasetEntry(SyntheticDataset, LIKED))
    monkeypatch.setattr(finetune, "preset", lambda name: CONFIG)


def command(tmp_path: Path, *more: str) -> list[str]:
    fixed = ["--dataset", "synthetic", "--parent", str(tmp_path / "parent"), "--output", str(tmp_path / "tuned")]
    return [*fixed, "--epochs", "1", "--threads", "1", *more]


def test_the_command_adapts_and_writes_a_checkpoint_that_names_its_parent(
    synthetic: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = some_embeddings([3, 6, 9], 5, 0)
    np.save(tmp_path / "text.npy", content.vectors)
    np.save(tmp_path / "ids.npy", content.ids)
    demo = ["--demo", "--category", HELD_BACK, "--parent-epochs", "1", "--freeze", "trunk", "--compare"]
    modality = ["--modality", f"text={tmp_path}/text.npy:{tmp_path}/ids.npy"]
    assert main(command(tmp_path, *demo, *modality)) == 0
    shown = capsys.readouterr()
    assert "8 new items beside 16 known ones" in shown.err
    for words in ("before", "from scratch", "fine-tuned", "trunk frozen", NEW_ITEMS, OTHER_ITEMS, "NDCG@10"):
        assert words in shown.out
    parent, tuned = load_checkpoint(tmp_path / "parent"), load_checkpoint(tmp_path / "tuned")
    assert tuned.record["parent"]["hash"] == parent.hash
    assert tuned.record["parent"]["record"]["without"] == [HELD_BACK]
    assert tuned.record["rates"]["trunk"] == 0
    assert tuned.record["new_items"] == 8
    assert tuned.record["modalities"] == {"text": content.hash}
    assert set(tuned.record["metrics"]) == {NEW_ITEMS, OTHER_ITEMS}
    assert [modality.name for modality in tuned.config.modalities] == ["text"]
    for name, tensor in parent.model.state_dict().items():
        if name.startswith(("blocks.", "embedding.tables.", "output_norm.")):
            assert torch.equal(tuned.model.state_dict()[name], tensor), name
    store = SQLiteStore(tmp_path / "tuned" / STORE_FILE)
    assert len(store.user_ids()) == 40
    store.close()
    # The parent was trained on none of the held-back items, and on nothing that is held out now.
    assert not np.isin(parent.catalog.raw_ids, np.arange(3, 25, 3)).any()
    # A second run takes the parent that is there.
    trained = (tmp_path / "parent" / "model.safetensors").stat().st_mtime_ns
    assert main(command(tmp_path, *demo[:-1])) == 0
    assert (tmp_path / "parent" / "model.safetensors").stat().st_mtime_ns == trained
    assert main(command(tmp_path, "--demo", "--category", "even", "--parent-epochs", "1")) == 1
    assert "is another checkpoint" in capsys.readouterr().err
    # What was adapted may be adapted again, but not onto itself.
    assert main([*command(tmp_path), "--parent", str(tmp_path / "tuned")]) == 1
    assert "is the parent" in capsys.readouterr().err


def test_what_is_wrong_is_one_sentence_and_nothing_is_written(
    synthetic: None, tmp_path: Path, parent: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path)) == 1
    assert "there is no checkpoint" in capsys.readouterr().err
    (tmp_path / "parent").mkdir()
    save_checkpoint(parent, tmp_path / "parent")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "letters.txt").write_text("dear")
    assert main(command(tmp_path)) == 1
    assert "name another directory" in capsys.readouterr().err
    for more, message in (
        (["--modality", "text"], "--modality text"),
        (["--trunk-rate", "-1"], "learning-rate groups"),
    ):
        assert main([*command(tmp_path, *more), "--output", str(tmp_path / "new")]) == 1
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parent", "tuned"]
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == ["letters.txt"]


def test_the_grown_dataset_is_the_new_one_and_the_items_that_it_lacks(parent: Checkpoint) -> None:
    grown = GrownDataset(NarrowedDataset(SyntheticDataset(), ["odd"]), parent.schema, parent.catalog)
    ids = [item.id for item in grown.items()]
    assert ids == sorted(ids) == [i for i in range(1, 25) if i % 2 == 0 or i % 3]
    assert (grown.interactions().item % 2 == 0).all()
