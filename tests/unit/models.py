"""Random small networks, and rows that obey their schema, for tests of the reference and its exports."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mtgr.checkpoint import build_model
from mtgr.config import ModelConfig
from mtgr.data.dataset import Interactions, Item
from mtgr.features.catalog import ItemCatalog, build_catalog
from mtgr.model import MTGR
from mtgr.model.heads import MMoEHeads
from mtgr.model.norm import GroupLayerNorm
from mtgr.schema import (
    FIRST_COLUMN,
    FIRST_ID,
    SLOT_COLUMN,
    TIME,
    TYPE_COLUMN,
    ProfileField,
    Schema,
    TaskSpec,
    TokenType,
)

Int32Array = npt.NDArray[np.int32]

EPOCH = 1_000_000_000
DAYS = 3
NUM_ACTIONS = 5
LIKED_ACTION = 3
CATEGORIES = ("action", "comedy", "drama")


def small_schema(num_items: int = 40, **overrides: Any) -> Schema:
    """A schema of three profile fields and three tasks whose catalogue is ``small_catalog(num_items)``."""
    values: dict[str, Any] = {
        "name": "random",
        "epoch": EPOCH,
        "profile": (
            ProfileField("gender", values=("F", "M")),
            ProfileField("age", boundaries=(18.0, 30.0, 50.0)),
            ProfileField("city", values=("a", "b", "c", "d")),
        ),
        "num_items": num_items,
        "items_hash": small_catalog(num_items).hash,
        "num_actions": NUM_ACTIONS,
        "liked_action": LIKED_ACTION,
        "categories": CATEGORIES,
        "tasks": (TaskSpec("engagement", "a"), TaskSpec("retention", "b"), TaskSpec("monetization", "c")),
        "max_history": 200,
        "realtime_step": 100,
    }
    return Schema(**(values | overrides))


def small_catalog(num_items: int = 40, seed: int = 0) -> ItemCatalog:
    """Items of random categories and years, known from random events of the days after ``EPOCH``."""
    generator = np.random.default_rng(seed)
    ids = 10 + 3 * np.arange(num_items - FIRST_ID)
    items = [
        Item(
            int(item),
            f"title {item}",
            tuple(name for name in CATEGORIES if generator.random() < 0.5),
            int(generator.integers(1950, 2000)),
        )
        for item in ids
    ]
    events = 20 * num_items
    users = np.sort(generator.integers(0, 25, events))
    times = generator.integers(EPOCH, EPOCH + DAYS * 86_400, events)
    known = Interactions(
        user=users,
        item=generator.choice(ids, events),
        action=generator.integers(0, NUM_ACTIONS, events).astype(np.int32),
        time=times[np.lexsort((times, users))],
    )
    return build_catalog(items, CATEGORIES, known, LIKED_ACTION)


def small_config(**overrides: Any) -> ModelConfig:
    """A network that runs in milliseconds.

    Epsilon is far above the default, so that the constant N, which only acts against epsilon, shows in the scores.
    """
    values: dict[str, Any] = {
        "num_layers": 2,
        "d_model": 24,
        "num_heads": 2,
        "attention_norm_length": 64,
        "norm_epsilon": 1e-3,
        "max_positions": 512,
        "feature_dim": 6,
        "item_dim": 10,
        "num_experts": 3,
        "head_dim": 12,
        "retrieve_count": 16,
    }
    return ModelConfig(**(values | overrides))


def spread_model(config: ModelConfig, schema: Schema, catalog: ItemCatalog, seed: int = 0) -> MTGR:
    """A network in eval mode whose random weights let its scores spread.

    Every parameter is drawn anew, also those that start at zero or one, so that none can be left out unnoticed.
    """
    torch.manual_seed(seed)
    model = build_model(config, schema, catalog)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("wide_terms.") or name == "next_item_head.bias":
                parameter.normal_(std=0.2)
        for module in model.modules():
            if isinstance(module, GroupLayerNorm):
                module.gain.normal_(mean=1.0, std=0.4)
                module.bias.normal_(std=0.3)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(std=1.4 * module.in_features**-0.5)
                if module.bias is not None:
                    module.bias.normal_(std=0.2)
        for module in model.embedding.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_()
        model.embedding.position_table.weight.normal_(std=0.5)
        if model.relative_bias is not None:
            model.relative_bias.position_table.normal_(std=0.5)
            model.relative_bias.time_table.normal_(std=0.5)
    _standardise_logits(model.eval(), schema, seed)
    return model


@torch.no_grad()
def _standardise_logits(model: MTGR, schema: Schema, seed: int) -> None:
    """Scale and shift what is linear in the task logits, so that these have mean 0 and deviation 1 over candidates.

    Without it a task may saturate, and probabilities that are all but 1 agree whatever the network does.
    """
    generator = np.random.default_rng(seed)
    rows = batch([random_user(schema, generator, candidates=24) for _ in range(4)])
    logits = model(*rows).double().logit(eps=1e-7)
    scale = (1.0 / logits.std(dim=1).mean(dim=0)).float()
    center = logits.mean(dim=(0, 1)).float()
    heads = model.task_heads
    weight, bias = (heads.tower, heads.tower_bias) if isinstance(heads, MMoEHeads) else heads.towers.parameters()
    weight.mul_(scale[:, None])
    bias.sub_(center).mul_(scale)
    model.wide_terms.table.weight.mul_(scale)


@dataclasses.dataclass(frozen=True)
class User:
    """One user's rows, without padding: INT32 [n, W] and INT32 [k, W]."""

    context: Int32Array
    candidates: Int32Array


def random_user(
    schema: Schema,
    generator: np.random.Generator,
    *,
    profile: int = 3,
    history: int = 10,
    realtime: int = 5,
    candidates: int = 8,
    by_time: bool = False,
) -> User:
    """Random rows: profile, history, real-time and candidate tokens; every id of a column, reserved ones too, occurs.

    Args:
        schema: The schema.
        generator: Source of randomness.
        profile: Profile tokens, at most as many as the schema has fields.
        history: Tokens of S.
        realtime: Tokens of R.
        candidates: Candidates.
        by_time: Whether each candidate has a moment of its own, as in training: one within R, often that of a token
            of R. Otherwise all share the moment of the request, after R.
    """
    n = profile + history + realtime
    context = np.zeros((n, schema.width), dtype=np.int32)
    context[:, SLOT_COLUMN] = np.arange(n)
    context[:profile, TYPE_COLUMN] = TokenType.PROFILE
    context[profile : profile + history, TYPE_COLUMN] = TokenType.HISTORY
    context[profile + history :, TYPE_COLUMN] = TokenType.REALTIME
    first = FIRST_ID
    for index, field in enumerate(schema.profile[:profile]):
        context[index, FIRST_COLUMN] = first + generator.integers(field.size)
        first += field.size
    # Gaps from a second to years, and now and then none: events of one second are common.
    gaps = np.floor(np.exp(generator.uniform(-1, 12, history + realtime))).astype(np.int64)
    times = np.cumsum(gaps)
    _fill(context[profile:], schema, schema.event_columns, times, generator)

    rows = np.zeros((candidates, schema.width), dtype=np.int32)
    rows[:, TYPE_COLUMN] = TokenType.CANDIDATE
    rows[:, SLOT_COLUMN] = n + np.arange(candidates)
    last = int(times[-1]) if len(times) else 1000
    if by_time:
        moments = np.sort(generator.choice(np.append(times[history:], last + 1), candidates))
        moments = moments + generator.integers(0, 2, candidates)
    else:
        moments = np.full(candidates, last + int(np.exp(generator.uniform(0, 12))))
    _fill(rows, schema, schema.candidate_columns, moments, generator)
    return User(context, rows)


def _fill(
    rows: Int32Array,
    schema: Schema,
    columns: Sequence[str],
    times: npt.NDArray[np.int64],
    generator: np.random.Generator,
) -> None:
    for column, name in enumerate(columns, start=FIRST_COLUMN):
        rows[:, column] = times if name == TIME else generator.integers(0, schema.column_size(name), len(rows))


def pad(rows: Int32Array, length: int) -> Int32Array:
    """``rows`` padded on the right with rows of type 0 to ``length``."""
    padded = np.zeros((length, rows.shape[1]), dtype=np.int32)
    padded[: len(rows)] = rows
    return padded


def batch(users: Sequence[User], context_length: int = 0, num_candidates: int = 0) -> tuple[Tensor, Tensor]:
    """Users padded to the longest of them, or to the given lengths if these are larger: INT32 [B, n, W], [B, k, W]."""
    n = max(context_length, *(len(user.context) for user in users))
    k = max(num_candidates, *(len(user.candidates) for user in users))
    return (
        torch.from_numpy(np.stack([pad(user.context, n) for user in users])),
        torch.from_numpy(np.stack([pad(user.candidates, k) for user in users])),
    )


def state_of(model: MTGR) -> dict[str, npt.NDArray[Any]]:
    """Parameters and buffers as arrays."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
