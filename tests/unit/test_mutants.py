"""Seven wrong networks, each of which must be told from the right one a hundred times over.

What is compared here is what every other path is held to: probabilities within 1e-5 of the reference. A test of
equality proves nothing if a broken path passes it too, so the reference and the rows used must make each break show.
Every mutant is the reference itself with one thing changed, and goes through the same harness as the unchanged one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.config import ModelConfig
from mtgr.model import MTGR
from mtgr.model.hstu import HSTUBlock
from mtgr.model.norm import GroupLayerNorm
from mtgr.schema import SLOT_COLUMN, TYPE_COLUMN, Schema, TokenType
from tests.oracle import Oracle
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

TOLERANCE = 1e-5
MISS = 100 * TOLERANCE
MIN_SPREAD = 0.05
BLOCK = 16  # tokens of a cache block
CANDIDATES = 8

Float64Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Case:
    """A reference, users with all segments of different lengths, and what the oracle says of each of them."""

    model: MTGR
    config: ModelConfig
    schema: Schema
    users: tuple[User, ...]
    expected: tuple[Float64Array, ...]


Mutant = Callable[[Case], AbstractContextManager[None]]


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"heads": "shared_bottom", "num_heads": 3, "num_layers": 3},
        {"relative_bias": True},
        {"num_heads": 1, "attention_norm_length": 100},
    ],
    ids=["default", "three_layers", "relative_bias", "one_head"],
)
def case(request: pytest.FixtureRequest) -> Case:
    schema, config = small_schema(), small_config(**request.param)
    model = spread_model(config, schema, small_catalog(), seed=1)
    generator = np.random.default_rng(2)
    users = tuple(
        random_user(schema, generator, history=history, realtime=realtime, candidates=CANDIDATES)
        for history, realtime in ((20, 14), (15, 18), (31, 3))
    )
    oracle = Oracle(state_of(model), config, schema)
    expected = tuple(oracle.scores(user.context, user.candidates) for user in users)
    for scores in expected:
        assert scores.std(axis=0).min() >= MIN_SPREAD
    return Case(model, config, schema, users, expected)


def distances(case: Case, mutant: Mutant, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> list[float]:
    """Largest difference of a probability from the oracle's, for each user of one padded batch."""
    with mutant(case), torch.inference_mode():
        scores = case.model(*change(*batch(case.users, context_length=48, num_candidates=16))).numpy()
    return [float(np.abs(row[:CANDIDATES] - wanted).max()) for row, wanted in zip(scores, case.expected, strict=True)]


def same(context: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    return context, candidates


def shifted(context: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Every slot one too high."""

    def shift(rows: Tensor) -> Tensor:
        rows = rows.clone()
        rows[..., SLOT_COLUMN] += rows[..., TYPE_COLUMN] != TokenType.PADDING
        return rows

    return shift(context), shift(candidates)


def unchanged(case: Case) -> AbstractContextManager[None]:
    return nullcontext()


@contextmanager
def patched_block(name: str, method: Callable[..., Any]) -> Iterator[None]:
    with mock.patch.object(HSTUBlock, name, method):
        yield


def realtime_dropped(case: Case) -> AbstractContextManager[None]:
    """Nobody sees a token of R; its positions are still counted."""
    forward = HSTUBlock.forward

    def mutated(
        self: HSTUBlock, x: Tensor, types: Tensor, visible: Tensor, bias: Tensor | None, own: Tensor | None, n: int
    ) -> Tensor:
        return forward(self, x, types, visible * (types[:, None, None, :n] != TokenType.REALTIME), bias, own, n)

    return patched_block("forward", mutated)


@contextmanager
def history_causal(case: Case) -> Iterator[None]:
    """U and S see only what came before."""
    with mock.patch.object(case.model, "config", dataclasses.replace(case.config, static_attention="causal")):
        yield


@contextmanager
def current_length(case: Case) -> Iterator[None]:
    """A V is divided by each user's own number of tokens."""
    tokens = torch.tensor([len(user.context) + CANDIDATES for user in case.users]).reshape(-1, 1, 1)
    with ExitStack() as stack:
        for block in case.model.blocks:
            stack.enter_context(mock.patch.object(block, "norm_length", tokens))
        yield


def neighbour_seen(case: Case) -> AbstractContextManager[None]:
    """Each candidate also sees the one before it."""
    attend_self = HSTUBlock.attend_self

    def mutated(self: HSTUBlock, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        before_k, before_v = (F.pad(x, (0, 0, 1, 0))[:, :, :-1] for x in (k, v))
        return attend_self(self, q, k, v, bias) + attend_self(self, q, before_k, before_v, bias)

    return patched_block("attend_self", mutated)


@contextmanager
def one_norm(case: Case) -> Iterator[None]:
    """Every type of token is normalised with the gain and bias of S."""
    forward = GroupLayerNorm.forward

    def mutated(self: GroupLayerNorm, x: Tensor, types: Tensor) -> Tensor:
        return forward(self, x, torch.full_like(types, TokenType.HISTORY))

    with mock.patch.object(GroupLayerNorm, "forward", mutated):
        yield


def stale_block(start: int, other: Callable[[Case], list[User]]) -> Mutant:
    """Keys and values of ``BLOCK`` context tokens from ``start`` come from ``other``'s context, in every layer."""

    def mutant(case: Case) -> AbstractContextManager[None]:
        project = HSTUBlock.project
        cache: dict[HSTUBlock, tuple[Tensor, Tensor]] = {}

        def record(self: HSTUBlock, x: Tensor, types: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            u, v, q, k = project(self, x, types)
            cache[self] = (k[:, :, start : start + BLOCK], v[:, :, start : start + BLOCK])
            return u, v, q, k

        with patched_block("project", record), torch.inference_mode():
            case.model(*batch(other(case), context_length=48))
        assert len(cache) == case.config.num_layers

        def replay(self: HSTUBlock, x: Tensor, types: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            u, v, q, k = project(self, x, types)
            stale_k, stale_v = cache[self]
            k[:, :, start : start + BLOCK] = stale_k
            v[:, :, start : start + BLOCK] = stale_v
            return u, v, q, k

        return patched_block("project", replay)

    return mutant


def themselves(case: Case) -> list[User]:
    return list(case.users)


def another_user(case: Case) -> list[User]:
    return [*case.users[1:], case.users[0]]


def older_context(case: Case) -> list[User]:
    """The same users when the boundary of S had not yet moved: the later half of S stood in R."""

    def older(user: User) -> User:
        context = user.context.copy()
        types = context[:, TYPE_COLUMN]
        history = np.flatnonzero(types == TokenType.HISTORY)
        types[history[len(history) // 2] :] = TokenType.REALTIME
        return User(context, user.candidates)

    return [older(user) for user in case.users]


MUTANTS: dict[str, tuple[Mutant, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]] = {
    "realtime_dropped": (realtime_dropped, same),
    "history_causal": (history_causal, same),
    "slots_shifted": (unchanged, shifted),
    "current_length": (current_length, same),
    "neighbour_seen": (neighbour_seen, same),
    "one_norm": (one_norm, same),
    "stale_block_of_another_user": (stale_block(0, another_user), same),
    "later_stale_block_of_another_user": (stale_block(BLOCK, another_user), same),
    "stale_block_of_an_older_context": (stale_block(BLOCK, older_context), same),
}


def test_the_reference_passes(case: Case) -> None:
    assert max(distances(case, unchanged, same)) <= TOLERANCE


def test_a_fresh_block_passes(case: Case) -> None:
    """The harness of the stale blocks changes nothing by itself: a user's own keys and values may be replayed."""
    assert max(distances(case, stale_block(BLOCK, themselves), same)) <= TOLERANCE


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_misses_a_hundredfold(case: Case, name: str) -> None:
    mutant, change = MUTANTS[name]
    found = distances(case, mutant, change)
    assert min(found) >= MISS, found
    # Nothing of the mutation is left behind.
    assert max(distances(case, unchanged, same)) <= TOLERANCE
