"""Training sees what serving would have seen: the same rows, the same scores, and nothing of the future."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtgr.checkpoint import build_model
from mtgr.config import ModelConfig
from mtgr.data.dataset import Interactions, User
from mtgr.data.movielens import MovieLens100K
from mtgr.data.samples import NO_LABEL, Sample, build_samples, event_rows
from mtgr.features.candidates import candidate_rows
from mtgr.features.catalog import ItemCatalog
from mtgr.features.context import context_rows
from mtgr.features.state import CandidateState, build_candidate_state
from mtgr.model import MTGR
from mtgr.schema import FIRST_COLUMN, SLOT_COLUMN, TYPE_COLUMN, Schema, TokenType
from mtgr.training.batches import collate
from mtgr.training.prepare import PreparedData, prepare
from tests.unit.synthetic import SyntheticDataset, make_catalog, make_schema

Int32Array = npt.NDArray[np.int32]

CATALOG = make_catalog()
SCHEMA = make_schema(CATALOG)
USER = User("user-0", {"age": 33, "kind": "b"})
START = 1_000_000_000

# Items repeat, and steps of 0 make ties; 4000 s ends a session.
events_strategy = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 4), st.sampled_from([0, 0, 1, 50, 4000, 90_000])),
    min_size=1,
    max_size=30,
)


def make_log(events: list[tuple[int, int, int]]) -> Interactions:
    items, actions, steps = np.array(events, dtype=np.int64).reshape(-1, 3).T
    times = START + steps.cumsum()
    return Interactions(np.zeros(len(items), np.int64), items.copy(), actions.astype(np.int32), times)


def random_log(seed: int, length: int) -> Interactions:
    generator = np.random.default_rng(seed)
    columns = (generator.integers(1, 25, length), generator.integers(0, 5, length))
    return make_log(list(zip(*columns, generator.choice([0, 7, 300, 5000], length), strict=True)))


def served(
    schema: Schema, catalog: ItemCatalog, user: User, log: Interactions, index: int
) -> tuple[Int32Array, Int32Array]:
    """Context and candidate row that a server would have built for event ``index``, just before it happened."""
    before = log.take(log.time < log.time[index])
    items = catalog.to_internal(before.item)
    context = context_rows(schema, user.profile, items, before.action, before.time)
    moment = int(log.time[index])
    state = build_candidate_state(schema, catalog, items, before.action, before.time, moment, len(context))
    received = CandidateState.from_array(state.to_array(schema.epoch), schema.epoch)
    return context, candidate_rows(schema, catalog, received, catalog.to_internal(log.item[index : index + 1]))


def assert_rows_agree(schema: Schema, catalog: ItemCatalog, user: User, log: Interactions, indices: range) -> None:
    rows = event_rows(schema, catalog, catalog.to_internal(log.item), log.action, log.time)
    for index in indices:
        _, expected = served(schema, catalog, user, log, index)
        np.testing.assert_array_equal(rows[index, FIRST_COLUMN:], expected[0, FIRST_COLUMN:])


@settings(max_examples=60, deadline=None)
@given(events_strategy)
def test_training_rows_are_the_served_rows(events: list[tuple[int, int, int]]) -> None:
    log = make_log(events)
    assert_rows_agree(SCHEMA, CATALOG, USER, log, range(len(log)))


@pytest.mark.parametrize(
    ("kind", "user_column", "similar_column", "user_step", "similar_step"),
    [(0, "user_deviation", "similar_deviation", 24, 12), (1, "user_top_deviation", "similar_top_deviation", 32, 16)],
)
def test_deviations_event_by_event(
    kind: int, user_column: str, similar_column: str, user_step: int, similar_step: int
) -> None:
    """The columns' formulas on plain numbers: strengths of 0 to 1024, similarities likewise."""
    known = SyntheticDataset().interactions()
    log = random_log(5, 40)

    def strengths(actions: list[int]) -> list[int]:
        return [action * 256 if kind == 0 else 1024 * (action == 4) for action in actions]

    overall = sum(strengths(known.action.tolist())) // len(known)

    def usual(item: int) -> int:
        own = strengths(known.action[known.item == item].tolist())
        return (sum(own) + 2 * overall) // (len(own) + 2)

    def similarity(item: int, other: int) -> int:
        one, two = (set(known.user[known.item == which].tolist()) for which in (item, other))
        common = len(one & two)
        return round(1024 * common**2 / ((common + 1) * (len(one) * len(two)) ** 0.5)) if item != other else 0

    rows = event_rows(SCHEMA, CATALOG, CATALOG.to_internal(log.item), log.action, log.time)
    columns = {name: rows[:, index] for index, name in enumerate(SCHEMA.candidate_columns, start=FIRST_COLUMN)}
    assert len(np.unique(columns[user_column])) > 3
    assert len(np.unique(columns[similar_column])) > 3
    for index, item in enumerate(log.item.tolist()):
        before = log.take(log.time < log.time[index])
        surprises = [
            value - usual(other)
            for value, other in zip(strengths(before.action.tolist()), before.item.tolist(), strict=True)
        ]
        weights = [similarity(item, other) for other in before.item.tolist()]
        deviation = sum(surprises) // (len(surprises) + 20)
        weighted = sum(w * s for w, s in zip(weights, surprises, strict=True))
        similar = (weighted - deviation * sum(weights)) // (sum(weights) + 5 * 1024)
        for column, value, step in ((user_column, deviation, user_step), (similar_column, similar, similar_step)):
            assert columns[column][index] == 2 + min(max(value // step + 16, 0), 31), (index, column)


def test_candidate_columns_vary() -> None:
    log = random_log(3, 60)
    rows = event_rows(SCHEMA, CATALOG, CATALOG.to_internal(log.item), log.action, log.time)
    for index, name in enumerate(SCHEMA.candidate_columns, start=FIRST_COLUMN):
        assert len(np.unique(rows[:, index])) > 1, f"{name} is constant, so that its agreement would mean nothing"


@pytest.fixture(scope="module")
def movielens() -> PreparedData:
    return prepare(MovieLens100K(), liked_action=3)


def test_training_rows_are_the_served_rows_on_real_users(movielens: PreparedData) -> None:
    data = movielens
    offsets = data.interactions.offsets(len(data.users))
    for user in (0, 195, 404, 942):
        log = data.interactions.take(np.arange(offsets[user], offsets[user + 1]))
        step = max(1, len(log) // 15)
        assert_rows_agree(data.schema, data.catalog, data.users[user], log, range(0, len(log), step))


def test_every_column_of_real_rows_is_in_range_and_varies(movielens: PreparedData) -> None:
    data = movielens
    rows = np.concatenate([sample.candidates for sample in data.train_samples()])
    for index, name in enumerate(data.schema.candidate_columns, start=FIRST_COLUMN):
        if name == "time":
            continue
        assert rows[:, index].min() >= 0
        assert rows[:, index].max() < data.schema.column_size(name)
        if name != "recency":  # nobody rates a film twice
            assert len(np.unique(rows[:, index])) > 1, name


def random_model(**values: Any) -> MTGR:
    torch.manual_seed(0)
    config = ModelConfig.from_dict(
        {"d_model": 16, "item_dim": 8, "feature_dim": 4, "head_dim": 8, "num_experts": 2, "attention_norm_length": 8}
        | {"max_positions": 64, "retrieve_count": 5}
        | values
    )
    model = build_model(config, SCHEMA, CATALOG)
    # Parameters that start at 0 or 1 would hide what they are applied to.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def samples_of(log: Interactions) -> list[Sample]:
    labels = {name: np.zeros(len(log), dtype=np.int8) for name in SCHEMA.task_names}
    return build_samples(SCHEMA, CATALOG, [USER], log, labels, np.ones(len(log), dtype=np.bool_))


def training_scores(model: MTGR, log: Interactions) -> torch.Tensor:
    """FP32 [E, T]: probabilities from user-level samples."""
    batch = collate(samples_of(log))
    with torch.inference_mode():
        logits, _ = model.training_outputs(batch.context, batch.candidates)
    scores = torch.full((len(log), len(SCHEMA.tasks)), float("nan"))
    scores[batch.events] = logits.sigmoid()[batch.valid]
    return scores


@pytest.mark.parametrize(
    "values", [{}, {"relative_bias": True}, {"static_attention": "causal", "heads": "shared_bottom"}]
)
def test_training_scores_are_the_served_scores(values: dict[str, Any]) -> None:
    # 30 events: seven moves of the boundary (realtime_step 4) and trimming (max_history 8).
    log = random_log(1, 30)
    model = random_model(**values)
    scores = training_scores(model, log)
    assert not torch.isnan(scores).any()
    assert scores.std(dim=0).min() > 0.05, "scores that hardly differ cannot tell right from wrong"
    kinds = set()
    for index in range(len(log)):
        context, row = served(SCHEMA, CATALOG, USER, log, index)
        kinds.add((len(context), int((context[:, TYPE_COLUMN] == TokenType.HISTORY).sum())))
        with torch.inference_mode():
            expected = model(torch.from_numpy(context)[None], torch.from_numpy(row)[None])[0, 0]
        torch.testing.assert_close(scores[index], expected, atol=1e-5, rtol=0)
    assert {history for _, history in kinds} == {0, 4, 8}


@settings(max_examples=15, deadline=None)
@given(events_strategy, st.data())
def test_no_later_event_changes_a_candidate(events: list[tuple[int, int, int]], data: st.DataObject) -> None:
    log = make_log(events)
    index = data.draw(st.integers(0, len(log) - 1))
    later = np.flatnonzero(log.time >= log.time[index])
    later = later[later != index]  # the event itself is the candidate: its action is its label
    items, actions, times = log.item.copy(), log.action.copy(), log.time.copy()
    items[later] = items[later] % 6 + 1
    actions[index:] = (actions[index:] + 2) % 5
    actions[later] = (log.action[later] + 2) % 5
    times[times > times[index]] += 100_000
    changed = Interactions(log.user, items, actions, times)
    model = random_model()
    torch.testing.assert_close(
        training_scores(model, changed)[index], training_scores(model, log)[index], atol=1e-6, rtol=0
    )


def test_an_earlier_event_does_change_a_candidate() -> None:
    log = random_log(2, 12)
    actions = log.action.copy()
    actions[5] = (actions[5] + 2) % 5
    model = random_model()
    before, after = training_scores(model, log), training_scores(model, replace(log, action=actions))
    moved = (before - after).abs().amax(dim=1)
    assert (moved[log.time <= log.time[5]] < 1e-6).all()
    assert (moved[log.time > log.time[5]] > 1e-5).all()


def test_next_items_are_asked_of_tokens_that_cannot_see_them() -> None:
    log = random_log(4, 11)
    items = CATALOG.to_internal(log.item)
    asked = []
    for sample in samples_of(log):
        slots, types = sample.context[:, SLOT_COLUMN], sample.context[:, TYPE_COLUMN]
        static = np.flatnonzero((types == TokenType.PROFILE) | (types == TokenType.HISTORY))
        assert (sample.next_items[static[:-1]] == NO_LABEL).all()
        for token in np.flatnonzero(sample.next_items != NO_LABEL):
            following = sample.context[slots == slots[token] + 1, FIRST_COLUMN]
            assert following.tolist() == [sample.next_items[token]]
        asked += sample.next_items[sample.next_items != NO_LABEL].tolist()
    assert asked == items.tolist()  # every event is asked for once over all windows
