"""Random rows that obey a schema, to trace graphs with and to check artifacts on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtgr.errors import ConfigurationError
from mtgr.features.candidates import candidate_rows
from mtgr.features.catalog import ItemCatalog
from mtgr.features.context import context_rows
from mtgr.features.state import CandidateState, build_candidate_state
from mtgr.schema import FIRST_ID, UNKNOWN, Schema

Int32Array = npt.NDArray[np.int32]


def random_rows(
    schema: Schema, catalog: ItemCatalog, batch: int, context: int, candidates: int, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A padded batch of users of random lengths, the first of full length.

    Args:
        schema: The schema.
        catalog: The items.
        batch: Users.
        context: Tokens of the longest context, 1 to ``schema.max_context``.
        candidates: Candidates of each user.
        generator: Source of randomness.

    Returns:
        INT32 [batch, context, W] and INT32 [batch, candidates, W].

    Raises:
        ConfigurationError: If no context of this schema is that long.
    """
    if context > schema.max_context:
        raise ConfigurationError(f"contexts of this schema have {schema.max_context} tokens at most, not {context}.")
    contexts = np.zeros((batch, context, schema.width), dtype=np.int32)
    targets = np.zeros((batch, candidates, schema.width), dtype=np.int32)
    for user in range(batch):
        length = context if user == 0 else int(generator.integers(1, context + 1))
        rows, state = _random_user(schema, catalog, length, generator)
        contexts[user, :length] = rows
        items = generator.integers(UNKNOWN, schema.num_items, candidates)
        targets[user] = candidate_rows(schema, catalog, state, items)
    return torch.from_numpy(contexts), torch.from_numpy(targets)


def _random_user(
    schema: Schema, catalog: ItemCatalog, length: int, generator: np.random.Generator
) -> tuple[Int32Array, CandidateState]:
    """Rows of a user with ``length`` tokens, and a random state that goes with them."""
    num_events = max(0, length - len(schema.profile))
    span = (len(catalog.popularity) + 1) * 86_400
    items = generator.integers(FIRST_ID, schema.num_items, num_events)
    actions = generator.integers(0, schema.num_actions, num_events).astype(np.int32)
    times = np.sort(schema.epoch + generator.integers(0, span, num_events))
    profile: dict[str, str | float] = {
        field.name: generator.choice(field.values) if field.values else float(generator.choice(field.boundaries))
        for field in schema.profile
    }
    # A boundary that keeps the whole history, so that the length is met to the token.
    fewest_realtime = max(0, num_events - schema.max_history)
    static_events = num_events - min(num_events, int(generator.integers(fewest_realtime, schema.realtime_step)))
    rows = context_rows(schema, profile, items, actions, times, static_events)[:length]
    request_time = int(schema.epoch + span + generator.integers(0, 86_400))
    state = build_candidate_state(schema, catalog, items, actions, times, request_time, length)
    return rows, state
