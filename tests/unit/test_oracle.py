"""The reference network against the loop-written float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtgr.config import ModelConfig
from mtgr.model import MTGR
from mtgr.model.bias import RelativeBias
from mtgr.schema import CANDIDATE_COLUMNS, Schema, TaskSpec
from tests.oracle import Oracle, time_bucket
from tests.unit.models import (
    User,
    batch,
    random_user,
    small_catalog,
    small_config,
    small_schema,
    spread_model,
    state_of,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LOGIT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # next-item logits reach 1 / temperature = 20
MIN_SPREAD = 0.05

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "one_head_one_layer": {"num_heads": 1, "num_layers": 1, "heads": "shared_bottom"},
    "three_heads_three_layers": {"num_heads": 3, "num_layers": 3},
    "bias": {"relative_bias": True},
    "bias_few_time_buckets": {"relative_bias": True, "time_buckets": 9, "heads": "shared_bottom", "num_heads": 3},
    "causal": {"static_attention": "causal"},
    "causal_bias": {"static_attention": "causal", "relative_bias": True, "num_layers": 1},
    "unequal_widths": {"dqk": 5, "dv": 7, "num_heads": 3},
    "small_epsilon_large_length": {"norm_epsilon": 1e-6, "attention_norm_length": 2048},
    "dropout_at_rest": {"dropout": 0.5},
    "one_expert": {"num_experts": 1, "temperature": 1.0},
}

# Profile, history and real-time tokens.
SHAPES = {
    "all": (3, 9, 5),
    "no_realtime": (3, 8, 0),
    "no_history": (2, 0, 6),
    "profile_only": (3, 0, 0),
    "one_profile_token": (1, 0, 0),
    "one_event": (0, 1, 0),
    "one_realtime_event": (0, 0, 1),
}


@contextmanager
def precision(model: MTGR, dtype: torch.dtype) -> Iterator[None]:
    """Run ``model`` in ``dtype``; in FP64 also what the network takes in FP32 in every precision (norms, logits)."""
    model.to(dtype)
    if dtype == torch.float64:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), torch.inference_mode():
            yield
    else:
        with torch.inference_mode():
            yield


def make(schema: Schema, seed: int = 0, **overrides: Any) -> tuple[MTGR, Oracle, ModelConfig]:
    config = small_config(**overrides)
    model = spread_model(config, schema, small_catalog(schema.num_items), seed)
    return model, Oracle(state_of(model), config, schema), config


def users_of(schema: Schema, seed: int, by_time: bool = False) -> list[User]:
    """One user of every shape, with 1 to 8 candidates; by time, only of shapes in which there is time to differ in."""
    generator = np.random.default_rng(seed)
    shapes = [shape for shape in SHAPES.values() if not by_time or shape[2] > 1]
    counts = [8] + [int(generator.integers(1, 9)) for _ in shapes[1:]]
    return [
        random_user(schema, generator, profile=p, history=s, realtime=r, candidates=k, by_time=by_time)
        for (p, s, r), k in zip(shapes, counts, strict=True)
    ]


def assert_scores(model: MTGR, oracle: Oracle, users: list[User], dtype: torch.dtype) -> None:
    """The whole padded batch agrees with the oracle, user by user, on scores that spread."""
    context, candidates = batch(users)
    with precision(model, dtype):
        scores = model(context, candidates).numpy()
    for row, user in zip(scores, users, strict=True):
        expected = oracle.scores(user.context, user.candidates)
        if len(expected) == 8:
            assert expected.std(axis=0).min() >= MIN_SPREAD
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_scores(overrides: dict[str, Any], dtype: torch.dtype) -> None:
    schema = small_schema()
    model, oracle, _ = make(schema, **overrides)
    assert_scores(model, oracle, users_of(schema, seed=1), dtype)


@pytest.mark.parametrize(
    "schema",
    [
        small_schema(width=2 + len(CANDIDATE_COLUMNS), candidate_columns=CANDIDATE_COLUMNS),
        small_schema(candidate_columns=("item", "time")),
        small_schema(event_columns=("item", "time", "hour"), candidate_columns=("item", "time", "hour", "recency")),
        small_schema(tasks=(TaskSpec("only", "one"),)),
    ],
    ids=["all_columns", "no_cross_features", "columns_in_both_rows", "one_task"],
)
def test_other_columns_and_tasks(schema: Schema) -> None:
    model, oracle, _ = make(schema)
    assert_scores(model, oracle, users_of(schema, seed=2), torch.float64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    overrides=st.fixed_dictionaries(
        {
            "num_layers": st.integers(1, 3),
            "num_heads": st.integers(1, 3),
            "dqk": st.integers(1, 8),
            "dv": st.integers(1, 8),
            "d_model": st.integers(4, 24),
            "attention_norm_length": st.sampled_from([1, 16, 100]),
            "norm_epsilon": st.sampled_from([1e-6, 1e-3, 0.1]),
            "static_attention": st.sampled_from(["full", "causal"]),
            "relative_bias": st.booleans(),
            "heads": st.sampled_from(["mmoe", "shared_bottom"]),
        }
    ),
    shape=st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(0, 6)),
    padding=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_scores_of_random_networks(
    overrides: dict[str, Any], shape: tuple[int, int, int], padding: int, seed: int
) -> None:
    schema = small_schema()
    model, oracle, _ = make(schema, seed, **overrides)
    profile, history, realtime = shape
    generator = np.random.default_rng(seed)
    user = random_user(schema, generator, profile=profile, history=history, realtime=realtime, candidates=3)
    context, candidates = batch([user], sum(shape) + padding, 3 + padding)
    with precision(model, torch.float64):
        scores = model(context, candidates)[0, :3].numpy()
    # Widths down to one make LayerNorm's variance vanish, which magnifies rounding by epsilon ** -0.5 a layer.
    np.testing.assert_allclose(scores, oracle.scores(user.context, user.candidates), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", ["default", "causal_bias", "bias_few_time_buckets"])
def test_training_outputs(name: str, dtype: torch.dtype) -> None:
    """Candidates of many moments in one context: each sees R strictly earlier and stands after what it sees."""
    schema = small_schema()
    model, oracle, _ = make(schema, **CONFIGS[name])
    users = users_of(schema, seed=3, by_time=True)
    times = users[0].context[12:, 3]
    moments = users[0].candidates[:, 3]
    assert np.isin(moments, times).any(), "no candidate is simultaneous with a real-time token"
    assert len({int((times < moment).sum()) for moment in moments}) >= 3, "the candidates all see the same"

    with precision(model, dtype):
        logits, queries = (output.numpy() for output in model.training_outputs(*batch(users)))
    for row, query, user in zip(logits, queries, users, strict=True):
        expected_logits, expected_queries = oracle.training_outputs(user.context, user.candidates)
        tolerance = 10 * TOLERANCE[dtype]
        np.testing.assert_allclose(row[: len(expected_logits)], expected_logits, rtol=0, atol=tolerance)
        np.testing.assert_allclose(query[: len(expected_queries)], expected_queries, rtol=0, atol=tolerance)


def test_training_equals_serving_for_the_latest_moment() -> None:
    """A candidate later than all of R gets the same logits from the mask by time and from the mask by order."""
    schema = small_schema()
    model, _, _ = make(schema, relative_bias=True)
    context, candidates = batch(users_of(schema, seed=4))
    with precision(model, torch.float32):
        logits, _ = model.training_outputs(context, candidates)
        torch.testing.assert_close(logits.sigmoid(), model(context, candidates), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", ["default", "causal_bias", "one_expert"])
def test_next_item_logits_and_retrieval(name: str, dtype: torch.dtype) -> None:
    schema = small_schema()
    model, oracle, config = make(schema, **CONFIGS[name])
    users = users_of(schema, seed=5)
    context, _ = batch(users)
    with precision(model, dtype):
        logits = model.next_item_logits(context).numpy()
        items, scores = (output.numpy() for output in model.retrieve(context))
    assert items.shape == (len(users), config.retrieve_count)
    assert items.dtype == np.int32
    for index, user in enumerate(users):
        expected = oracle.next_item_logits(user.context)
        assert expected.std() >= MIN_SPREAD
        np.testing.assert_allclose(logits[index], expected, rtol=0, atol=LOGIT_TOLERANCE[dtype])
        np.testing.assert_allclose(scores[index], expected[items[index] - 2], rtol=0, atol=LOGIT_TOLERANCE[dtype])
        if dtype == torch.float64:
            assert items[index].tolist() == oracle.retrieve(user.context, config.retrieve_count)


def test_retrieval_breaks_ties_by_id() -> None:
    """Items that share one vector share one logit; the smaller id comes first, and no reserved id comes at all."""
    schema = small_schema()
    model, _, config = make(schema, retrieve_count=1000)
    with torch.no_grad():
        # Vectors of a few signs: their products with a query are equal where the vectors are.
        generator = torch.Generator().manual_seed(0)
        kinds = torch.randint(0, 2, (3, config.item_dim), generator=generator).float() * 2 - 1
        model.embedding.item.table.weight.copy_(kinds[torch.randint(0, 3, (schema.num_items,), generator=generator)])
        model.embedding.item.project.weight.zero_()
        model.next_item_head.bias.zero_()
    oracle = Oracle(state_of(model), config, schema)
    user = users_of(schema, seed=6)[0]
    with precision(model, torch.float64):
        items, scores = model.retrieve(torch.from_numpy(user.context[None]))
    assert items.shape[1] == schema.num_items - 2
    assert len(scores[0].unique()) == 3
    assert items[0].tolist() == oracle.retrieve(user.context, schema.num_items)


@pytest.mark.parametrize("heads", ["mmoe", "shared_bottom"])
def test_the_oracle_reads_every_parameter(heads: str) -> None:
    """A parameter that is new in the network is one that the oracle must learn of."""
    schema = small_schema()
    model, oracle, _ = make(schema, heads=heads, relative_bias=True)
    user = users_of(schema, seed=7)[0]
    oracle.scores(user.context, user.candidates)
    oracle.next_item_logits(user.context)
    assert oracle.used == set(model.state_dict())


def test_time_buckets_at_their_edges() -> None:
    """Each bucket begins at the first whole second that reaches it; FP32 may place an edge a few seconds off.

    The network takes the logarithm in FP32. Up to 3.5 days it is exact; later an edge lies up to 5e-6 of itself off.
    """
    buckets = 128
    bias = RelativeBias(1, 4, buckets)

    def bucket(seconds: int) -> int:
        return int(bias.time_bucket(torch.tensor([seconds], dtype=torch.int32)))

    for index in range(1, 72):
        edge = math.ceil(math.exp(0.301 * index))
        slack = 0 if edge < 300_000 else math.ceil(edge * 5e-6)
        if edge - 1 - slack >= math.exp(0.301 * (index - 1)):  # the first buckets hold no whole second
            assert bucket(edge - 1 - slack) == time_bucket(edge - 1 - slack, buckets) == index - 1
        if math.exp(0.301 * (index + 1)) > edge + slack < 2**31:
            assert bucket(edge + slack) == time_bucket(edge + slack, buckets) == index
    assert bucket(0) == bucket(1) == bucket(-1) == 0
    assert bucket(2**31 - 1) == bucket(-(2**31) + 1) == time_bucket(2**31 - 1, buckets)


@given(seconds=st.integers(-(2**31) + 1, 2**31 - 1), buckets=st.integers(1, 128))
def test_time_buckets_stay_in_range_and_rise(seconds: int, buckets: int) -> None:
    bias = RelativeBias(1, 4, buckets)
    ids: Tensor = bias.time_bucket(torch.tensor([seconds, -seconds, abs(seconds) // 2, 0], dtype=torch.int32))
    assert ids[0] == ids[1]
    assert 0 == ids[3] <= ids[2] <= ids[0] <= buckets
    assert abs(time_bucket(seconds, buckets) - int(ids[0])) <= 1
