"""What must hold of the reference without any oracle: order, company, padding and batches do not matter."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from mtgr.config import ModelConfig
from mtgr.model import MTGR
from mtgr.model.hstu import HSTUBlock
from mtgr.model.mask import visible_by_order
from mtgr.schema import FIRST_ID, SLOT_COLUMN, TYPE_COLUMN, TokenType
from tests.unit.models import (
    User,
    batch,
    random_user,
    small_catalog,
    small_config,
    small_schema,
    spread_model,
)

SCHEMA = small_schema()
ATOL = 1e-6  # of probabilities: the same sums in another order
STATE_ATOL = 1e-5  # of hidden states, which are larger
MIN_SPREAD = 0.05

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "bias_shared_bottom": {"relative_bias": True, "heads": "shared_bottom"},
    "causal": {"static_attention": "causal", "num_heads": 3, "num_layers": 3},
}
USERS = {
    "all": (3, 12, 7),
    "no_realtime": (3, 9, 0),
    "no_history": (2, 0, 5),
    "profile_only": (3, 0, 0),
    "one_token": (1, 0, 0),
}


@pytest.fixture(scope="module", params=list(CONFIGS.values()), ids=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> MTGR:
    return make(small_config(**request.param))


def make(config: ModelConfig, seed: int = 3) -> MTGR:
    return spread_model(config, SCHEMA, small_catalog(), seed)


def users(seed: int = 0, candidates: int = 12) -> list[User]:
    generator = np.random.default_rng(seed)
    return [
        random_user(SCHEMA, generator, profile=p, history=s, realtime=r, candidates=candidates)
        for p, s, r in USERS.values()
    ]


@torch.inference_mode()
def score(model: MTGR, context: Tensor, candidates: Tensor) -> Tensor:
    scores: Tensor = model(context, candidates)
    return scores


def close(actual: Tensor, expected: Tensor, atol: float = ATOL) -> None:
    assert expected.numel()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_scores_spread(model: MTGR) -> None:
    """Otherwise none of the equalities below would mean anything."""
    scores = score(model, *batch(users()))
    assert scores.std(dim=1).min() >= MIN_SPREAD
    assert scores.std(dim=0).min() > 0.01, "the context does not matter"


def test_order_of_candidates_does_not_matter(model: MTGR) -> None:
    """Each candidate keeps its score wherever it stands; its slot is a matter of its place, not of the item."""
    context, candidates = batch(users())
    order = torch.randperm(candidates.shape[1], generator=torch.Generator().manual_seed(0))
    permuted = candidates[:, order].clone()
    close(score(model, context, permuted), score(model, context, candidates)[:, order])
    permuted[..., SLOT_COLUMN] = candidates[..., SLOT_COLUMN]
    close(score(model, context, permuted), score(model, context, candidates)[:, order])


@pytest.mark.parametrize("chosen", [[0], [11], [2, 3, 9]])
def test_company_of_candidates_does_not_matter(model: MTGR, chosen: list[int]) -> None:
    context, candidates = batch(users())
    close(score(model, context, candidates[:, chosen]), score(model, context, candidates)[:, chosen])


def test_candidates_may_repeat(model: MTGR) -> None:
    context, candidates = batch(users())
    twice = torch.cat([candidates, candidates], dim=1)
    expected = score(model, context, candidates)
    close(score(model, context, twice), torch.cat([expected, expected], dim=1))


@pytest.mark.parametrize(("n", "k"), [(23, 16), (64, 12), (64, 64), (128, 16)])
def test_padding_does_not_matter(model: MTGR, n: int, k: int) -> None:
    everyone = users()
    expected = score(model, *batch(everyone))
    close(score(model, *batch(everyone, n, k))[:, : expected.shape[1]], expected)


def test_content_of_padding_does_not_matter(model: MTGR) -> None:
    """Type 0 alone makes a row padding: whatever else stands in it is not read, or read without effect."""
    everyone = users()
    context, candidates = batch(everyone, 40, 16)
    expected = score(model, context, candidates)[:, :12]
    retrieved = model.retrieve(context)
    for rows in (context, candidates):
        padding = rows[..., TYPE_COLUMN] == TokenType.PADDING
        rows[padding] = torch.tensor([0, 0, *[FIRST_ID] * (SCHEMA.width - 2)], dtype=torch.int32)
    close(score(model, context, candidates)[:, :12], expected)
    close(model.retrieve(context)[1], retrieved[1], 20 * ATOL)


def test_a_batch_equals_its_users_one_by_one(model: MTGR) -> None:
    everyone = users()
    together = score(model, *batch(everyone))
    with torch.inference_mode():
        logits = model.next_item_logits(batch(everyone)[0])
    for index, user in enumerate(everyone):
        context, candidates = batch([user])
        close(together[index], score(model, context, candidates)[0])
        with torch.inference_mode():
            alone = model.next_item_logits(context)[0]
        close(logits[index], alone, 20 * ATOL)  # over a temperature of 0.05


def test_order_of_users_does_not_matter(model: MTGR) -> None:
    everyone = users()
    forward = score(model, *batch(everyone))
    close(score(model, *batch(everyone[::-1])).flip(0), forward)


def context_states(model: MTGR, context: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Outputs of the context tokens, and keys and values of every layer."""
    cached: list[tuple[Tensor, Tensor]] = []
    project = HSTUBlock.project

    def record(self: HSTUBlock, x: Tensor, types: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u, v, q, k = project(self, x, types)
        cached.append((k, v))
        return u, v, q, k

    slots = context[..., SLOT_COLUMN]
    visible = visible_by_order(slots, context[..., TYPE_COLUMN], slots, model.config.static_attention)
    with mock.patch.object(HSTUBlock, "project", record), torch.inference_mode():
        return model.trunk(context, context[:, :0], visible), cached


@pytest.mark.parametrize("prefix", [15, 16, 20])
def test_appended_events_leave_the_prefix_as_it_was(model: MTGR, prefix: int) -> None:
    """Keys, values and outputs of earlier tokens stay the same while R grows, so that they may be cached."""
    context, _ = batch(users()[:1])  # 3 of the profile, 12 of S, 7 of R
    outputs, cached = context_states(model, context)
    shorter, cached_shorter = context_states(model, context[:, :prefix])
    close(outputs[:, :prefix], shorter, STATE_ATOL)
    for (k, v), (k_shorter, v_shorter) in zip(cached, cached_shorter, strict=True):
        close(k[:, :, :prefix], k_shorter, STATE_ATOL)
        close(v[:, :, :prefix], v_shorter, STATE_ATOL)


def test_a_longer_history_changes_what_came_before_unless_causal(model: MTGR) -> None:
    """The control of the test above: what S sees both ways is no prefix, and plain HSTU's is."""
    context, _ = batch(users()[:1])
    outputs, _ = context_states(model, context[:, :15])
    shorter, _ = context_states(model, context[:, :10])
    difference = (outputs[:, :10] - shorter).abs().max()
    if model.config.static_attention == "causal":
        assert difference <= STATE_ATOL
    else:
        assert difference > 0.01


def test_candidates_leave_the_context_as_it_was(model: MTGR) -> None:
    """One pass over context and candidates may fill a cache that serves other candidates."""
    context, candidates = batch(users())
    n = context.shape[1]
    slots = torch.cat([context, candidates], dim=1)[..., SLOT_COLUMN]
    types = context[..., TYPE_COLUMN]
    visible = visible_by_order(slots, types, context[..., SLOT_COLUMN], model.config.static_attention)
    with torch.inference_mode():
        outputs = model.trunk(context, candidates, visible)[:, :n]
    alone, _ = context_states(model, context)
    valid = types != TokenType.PADDING
    close(outputs[valid], alone[valid], STATE_ATOL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["users", "all_padding", "zeros_and_users", "long"])
def test_outputs_are_finite(model: MTGR, dtype: torch.dtype, kind: str) -> None:
    """In every precision, also for rows that are padding throughout (a bucket's unused users)."""
    context, candidates = batch(users(), 32, 16)
    if kind == "all_padding":
        context, candidates = torch.zeros_like(context), torch.zeros_like(candidates)
    elif kind == "zeros_and_users":
        context[1::2], candidates[::2] = 0, 0
    elif kind == "long":
        context, candidates = batch([random_user(SCHEMA, np.random.default_rng(1), history=200, realtime=99)])
    low = make(model.config).to(dtype)
    scores = score(low, context, candidates)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert ((scores >= 0) & (scores <= 1)).all()
    with torch.inference_mode():
        items, logits = low.retrieve(context)
    assert logits.isfinite().all()
    assert ((items >= FIRST_ID) & (items < SCHEMA.num_items)).all()
    if kind == "long":
        close_enough = 0.02 if dtype == torch.float16 else 0.2
        assert (scores - score(model, context, candidates)).abs().max() <= close_enough


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("length", [1, 64, 256, 2048])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-3])
def test_one_token_contexts_are_told_apart(epsilon: float, length: int, dtype: torch.dtype) -> None:
    """Epsilon must neither be divided by zero variance nor drown what one token says, however large N is.

    With one context token, A V / N is about 1 / N, and the norm after it has to bring it back.
    """
    low = make(small_config(norm_epsilon=epsilon, attention_norm_length=length)).to(dtype)
    one = random_user(SCHEMA, np.random.default_rng(4), profile=1, history=0, realtime=0, candidates=12)
    context, candidates = batch([one])
    scores = score(low, context, candidates)
    assert scores.isfinite().all()
    assert scores.std(dim=1).min() >= MIN_SPREAD
    other = context.clone()
    other[0, 0, 2] += 1 if context[0, 0, 2] == FIRST_ID else -1
    difference = (score(low, other, candidates) - scores).abs().max()
    # What is left of one token is 1 / (N sqrt(epsilon)) at worst.
    assert difference >= min(1.0, 1 / (length * epsilon**0.5)) * 0.1
    with torch.inference_mode():
        logits = low.next_item_logits(context)
    assert logits.isfinite().all()
    assert logits.std() > 0.1


def test_reserved_ids_are_never_retrieved(model: MTGR) -> None:
    """Nor is any item twice; the logits fall."""
    with torch.inference_mode():
        items, logits = model.retrieve(batch(users())[0])
    assert items.dtype == torch.int32
    assert logits.dtype == torch.float32
    assert items.min() >= FIRST_ID
    assert (logits[:, 1:] <= logits[:, :-1]).all()
    for row in items.tolist():
        assert len(set(row)) == len(row) == model.retrieve_count
