"""Converted checkpoints of every public format against loop-written float64 oracles on the format's own ids."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtgr.compat.base import ForeignModel
from mtgr.compat.nvidia import NvidiaHSTU
from mtgr.compat.research import time_bucket
from mtgr.compat.stu import STUModel, time_row
from mtgr.loading import LoadedModel, load_model, save_converted
from tests.oracles import nvidia as nvidia_oracle
from tests.oracles import research as research_oracle
from tests.oracles import stu as stu_oracle
from tests.unit.foreign import (
    Case,
    batch_of,
    nvidia_case,
    random_visitor,
    research_case,
    rows_of,
    stu_case,
    write_native,
    write_safetensors,
)

TOLERANCE = 1e-5
MIN_SPREAD = 0.03  # the sigmoid of a similarity in [-1, 1] cannot spread as a probability does

CASES: dict[str, Callable[[], Case]] = {
    "research": research_case,
    "research_concat_ua": lambda: research_case(concat_ua=True),
    "research_no_bias": lambda: research_case(bias=False),
    "research_layer_norm": lambda: research_case(user_norm="layer_norm", item_l2_norm=False),
    "research_linear": lambda: research_case(activation="none"),
    "dlrmv3": stu_case,
    "dlrmv3_group_norm": lambda: stu_case(group_norm=True, postprocess="layer_norm"),
    "dlrmv3_window": lambda: stu_case(window=3, min_lengths=(0, 0)),
    "dlrmv3_bare": lambda: stu_case(contextual=(), actions=False, postprocess="l2_norm", time_rows=0),
    "dlrmv3_categories": lambda: stu_case(categories=5, offset_positions=False),
    "dlrmv3_one_contextual": lambda: stu_case(contextual=(("user_id", 9),), tasks=1),
    "easy_rec": lambda: stu_case(easy_rec=True),
    "easy_rec_window": lambda: stu_case(easy_rec=True, window=4),
    "easy_rec_categories": lambda: stu_case(easy_rec=True, contextual=(), group_norm=True),
    "nvidia": nvidia_case,
    "nvidia_by_head": lambda: nvidia_case(fused=False),
    "nvidia_bare": lambda: nvidia_case(contextual=(), actions=0, position_rows=0, learnable=False, residual=False),
    "nvidia_retrieval": lambda: nvidia_case(retrieval=True),
    "nvidia_retrieval_items_only": lambda: nvidia_case(retrieval=True, actions=0, contextual=()),
}
# Written once more as the format's own trainer writes it.
NATIVE = ("research", "dlrmv3", "easy_rec", "nvidia_by_head")
# Events and candidates of the users in one padded batch.
SIZES = ((20, 8), (45, 5), (0, 3), (1, 1), (4, 2), (60, 4))


def loaded_case(case: Case, directory: Path, native: bool = False) -> LoadedModel:
    """Written in its format, converted, and read once more as the server reads it."""
    source = (write_native if native else write_safetensors)(case, directory / "source")
    loaded = load_model(source)
    assert loaded.origin == "public"
    assert loaded.report is not None
    assert loaded.report.format == case.format
    return save_converted(loaded, directory / "converted")


@pytest.mark.parametrize(
    ("name", "native"), [(name, False) for name in CASES] + [(name, True) for name in NATIVE], ids=str
)
def test_a_converted_checkpoint_answers_as_its_oracle(name: str, native: bool, tmp_path: Path) -> None:
    case = CASES[name]()
    loaded = loaded_case(case, tmp_path, native)
    generator = np.random.default_rng(1)
    visitors = [random_visitor(case, generator, *size) for size in SIZES]
    model = loaded.model
    assert isinstance(model, ForeignModel)
    context, candidates = batch_of([rows_of(loaded.checkpoint, visitor) for visitor in visitors], extra=3)
    with torch.inference_mode():
        scores = model(context, candidates).numpy()
    spreads = []
    for row, visitor in zip(scores, visitors, strict=True):
        expected = case.scores(visitor)
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=0, atol=TOLERANCE)
        if visitor.items and len(visitor.candidates) > 1:
            spreads.append(expected.std(axis=0).mean())
    assert np.mean(spreads) >= MIN_SPREAD, "a comparison of constants would prove nothing"

    assert ("retrieve" in model.config.operations) == (case.similarities is not None)
    if case.similarities is None:
        return
    with torch.inference_mode():
        items, found = (output.numpy() for output in model.retrieve(context))
    assert items.shape == (len(visitors), 12)
    for row, values, visitor in zip(items, found, visitors, strict=True):
        expected = case.similarities(visitor)
        order = sorted(range(len(expected)), key=lambda index: (-expected[index], index))[:12]
        np.testing.assert_allclose(values, expected[row - 2], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(values, expected[order], rtol=0, atol=TOLERANCE)
        raw = loaded.checkpoint.catalog.to_raw(row)
        assert raw.min() >= case.items[0]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["research", "stu", "nvidia"]),
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    dqk=st.integers(1, 5),
    dv=st.integers(2, 5),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    contextual=st.integers(0, 3),
    window=st.integers(0, 4),
    events=st.integers(0, 12),
    candidates=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_networks_of_any_size_answer_as_their_oracles(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    layers: int,
    heads: int,
    dqk: int,
    dv: int,
    flags: tuple[bool, bool, bool],
    contextual: int,
    window: int,
    events: int,
    candidates: int,
    seed: int,
) -> None:
    fields = tuple((f"field{index}", 3 + index) for index in range(contextual))
    sizes: dict[str, Any] = {"layers": layers, "heads": heads}
    if kind == "research":
        case = research_case(seed, dqk=dqk, dv=dv, concat_ua=flags[0], bias=flags[1], item_l2_norm=flags[2], **sizes)
    elif kind == "stu":
        case = stu_case(
            seed, dqk=dqk, dv=dv, contextual=fields, min_lengths=(2, 5, 0)[:contextual], window=window,
            easy_rec=flags[0], actions=flags[1], time_rows=40 if flags[2] else 0, **sizes,
        )  # fmt: skip
    else:
        case = nvidia_case(seed, width=dv, contextual=fields, fused=flags[0], actions=4 * flags[1],
                           learnable=flags[2], retrieval=window == 1, **sizes)  # fmt: skip
    loaded = load_model(write_safetensors(case, tmp_path_factory.mktemp("any") / "source"))
    visitor = random_visitor(case, np.random.default_rng(seed), events, candidates)
    context, rows = batch_of([rows_of(loaded.checkpoint, visitor)], extra=seed % 3)
    model = loaded.model.double()
    with torch.inference_mode():
        scores = model(context, rows)[0, :candidates].numpy()
    np.testing.assert_allclose(scores, case.scores(visitor), rtol=0, atol=TOLERANCE)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    contextual=st.integers(0, 4),
    events=st.integers(0, 7),
    candidates=st.integers(0, 3),
    window=st.integers(0, 5),
    merged=st.booleans(),
    padding=st.integers(0, 3),
)
def test_masks_of_stu_follow_the_rule(
    contextual: int, events: int, candidates: int, window: int, merged: bool, padding: int
) -> None:
    config = _stu_config(contextual, merged, window)
    n = contextual + events
    index = torch.arange(n + padding)[None]
    valid = index < n
    length = valid.sum(dim=1, keepdim=True)
    places = torch.cat([index, length.expand(-1, candidates)], dim=1)
    visible = STUModel(config)._visible(places, index, length, valid)[0]
    kinds = ["contextual"] * contextual + ["event"] * events + ["candidate"] * candidates
    for i, row in enumerate([*range(n), *range(n + padding, n + padding + candidates)]):
        expected = [stu_oracle.sees(kinds, i, j, merged, window) for j in range(n)] + [False] * padding
        assert visible[row].tolist() == expected


@settings(max_examples=40, deadline=None, derandomize=True)
@given(contextual=st.integers(0, 4), events=st.integers(0, 7), candidates=st.integers(0, 3), padding=st.integers(0, 3))
def test_masks_of_nvidia_follow_the_rule(contextual: int, events: int, candidates: int, padding: int) -> None:
    n = contextual + events
    index = torch.arange(n + padding)[None]
    valid = index < n
    places = torch.cat([index, valid.sum(dim=1, keepdim=True).expand(-1, candidates)], dim=1)
    visible = NvidiaHSTU._visible(places, index, torch.tensor([[contextual]]), valid)[0]
    kinds = ["contextual"] * contextual + ["item"] * events + ["candidate"] * candidates
    for i, row in enumerate([*range(n), *range(n + padding, n + padding + candidates)]):
        expected = [nvidia_oracle.sees(kinds, i, j) for j in range(n)] + [False] * padding
        assert visible[row].tolist() == expected


def test_time_buckets_of_research_at_their_edges() -> None:
    """Each begins at the first whole second that reaches it; later than 3 days FP32 may place it 5e-6 of it off."""

    def bucket(seconds: int) -> int:
        return int(time_bucket(torch.tensor([seconds], dtype=torch.int32), 128))

    for index in range(1, 72):
        edge = math.ceil(math.exp(0.301 * index))
        slack = 0 if edge < 300_000 else math.ceil(edge * 5e-6)
        if edge - 1 - slack >= math.exp(0.301 * (index - 1)):  # the first buckets hold no whole second
            assert bucket(edge - 1 - slack) == research_oracle.time_bucket(edge - 1 - slack) == index - 1
        if math.exp(0.301 * (index + 1)) > edge + slack < 2**31:
            assert bucket(edge + slack) == research_oracle.time_bucket(edge + slack) == index
    assert bucket(0) == bucket(1) == bucket(-1) == 0
    assert int(time_bucket(torch.tensor([2**31 - 1], dtype=torch.int32), 40)) == 40


def test_time_rows_of_stu_at_their_edges() -> None:
    """Row k begins 60 k^2 seconds before the request, to the second up to a month."""

    def row(seconds: int, rows: int = 2049) -> int:
        return int(time_row(torch.tensor([seconds], dtype=torch.int32), rows, 60.0, "sqrt"))

    assert row(0) == row(-5) == row(59) == 0
    for index in range(1, 210):
        assert row(60 * index * index) == stu_oracle.time_row(60 * index * index, 2049) == index
        assert row(60 * index * index - 1) == stu_oracle.time_row(60 * index * index - 1, 2049) == index - 1
    assert row(2**31 - 1) == 2048
    assert row(10**6, 5) == 4


def test_the_hour_is_that_of_the_moment_in_fp32(tmp_path: Path) -> None:
    """Some seconds before an hour begins, the public code, which takes moments in FP32, is in it already."""
    case = stu_case(layers=1)
    loaded = load_model(write_safetensors(case, tmp_path / "source"))
    hour = 1_700_006_400
    moments = [t for t in range(hour - 64, hour + 64) if int(np.float32(t)) // 3600 != t // 3600]
    assert moments, "fp32 has steps of 128 seconds there"
    visitor = dataclasses.replace(random_visitor(case, np.random.default_rng(0), 4, 5), request_time=moments[0])
    context, candidates = (torch.from_numpy(rows[None]) for rows in rows_of(loaded.checkpoint, visitor))
    with torch.inference_mode():
        scores = loaded.model(context, candidates)[0].numpy()
    np.testing.assert_allclose(scores, case.scores(visitor), rtol=0, atol=TOLERANCE)


def test_the_oracles_read_every_tensor(tmp_path: Path) -> None:
    """A tensor that conversion uses and an oracle does not would not be checked."""
    for name in ("research", "dlrmv3_categories", "easy_rec", "nvidia"):
        case = CASES[name]()
        loaded = load_model(write_safetensors(case, tmp_path / name))
        assert loaded.report is not None
        visitor = random_visitor(case, np.random.default_rng(0), 12, 3)
        case.scores(visitor)
        assert case.used() == set(case.state) - set(loaded.report.unused)


def _stu_config(contextual: int, merged: bool, window: int) -> Any:
    from mtgr.compat.stu import STUConfig

    return STUConfig(
        num_items=3, d_model=4, num_layers=1, num_heads=1, dqk=2, dv=2, attention_norm_length=8, norm_epsilon=1e-6,
        max_history=9, num_profile=max(contextual, 1), contextual_sizes=(3,) * contextual,
        contextual_min_lengths=(0,) * contextual, contextual_attention=merged, max_attention_length=window,
        item_widths=(2,), item_table_rows=(3,),
    )  # fmt: skip
