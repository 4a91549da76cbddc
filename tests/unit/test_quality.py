"""The table of quality: cells are scored as stated, kept, and not made twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtgr.config import ModelConfig
from mtgr.data.registry import DATASETS, DatasetEntry
from mtgr.errors import ConfigurationError
from mtgr.evaluation.baselines import Popularity
from mtgr.evaluation.metrics import item_columns, ndcg_at_k, seen_mask, target_ranks
from mtgr.evaluation.quality import SEEN_WINDOW, score_baseline, scores
from mtgr.training import recipes
from mtgr.training.loop import Trainer
from mtgr.training.prepare import PreparedData, prepare
from mtgr.training.recipe import Recipe
from mtgr.training.recipes import RECIPES, QualityRecipe, find_recipe
from perf.quality import ABLATIONS, COLUMNS, PEERS, main, table
from tests.unit.synthetic import LIKED, SyntheticDataset

RECIPE = QualityRecipe(
    model=ModelConfig(d_model=16, item_dim=8, feature_dim=4, head_dim=8, num_experts=2, relative_bias=True),
    training=Recipe(epochs=1, batch_tokens=1024, learning_rate=1e-2, threads=1),
    max_history=16,
    realtime_step=8,
    note="a test's",
)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setitem(DATASETS, "synthetic", DatasetEntry(SyntheticDataset, LIKED))
    monkeypatch.setitem(recipes.RECIPES, "synthetic", RECIPE)
    return ["--dataset", "synthetic", "--output", str(tmp_path / "cells")]


def cells_of(folder: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads((folder / "quality.json").read_text(encoding="utf-8"))["cells"]
    return cells


def test_table_of_all_models(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--seeds", "1"]) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(PEERS) + len(ABLATIONS)
    for label in ("MTGR |", "HSTU", "SASRec", "DLRM-style", "item-kNN", "popularity", "without GroupLN"):
        assert label in text
    cells = cells_of(tmp_path / "cells")
    assert {cell["model"] for cell in cells} == {*PEERS, *ABLATIONS}
    for cell in cells:
        assert all(0 <= cell["scores"][column] <= 1 for column in COLUMNS), cell["model"]
    assert not list((tmp_path / "cells").glob("state-*"))


def test_cells_are_kept_and_settings_belong_to_them(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*command, "--models", "dlrm", "popularity"]
    assert main([*few, "--seeds", "1", "2"]) == 0
    assert "±" in capsys.readouterr().out
    assert [(cell["model"], cell["seed"]) for cell in cells_of(tmp_path / "cells")] == [
        ("dlrm", 1),
        ("dlrm", 2),
        ("popularity", 1),
    ]
    first = cells_of(tmp_path / "cells")
    assert first[0]["scores"] != first[1]["scores"]

    def must_not_train(*_: object) -> None:
        raise AssertionError("a cell was made again")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", must_not_train)
        assert main([*few, "--seeds", "1", "2"]) == 0
        with pytest.raises(AssertionError):
            main([*few, "--seeds", "1", "--epochs", "2"])
    assert main([*few, "--seeds", "1", "--epochs", "2"]) == 0
    remaining = cells_of(tmp_path / "cells")
    assert [(cell["model"], cell["seed"]) for cell in remaining] == [("dlrm", 1), ("popularity", 1)]


def test_mean_and_deviation() -> None:
    def cell(seed: int, value: float) -> dict[str, Any]:
        return {"model": "hstu", "label": "HSTU", "seed": seed, "scores": dict.fromkeys(COLUMNS, value)}

    assert "0.2000 ± 0.1000" in table([cell(1, 0.1), cell(2, 0.2), cell(3, 0.3)])


@pytest.fixture(scope="module")
def left_out() -> PreparedData:
    return prepare(SyntheticDataset(), LIKED, max_history=16, realtime_step=8, protocol="leave-one-out")


def test_scores_by_brute_force(left_out: PreparedData) -> None:
    generator = np.random.default_rng(0)
    data = left_out
    events, items = int((~data.known).sum()), len(data.catalog.raw_ids)
    catalogue = generator.normal(size=(len(data.last), items))
    tasks = {name: generator.normal(size=events) for name in data.schema.task_names}
    got = scores(data, tasks, catalogue)
    hits = []
    log, offset = data.interactions, 0
    for row, event in enumerate(data.last.tolist()):
        offset = int(np.flatnonzero(log.user == log.user[event])[0])
        wanted = int(log.item[event])
        seen = set(log.item[max(offset, event - SEEN_WINDOW) : event].tolist())
        rank = 1
        for column, item in enumerate(data.catalog.raw_ids.tolist()):
            target = catalogue[row, data.catalog.raw_ids.tolist().index(wanted)]
            if item != wanted and item not in seen and catalogue[row, column] >= target:
                rank += 1
        hits.append(wanted not in seen and rank <= 10)
    assert len(data.last) == 40  # everyone is asked, those whose last second holds two events too
    assert 0 < got["HR@10"] < 1
    assert got["HR@10"] == pytest.approx(np.mean(hits))


def test_only_the_latest_seen_items_are_left_out_by_the_published_protocol(
    left_out: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    catalogue = generator.normal(size=(len(left_out.last), len(left_out.catalog.raw_ids)))
    monkeypatch.setattr("mtgr.evaluation.quality.SEEN_WINDOW", 2)
    few = scores(left_out, {}, catalogue)
    by_time = scores(dataclasses.replace(left_out, protocol="chronological"), {}, catalogue)
    assert few["HR@10"] != by_time["HR@10"]


def test_baselines_are_scored_like_in_training() -> None:
    data = prepare(SyntheticDataset(), LIKED, max_history=16, realtime_step=8)
    got = score_baseline("popularity", data, SyntheticDataset().tasks())
    popularity, ids = Popularity(data.catalog.raw_ids), data.catalog.raw_ids
    popularity.fit(data.interactions.take(data.known), data.known_labels)
    last = data.interactions.take(data.last)
    ranks = target_ranks(
        popularity.catalogue_scores(last.user, last.time, data.interactions),
        item_columns(last.item, ids),
        seen_mask(data.interactions, last.user, last.time, ids),
    )
    assert got["NDCG@10"] == pytest.approx(ndcg_at_k(ranks, 10))
    assert got["NDCG@10"] > 0


def test_recipes_fit_their_datasets() -> None:
    for name, recipe in RECIPES.items():
        assert name in DATASETS or name == "synthetic"
        assert recipe.max_history % recipe.realtime_step == 0
        assert recipe.model.max_positions > recipe.max_history + recipe.realtime_step
    with pytest.raises(ConfigurationError, match="recipe"):
        find_recipe("netflix")
