"""Embeddings of items' content: read, refused, projected, defaulted, trained, and saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mtgr.checkpoint import Checkpoint, build_model, checkpoint_hash, load_checkpoint, save_checkpoint
from mtgr.config import Modality, ModelConfig
from mtgr.errors import ConfigurationError
from mtgr.features.catalog import ItemCatalog
from mtgr.features.modalities import ItemEmbeddings, coverage, describe, read_modalities
from mtgr.model import MTGR
from mtgr.model.modalities import ItemModalities, ModalityEmbedding
from mtgr.schema import ABSENT, FIRST_ID, UNKNOWN
from mtgr.training.loop import Trainer
from mtgr.training.prepare import prepare
from mtgr.training.recipe import Recipe
from tests.oracle import Oracle
from tests.unit.models import batch, random_user, small_catalog, small_config, small_schema, spread_model, state_of
from tests.unit.synthetic import LIKED, SyntheticDataset

CATALOG = small_catalog()
SCHEMA = small_schema()

ItemVectors = dict[int, npt.NDArray[np.float64]]


class ContentOracle(Oracle):
    """The loop-written network, which also knows what items are made of: raw vectors by internal id and modality."""

    def __init__(self, model: MTGR, content: Mapping[str, ItemVectors]) -> None:
        super().__init__(state_of(model), model.config, SCHEMA)
        self.content = content

    def _item(self, item: int) -> npt.NDArray[np.float64]:
        vector = super()._item(item).copy()
        for name, vectors in self.content.items():
            weight = self._get(f"embedding.item.modalities.{name}.project.weight")
            if item in vectors:
                raw = vectors[item]
                length = sum(float(x) * float(x) for x in raw) ** 0.5
                for column, x in enumerate(raw):
                    vector += weight[:, column] * (float(x) / length)
            elif item != ABSENT:
                vector += weight[:, -1]
        return vector


def random_embeddings(catalog: ItemCatalog, width: int, share: float = 0.7, seed: int = 0) -> ItemEmbeddings:
    """Vectors of very different lengths for some items in any order, and for one that the catalogue does not have."""
    generator = np.random.default_rng(seed)
    count = int(share * len(catalog.raw_ids))
    ids = np.append(generator.permutation(catalog.raw_ids)[:count], 10**12)
    vectors = generator.normal(size=(len(ids), width)) * np.exp(generator.uniform(-2, 4, (len(ids), 1)))
    return ItemEmbeddings(ids, vectors.astype(np.float32))


def content_of(embeddings: ItemEmbeddings, catalog: ItemCatalog) -> ItemVectors:
    place = {int(raw): index + FIRST_ID for index, raw in enumerate(catalog.raw_ids)}
    return {
        place[int(raw)]: vector.astype(np.float64)
        for raw, vector in zip(embeddings.ids, embeddings.vectors, strict=True)
        if int(raw) in place
    }


EMBEDDINGS = {"text": random_embeddings(CATALOG, 12), "image": random_embeddings(CATALOG, 5, share=0.5, seed=1)}


def content_model(embeddings: Mapping[str, ItemEmbeddings] = EMBEDDINGS, seed: int = 3, **overrides: Any) -> MTGR:
    """A random network with modalities, whose defaults and projections are large enough to show."""
    config = small_config(modalities=describe(embeddings), **overrides)
    model = spread_model(config, SCHEMA, CATALOG, seed=seed)
    item_modalities(model).fill(embeddings, CATALOG)
    return model


def item_modalities(model: MTGR) -> ItemModalities:
    assert model.embedding.item.modalities is not None
    return model.embedding.item.modalities


def test_scores_and_retrieval_are_those_of_the_equations() -> None:
    """Also with two modalities, items without an embedding, unknown items and padding."""
    model = content_model()
    oracle = ContentOracle(model, {name: content_of(matrix, CATALOG) for name, matrix in EMBEDDINGS.items()})
    generator = np.random.default_rng(5)
    users = [random_user(SCHEMA, generator, history=h, realtime=r, candidates=12) for h, r in ((20, 4), (3, 9))]
    with torch.inference_mode():
        scores = model(*batch(users)).numpy()
        logits = model.next_item_logits(batch(users)[0]).numpy()
    for index, user in enumerate(users):
        np.testing.assert_allclose(scores[index], oracle.scores(user.context, user.candidates), atol=1e-5)
        expected = oracle.next_item_logits(user.context)
        np.testing.assert_allclose(
            logits[index] * model.config.temperature, expected * model.config.temperature, atol=1e-5
        )
    assert {name for name in oracle.used if "modalities" in name} == {
        f"embedding.item.modalities.{name}.project.weight" for name in EMBEDDINGS
    }


def test_content_shows_in_history_real_time_candidates_and_retrieval() -> None:
    """An item's embedding changes what is said wherever the item stands, and nothing where it does not."""
    plain, other = content_model(), content_model()
    item = int(CATALOG.to_internal(EMBEDDINGS["text"].ids[:1])[0])
    with torch.no_grad():
        item_modalities(other)["text"].vectors[item, :-1].neg_()
    generator = np.random.default_rng(6)
    user = random_user(SCHEMA, generator, profile=2, history=6, realtime=6, candidates=4)
    elsewhere = item - 1 if item > FIRST_ID else item + 1
    user.context[2:, 2] = user.candidates[:, 2] = elsewhere
    with torch.inference_mode():
        for rows, place in ((user.context, 4), (user.context, 10), (user.candidates, 1), (None, 0)):
            if rows is not None:
                rows[place, 2] = item
            context, candidates = batch([user])
            changed = (plain(context, candidates) - other(context, candidates)).abs().amax(dim=-1)[0]
            logits = (plain.next_item_logits(context) - other.next_item_logits(context)).abs()[0]
            if rows is user.candidates:
                assert changed[place] > 1e-3
                assert not changed[np.arange(4) != place].any()
            else:
                assert bool((changed > 1e-4).all()) == (rows is not None)
            if rows is not user.context:  # the catalogue has the item, wherever it stands
                assert logits[item - FIRST_ID] > 1e-3
                assert not logits[np.arange(len(logits)) != item - FIRST_ID].any()
            if rows is not None:
                rows[place, 2] = elsewhere


def test_items_without_an_embedding_share_a_learned_default() -> None:
    embedding = item_modalities(content_model())["text"]
    known = set(content_of(EMBEDDINGS["text"], CATALOG))
    missing = [item for item in range(FIRST_ID, CATALOG.num_items) if item not in known]
    assert missing
    with torch.no_grad():
        vectors = embedding(torch.arange(CATALOG.num_items))
    default = embedding.project.weight[:, -1]
    for item in (UNKNOWN, *missing):
        torch.testing.assert_close(vectors[item], default, rtol=0, atol=0)
    assert not vectors[ABSENT].any()
    assert not ModalityEmbedding(Modality("text", 4), 10, 8).project.weight[:, -1].any()  # it starts at zero


def test_without_modalities_nothing_changes() -> None:
    """Same random numbers, tensors, config and hashes as before there were any."""
    config = small_config()
    assert "modalities" not in config.to_dict()
    model = spread_model(config, SCHEMA, CATALOG)
    assert not [name for name in model.state_dict() if "modalities" in name]
    with_content = content_model(seed=0)
    shared = {name for name in model.state_dict() if name in with_content.state_dict()}
    assert shared == set(model.state_dict())
    item = model.embedding.item
    ids = torch.arange(CATALOG.num_items)
    expected = item.table.weight + item.project(item.features)
    assert torch.equal(item(ids), expected)
    assert torch.equal(item.all(), expected)


def test_the_config_travels_as_json() -> None:
    config = small_config(modalities=(Modality("text", 384, "fp16"), Modality("audio", 8)))
    again = ModelConfig.from_dict(config.to_dict())
    assert again == config
    assert config.to_dict()["modalities"][0] == {"name": "text", "width": 384, "precision": "fp16"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "my text"}, "small letters"),
        ({"name": 3}, "small letters"),
        ({"width": 0}, "positive integer"),
        ({"width": True}, "positive integer"),
        ({"precision": "int8"}, "'fp32' or 'fp16'"),
        ({"height": 3}, "list of objects"),
    ],
)
def test_a_wrong_description_is_one_sentence(change: dict[str, object], message: str) -> None:
    values = small_config().to_dict() | {"modalities": [{"name": "text", "width": 4} | change]}
    with pytest.raises(ConfigurationError, match=message):
        ModelConfig.from_dict(values)


def test_names_must_differ_and_be_possible() -> None:
    with pytest.raises(ConfigurationError, match="one name"):
        small_config(modalities=(Modality("text", 3), Modality("text", 4)))
    with pytest.raises(ConfigurationError, match="choose another name"):
        build_model(small_config(modalities=(Modality("training", 3),)), SCHEMA, CATALOG)


def test_matrices_are_read_from_both_formats(tmp_path: Path) -> None:
    matrix = EMBEDDINGS["text"]
    np.save(tmp_path / "vectors.npy", matrix.vectors.astype(np.float16))
    np.save(tmp_path / "ids.npy", matrix.ids.astype(np.int32) % 1000)
    save_file({"ids": matrix.ids, "vectors": matrix.vectors}, tmp_path / "image.safetensors")
    found = read_modalities([f"text={tmp_path}/vectors.npy:{tmp_path}/ids.npy", f"image={tmp_path}/image.safetensors"])
    assert list(found) == ["text", "image"]
    np.testing.assert_array_equal(found["text"].vectors, matrix.vectors.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(found["image"].vectors, matrix.vectors)
    np.testing.assert_array_equal(found["image"].ids, matrix.ids)
    assert found["image"].vectors.dtype == np.float32
    assert found["text"].ids.dtype == np.int64
    assert coverage(found["image"], CATALOG) == pytest.approx(int(0.7 * 38) / 38)


def write(path: Path, value: object) -> str:
    np.save(path, np.array(value), allow_pickle=True)
    return str(path)


def test_what_is_wrong_with_a_matrix_is_one_sentence(tmp_path: Path) -> None:
    ids = write(tmp_path / "ids.npy", [1, 2])
    cases = {
        "text": "write it as",
        "=x.npy": "write it as",
        f"text={tmp_path}/none.npy:{ids}": "does not exist",
        f"text={ids}": "no item ids",
        f"text={tmp_path}/none.safetensors": "does not exist",
        f"text={write(tmp_path / 'flat.npy', [1.0, 2.0])}:{ids}": r"shape \[2\]",
        f"text={write(tmp_path / 'long.npy', [[1.0], [2.0], [3.0]])}:{ids}": "one id for each",
        f"text={write(tmp_path / 'nan.npy', [[1.0], [float('nan')]])}:{ids}": "item 2 has a number that is not finite",
        f"text={write(tmp_path / 'int.npy', [[1], [2]])}:{ids}": "must be floats",
        f"text={write(tmp_path / 'ok.npy', [[1.0], [2.0]])}:{write(tmp_path / 'same.npy', [1, 1])}": "id once",
        f"text={write(tmp_path / 'pickle.npy', [{}, None])}:{ids}": "not a .npy array",
    }
    for option, message in cases.items():
        with pytest.raises(ConfigurationError, match=message) as caught:
            read_modalities([option])
        assert "\n" not in str(caught.value)
    save_file({"weights": np.ones((2, 3), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigurationError, match="holds weights"):
        read_modalities([f"text={tmp_path}/other.safetensors"])


def test_a_matrix_that_does_not_fit_the_network_is_refused() -> None:
    modalities = item_modalities(content_model())
    text, image = EMBEDDINGS["text"], EMBEDDINGS["image"]
    with pytest.raises(ConfigurationError, match="takes the modalities text, image, but was given text"):
        modalities.fill({"text": text}, CATALOG)
    with pytest.raises(ConfigurationError, match="have 5 columns"):
        modalities.fill({"text": image, "image": image}, CATALOG)
    strangers = ItemEmbeddings(np.arange(3) + 10**9, np.ones((3, 12), np.float32))
    with pytest.raises(ConfigurationError, match="none of the catalogue's items"):
        modalities.fill({"text": strangers, "image": image}, CATALOG)


def test_the_hash_is_that_of_the_content() -> None:
    matrix = EMBEDDINGS["text"]
    backwards = ItemEmbeddings(matrix.ids[::-1], matrix.vectors[::-1])
    swapped = ItemEmbeddings(matrix.ids[::-1], matrix.vectors)
    assert matrix.hash == backwards.hash != swapped.hash


def test_a_row_of_zeros_is_no_embedding() -> None:
    matrix = ItemEmbeddings(CATALOG.raw_ids[:3], np.array([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]], np.float32))
    vectors, present = matrix.aligned(CATALOG)
    assert present[FIRST_ID : FIRST_ID + 4].tolist() == [True, False, True, False]
    np.testing.assert_allclose(vectors[FIRST_ID + 2], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_checkpoint_holds_the_matrix_once(tmp_path: Path, precision: Literal["fp32", "fp16"]) -> None:
    config = small_config(modalities=describe(EMBEDDINGS, precision))
    model = spread_model(config, SCHEMA, CATALOG)
    item_modalities(model).fill(EMBEDDINGS, CATALOG)
    save_checkpoint(Checkpoint(model, config, SCHEMA, CATALOG), tmp_path)
    loaded = load_checkpoint(tmp_path)
    rows = batch([random_user(SCHEMA, np.random.default_rng(1))])
    with torch.inference_mode():
        assert torch.equal(loaded.model(*rows), model(*rows))
        assert torch.equal(loaded.model.retrieve(rows[0])[1], model.retrieve(rows[0])[1])
    tensors = load_file(tmp_path / "model.safetensors")
    matrices = [name for name, tensor in tensors.items() if tensor.shape == (CATALOG.num_items, 13)]
    assert matrices == ["embedding.item.modalities.text.vectors"]
    assert tensors[matrices[0]].dtype == (np.float16 if precision == "fp16" else np.float32)
    assert not [name for name in load_file(tmp_path / "catalog.safetensors") if "text" in name]


def test_half_precision_storage_costs_little() -> None:
    full, half = content_model(), content_model()
    for module in item_modalities(half).embeddings():
        module.vectors = module.vectors.half()
    rows = batch([random_user(SCHEMA, np.random.default_rng(index)) for index in range(4)])
    with torch.inference_mode():
        difference = (full(*rows) - half(*rows)).abs().max()
    assert 0 < difference < 2e-3


def test_another_matrix_is_another_model_to_every_cache(tmp_path: Path) -> None:
    """Caches of keys are salted with the checkpoint's hash."""
    hashes = []
    changed = dict(EMBEDDINGS, text=random_embeddings(CATALOG, 12, seed=9))
    for name, embeddings in (("a", EMBEDDINGS), ("b", EMBEDDINGS), ("c", changed)):
        (tmp_path / name).mkdir()
        model = content_model(embeddings)
        save_checkpoint(Checkpoint(model, model.config, SCHEMA, CATALOG), tmp_path / name)
        hashes.append(checkpoint_hash(tmp_path / name))
    assert hashes[0] == hashes[1] != hashes[2]
    # The rows are the same with and without: live versions may share a door.
    assert load_checkpoint(tmp_path / "a").schema.hash == SCHEMA.hash


def test_training_learns_projection_and_default_and_leaves_the_matrix_alone() -> None:
    data = prepare(SyntheticDataset(), LIKED, max_history=16, realtime_step=8)
    matrix = random_embeddings(data.catalog, 6)
    config = small_config(d_model=16, item_dim=8, modalities=describe({"text": matrix}))
    torch.manual_seed(1)
    model = build_model(config, data.schema, data.catalog)
    text = item_modalities(model)["text"]
    item_modalities(model).fill({"text": matrix}, data.catalog)
    before, weight = text.vectors.clone(), text.project.weight.detach().clone()
    recipe = Recipe(epochs=2, batch_tokens=512, learning_rate=1e-2, threads=1)
    losses: list[float] = []
    Trainer(model, data.train_samples(), recipe).train(lambda epoch, loss: losses.append(loss))
    assert torch.equal(text.vectors, before)
    assert not text.vectors.requires_grad
    assert bool((text.project.weight != weight).all())
    assert losses[-1] < losses[0]
