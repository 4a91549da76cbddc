"""Engines in memory for the tests of the router, and requests and a policy to ask them with."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.errors import UnavailableError
from mtgr.features.extract import Features
from mtgr.features.state import build_candidate_state
from mtgr.routing.admission import AdmissionConfig
from mtgr.routing.choice import AutoConfig
from mtgr.routing.config import RoutingConfig
from mtgr.routing.policy import Policy
from mtgr.routing.ranker import Ranking
from mtgr.routing.router import Router
from mtgr.routing.strategies import STRATEGIES
from mtgr.schema import FIRST_ID, SLOT_COLUMN, TYPE_COLUMN, TokenType
from tests.unit.models import EPOCH, small_catalog, small_schema

Arrays = dict[str, npt.NDArray[Any]]

NUM_ITEMS = 3002
SCHEMA = small_schema(NUM_ITEMS)
CATALOG = small_catalog(NUM_ITEMS)
REQUEST_TIME = EPOCH + 10_000
# What the fake engines say of each internal id: distinct, and in another order for every task.
TABLE = np.random.default_rng(0).permuted(np.linspace(0.01, 0.99, 3 * NUM_ITEMS).reshape(NUM_ITEMS, 3), axis=0)
TABLE = TABLE.astype(np.float32)
WEIGHTS = {"engagement": 1.0, "retention": 0.1, "monetization": 0.5}


class FakeEngines:
    """Engines that look scores up in a table and write down what they were asked."""

    def __init__(
        self,
        unready: Mapping[str, str] | None = None,
        failing: Sequence[str] = (),
        table: npt.NDArray[np.float32] = TABLE,
        retrieved: npt.NDArray[np.int32] | None = None,
    ) -> None:
        self.unready = unready or {}
        self.failing = failing
        self.table = table
        self.retrieved = np.arange(FIRST_ID, NUM_ITEMS, dtype=np.int32) if retrieved is None else retrieved
        self.calls: list[tuple[str, Arrays]] = []
        self.hold: dict[str, asyncio.Event] = {}

    def unready_reason(self, model: str) -> str | None:
        return self.unready.get(model)

    async def infer(self, model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        self.calls.append((model, dict(inputs)))
        if model in self.hold:
            await self.hold[model].wait()
        if model in self.failing:
            raise UnavailableError(f"{model} failed: out of memory")
        if "candidates" in inputs:
            assert list(outputs) == ["task_scores"]
            candidates = inputs["candidates"]
            scores = self.table[candidates[..., SCHEMA.item_column]]
            # Padding must never reach a result.
            scores[candidates[..., TYPE_COLUMN] == TokenType.PADDING] = np.nan
            return {"task_scores": scores}
        assert list(outputs) == ["items"]
        return {"items": np.repeat(self.retrieved[None], len(inputs["context"]), axis=0)}

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        return [inputs[name].shape for _, inputs in self.calls if name in inputs]


def features(
    candidates: Sequence[int] | npt.NDArray[np.int64] = (),
    *,
    strategy: str = "onnx",
    top_k: int = 0,
    seen: Sequence[int] = (),
    context: int = 5,
    labels: tuple[str, ...] = (),
) -> Features:
    """A request of a user with events on the internal ids ``seen``."""
    items = np.asarray(seen, dtype=np.int64)
    times = EPOCH + np.arange(len(items), dtype=np.int64)
    actions = np.ones(len(items), dtype=np.int32)
    state = build_candidate_state(SCHEMA, CATALOG, items, actions, times, REQUEST_TIME, context)
    rows = np.ones((context, SCHEMA.width), dtype=np.int32)
    rows[:, SLOT_COLUMN] = np.arange(context)
    return Features(
        context=rows,
        candidate_state=state.to_array(SCHEMA.epoch),
        candidates=np.asarray(candidates, dtype=np.int64),
        strategy=strategy,
        top_k=top_k,
        arm="treatment",
        labels=labels,
    )


def policy(**routing: Any) -> Policy:
    """No measuring, no shedding: what serves is decided by the order alone."""
    return Policy(
        "test",
        auto=AutoConfig(adaptive=False),
        routing=RoutingConfig(**routing),
        admission=AdmissionConfig(max_concurrent=1024, shedding=False),
    )


def route(engines: FakeEngines, request: Features, **config: Any) -> Ranking:
    return asyncio.run(Router(SCHEMA, CATALOG, engines, policy(**config)).route(request))


def expected_order(raw: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``raw``, ascending ids, by falling score; where rounding makes scores equal, the lower id comes first."""
    scores = TABLE[CATALOG.to_internal(raw)] @ np.array([WEIGHTS[name] for name in SCHEMA.task_names])
    return raw[np.argsort(-scores.astype(np.float32), kind="stable")]


def unready_except(*strategies: str) -> dict[str, str]:
    models = {model for name, entry in STRATEGIES.items() if name not in strategies for model in entry.models}
    return {model: f"{model} is not installed" for model in models}
