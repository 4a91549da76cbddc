"""Random checkpoints written as public code writes them, users for them, and what their oracles say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file

from mtgr.checkpoint import Checkpoint
from mtgr.features.candidates import candidate_rows
from mtgr.features.context import context_rows
from mtgr.features.state import build_candidate_state
from tests.oracles.nvidia import NvidiaOracle
from tests.oracles.nvidia import Settings as NvidiaSettings
from tests.oracles.research import ResearchOracle
from tests.oracles.research import Settings as ResearchSettings
from tests.oracles.stu import Event, STUOracle
from tests.oracles.stu import Settings as STUSettings

Array = npt.NDArray[Any]
State = dict[str, Array]

NOW = 1_700_000_000


@dataclass(frozen=True)
class Visitor:
    """A request in raw ids: what a client knows."""

    items: tuple[int, ...]
    actions: tuple[int, ...]
    times: tuple[int, ...]
    candidates: tuple[int, ...]
    request_time: int
    profile: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A checkpoint of one format.

    Attributes:
        name: For test ids.
        format: What the loader should find.
        state: Tensors by the format's names.
        options: What ``mtgr.json`` says.
        scores: The oracle's probabilities [k, T] for a visitor.
        similarities: The oracle's similarities of all items, for retrievers.
        used: Names of the tensors that the oracle has read.
        items: Raw ids of its items: the first and how many.
        actions: Kinds of action.
        contextual: Names and sizes of profile fields.
    """

    name: str
    format: str
    state: State
    options: dict[str, Any]
    scores: Callable[[Visitor], Array]
    similarities: Callable[[Visitor], Array] | None
    used: Callable[[], set[str]]
    items: tuple[int, int]
    actions: int
    contextual: tuple[tuple[str, int], ...] = ()


def random_visitor(case: Case, generator: np.random.Generator, events: int, candidates: int) -> Visitor:
    """Events of all gaps, some of items, actions or profile values that nobody knows."""
    first, count = case.items
    ids = np.arange(first, first + count)
    gaps = np.floor(np.exp(generator.uniform(-1, 11, events))).astype(np.int64)
    items = generator.choice(ids, events)
    items[generator.random(events) < 0.1] = first + count + 7
    wanted = generator.choice(ids, candidates, replace=candidates > count)
    if candidates > 1:
        wanted[-1] = first + count + 9
    profile = {name: str(generator.integers(size)) for name, size in case.contextual if generator.random() < 0.8}
    return Visitor(
        items=tuple(items.tolist()),
        actions=tuple(generator.integers(0, case.actions + 1, events).tolist()),
        times=tuple((NOW - gaps[::-1].cumsum()[::-1]).tolist()),
        candidates=tuple(wanted.tolist()),
        request_time=NOW + int(generator.integers(0, 5_000)),
        profile=profile,
    )


def rows_of(checkpoint: Checkpoint, visitor: Visitor) -> tuple[Array, Array]:
    """INT32 [n, W] and [k, W], built as the door builds them."""
    schema, catalog = checkpoint.schema, checkpoint.catalog
    items = catalog.to_internal(np.array(visitor.items, dtype=np.int64))
    actions, times = np.array(visitor.actions, dtype=np.int32), np.array(visitor.times, dtype=np.int64)
    context = context_rows(schema, visitor.profile, items, actions, times)
    state = build_candidate_state(schema, catalog, items, actions, times, visitor.request_time, len(context))
    wanted = catalog.to_internal(np.array(visitor.candidates, dtype=np.int64))
    return context, candidate_rows(schema, catalog, state, wanted)


def batch_of(pairs: Sequence[tuple[Array, Array]], extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Users padded to the longest of them, and by ``extra`` rows more."""
    parts = []
    for column in (0, 1):
        length = max(len(pair[column]) for pair in pairs) + extra
        padded = np.zeros((len(pairs), length, pairs[0][0].shape[1]), dtype=np.int32)
        for index, pair in enumerate(pairs):
            padded[index, : len(pair[column])] = pair[column]
        parts.append(torch.from_numpy(padded))
    return parts[0], parts[1]


def write_safetensors(case: Case, directory: Path) -> Path:
    """As a publisher would: tensors and options in one folder."""
    directory.mkdir(parents=True)
    save_file(
        {name: np.ascontiguousarray(value) for name, value in case.state.items()}, directory / "model.safetensors"
    )
    (directory / "mtgr.json").write_text(json.dumps(case.options), encoding="utf-8")
    return directory


def write_native(case: Case, directory: Path) -> Path:
    """As the format's own trainer does: ``torch.save`` of a dictionary with other things in it."""
    directory.mkdir(parents=True)
    (directory / "mtgr.json").write_text(json.dumps(case.options), encoding="utf-8")
    state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in case.state.items()}
    if case.format == "meta-research":
        wrapped = {f"module.{name}": value for name, value in state.items()}
        torch.save({"epoch": 100, "model_state_dict": wrapped, "optimizer_state_dict": {}}, directory / "model.pt")
    elif case.format == "meta-dlrmv3":
        inner = {"dense_dict": state, "optimizer_dict": {}, "global_step": 7, "sparse_tensor_keys": set()}
        torch.save(inner, directory / "non_sparse.ckpt")
    elif case.format == "nvidia":
        (directory / "torch_module").mkdir()
        path = directory / "torch_module" / "model.0.pth"
        torch.save({"model_state_dict": state, "optimizer_state_dict": None}, path)
    else:
        torch.save({f"model.{name}": value for name, value in state.items()}, directory / "model.pth")
    return directory


class _Maker:
    """Random tensors in fp32."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.state: State = {}

    def normal(self, name: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> None:
        self.state[name] = self.generator.normal(mean, std, shape).astype(np.float32)

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        self.normal(f"{name}.weight", outputs, inputs, std=1.3 * inputs**-0.5)
        self.normal(f"{name}.bias", outputs, std=0.3)

    def norm(self, gain: str, bias: str, width: int) -> None:
        self.normal(gain, width, std=0.3, mean=1.0)
        self.normal(bias, width, std=0.3)


def research_case(
    seed: int = 0,
    *,
    num_items: int = 30,
    d: int = 12,
    layers: int = 2,
    heads: int = 2,
    dqk: int = 5,
    dv: int = 4,
    positions: int = 60,
    concat_ua: bool = False,
    bias: bool = True,
    user_norm: str = "l2_norm",
    item_l2_norm: bool = True,
    activation: str = "silu",
    max_history: int = 45,
) -> Case:
    m = _Maker(seed)
    m.normal("_embedding_module._item_emb.weight", num_items + 1, d, std=0.3)
    m.normal("_input_features_preproc._pos_emb.weight", positions, d, std=0.4)
    m.state["_attn_mask"] = np.triu(np.ones((positions, positions), dtype=bool), k=1)
    for layer in range(layers):
        name = f"_hstu._attention_layers.{layer}."
        m.normal(name + "_uvqk", d, 2 * heads * (dqk + dv), std=1.5 * d**-0.5)
        m.linear(name + "_o", heads * dv * (3 if concat_ua else 1), d)
        if bias:
            m.normal(name + "_rel_attn_bias._pos_w", 2 * positions - 1, std=0.7)
            m.normal(name + "_rel_attn_bias._ts_w", 129, std=0.7)
    oracle = ResearchOracle(m.state, ResearchSettings(heads, concat_ua, activation, user_norm, item_l2_norm))

    def history(visitor: Visitor) -> tuple[list[int], list[int]]:
        items = [item if 1 <= item <= num_items else 0 for item in visitor.items[-max_history:]]
        return items, list(visitor.times[-max_history:])

    def scores(visitor: Visitor) -> Array:
        found = oracle.similarities(*history(visitor), visitor.request_time)
        known = [item if 1 <= item <= num_items else 0 for item in visitor.candidates]
        return 1.0 / (1.0 + np.exp(-found[known]))[:, None]

    return Case(
        name="research",
        format="meta-research",
        state=m.state,
        options={
            "num_heads": heads,
            "max_history": max_history,
            "concat_ua": concat_ua,
            "user_embedding_norm": user_norm,
            "item_l2_norm": item_l2_norm,
            "linear_activation": activation,
            "retrieve_count": 12,
        },
        scores=scores,
        similarities=lambda visitor: oracle.similarities(*history(visitor))[1:],
        used=lambda: oracle.p.used,
        items=(1, num_items),
        actions=1,
    )


def stu_case(
    seed: int = 0,
    *,
    easy_rec: bool = False,
    num_items: int = 30,
    table: int = 6,
    d: int = 12,
    layers: int = 2,
    heads: int = 2,
    dqk: int = 4,
    dv: int = 5,
    contextual: tuple[tuple[str, int], ...] = (("user_id", 9), ("age", 4)),
    min_lengths: tuple[int, ...] = (6, 0),
    categories: int = 0,
    actions: bool = True,
    group_norm: bool = False,
    postprocess: str = "time_layer_norm",
    time_rows: int = 40,
    position_rows: int = 50,
    window: int = 0,
    tasks: int = 2,
    norm_length: int = 32,
    max_history: int = 45,
    offset_positions: bool = True,
) -> Case:
    m = _Maker(seed)
    inner, gain, bias = ("_mlp.", "_weight", "_bias") if easy_rec else ("", "weight", "bias")
    pre = "_hstu_transducer._input_preprocessor."

    def table_name(name: str, sequence: bool) -> str:
        if not easy_rec:
            return f"_embedding_collection.embeddings.{name}.weight"
        kind = "seq_emb_impls.__BASE__.ec_list.0.embeddings" if sequence else "emb_impls.__BASE__.ebc.embedding_bags"
        return f"embedding_group.{kind}.{name}_emb.weight"

    def mlp(name: str, inputs: int, hidden: int, between: str = inner) -> None:
        m.linear(f"{name}.{between}0", inputs, hidden)
        m.norm(f"{name}.{between}1.{gain}", f"{name}.{between}1.{bias}", hidden)
        m.linear(f"{name}.{between}2", hidden, d)
        m.norm(f"{name}.{between}3.{gain}", f"{name}.{between}3.{bias}", d)

    items = [table_name("item_id", True)]
    m.normal(items[0], num_items, table)
    widths = [table]
    if categories:
        items.append(table_name("category", True))
        m.normal(items[1], categories, table)
        m.state["item_features.category"] = m.generator.integers(0, categories, num_items)
        widths.append(table)
    tables = [table_name(name, False) for name, _ in contextual]
    for name, (_, size) in zip(tables, contextual, strict=True):
        m.normal(name, size, table)
    if contextual:
        m.normal(pre + "_batched_contextual_linear_weights", len(contextual), table, d, std=table**-0.5)
        m.normal(pre + "_batched_contextual_linear_bias", len(contextual), d, std=0.3)
    mlp(pre + "_content_embedding_mlp", table, 7)
    if not easy_rec:  # the public code makes it even where nothing goes in
        mlp(pre + "_additional_embedding_mlp", sum(widths[1:]), 7) if categories else _empty_mlp(m, pre, d)
    weights = (1, 2, 4, 8)
    if actions:
        encoder = pre + "_action_encoder."
        m.state[encoder + "_combined_action_weights"] = np.array(weights)
        m.normal(encoder + "_action_embedding_table", len(weights), 3)
        m.normal(encoder + "_target_action_embedding_table", 1, 3 * len(weights))
        mlp(pre + "_action_embedding_mlp", 3 * len(weights), 8)
    position = "_hstu_transducer._positional_encoder."
    if position_rows:
        m.normal(position + "_position_embeddings_weight", position_rows, d)
    if time_rows:
        m.normal(position + "_timestamp_embeddings_weight", time_rows, d)
    for layer in range(layers):
        name = f"_hstu_transducer._stu_module._stu_layers.{layer}."
        m.normal(name + "_uvqk_weight", d, 2 * heads * (dqk + dv), std=1.5 * d**-0.5)
        m.normal(name + "_uvqk_beta", 2 * heads * (dqk + dv), std=0.2)
        m.norm(name + "_input_norm_weight", name + "_input_norm_bias", d)
        m.normal(name + "_output_weight", 3 * heads * dv, d, std=(heads * dv) ** -0.5)
        m.norm(name + "_output_norm_weight", name + "_output_norm_bias", heads if group_norm else heads * dv)
    output = "_hstu_transducer._output_postprocessor."
    if postprocess != "l2_norm":
        m.norm(output + "_layer_norm.weight", output + "_layer_norm.bias", d)
    if postprocess == "time_layer_norm":
        m.state[output + "_period_units"] = np.array([[3600.0, 86_400.0]], dtype=np.float32)
        m.state[output + "_units_per_period"] = np.array([[24.0, 7.0]], dtype=np.float32)
        m.linear(output + "_time_feature_combiner", d + 4, d)
    mlp("_item_embedding_mlp", sum(widths), 9, "")
    if easy_rec:
        m.linear("_multitask_module.tower_mlp.mlp.0.perceptron.0", d, 10)
        m.norm(*(f"_multitask_module.tower_mlp.mlp.0.perceptron.1.{part}" for part in ("weight", "bias")), 10)
        m.linear("_multitask_module.linear", 10, tasks)
        m.state["_multitask_module.linear.weight"] *= 2  # else the probabilities hardly differ
    else:
        m.linear("_multitask_module._prediction_module.0", d, 10)
        m.norm(*(f"_multitask_module._prediction_module.1.{part}" for part in ("weight", "bias")), 10)
        m.linear("_multitask_module._prediction_module.2", 10, tasks)
        if postprocess == "l2_norm":  # then its input is small
            m.state["_multitask_module._prediction_module.0.weight"] *= 4

    masks = (0, 1, 2, 5, 15)
    settings = STUSettings(
        heads, norm_length, tuple(items), tuple(tables), min_lengths[: len(contextual)], easy_rec, window,
        offset_positions,
    )  # fmt: skip
    oracle = STUOracle(m.state, settings)

    def known(item: int) -> int:
        return item if 0 <= item < num_items else 0

    def scores(visitor: Visitor) -> Array:
        values = [visitor.profile.get(name) for name, _ in contextual]
        events = [
            Event(known(item), time, masks[action] if action < len(masks) else 0)
            for item, time, action in zip(visitor.items, visitor.times, visitor.actions, strict=True)
        ]
        return oracle.scores(
            [None if value is None else int(value) for value in values],
            events[-max_history:],
            [known(item) for item in visitor.candidates],
            visitor.request_time,
        )

    options: dict[str, Any] = {
        "num_heads": heads,
        "attention_norm_length": norm_length,
        "max_history": max_history,
        "item_tables": ["item_id", *(["category"] if categories else [])],
        "contextual": [name for name, _ in contextual],
        "contextual_min_lengths": list(min_lengths[: len(contextual)]),
        "max_attn_len": window,
        "tasks": [f"task{index}" for index in range(tasks)],
        "contextual_positions": offset_positions,
    }
    if actions:
        options["action_masks"] = list(masks)
    return Case(
        name="easy_rec" if easy_rec else "dlrmv3",
        format="torch-easy-rec" if easy_rec else "meta-dlrmv3",
        state=m.state,
        options=options,
        scores=scores,
        similarities=None,
        used=lambda: oracle.p.used,
        items=(0, num_items),
        actions=len(masks),
        contextual=contextual,
    )


def _empty_mlp(m: _Maker, pre: str, d: int) -> None:
    """The MLP of further item features where there are none: its first layer has no inputs."""
    name = pre + "_additional_embedding_mlp"
    m.state[f"{name}.0.weight"] = np.zeros((7, 0), dtype=np.float32)
    m.state[f"{name}.0.bias"] = np.zeros(7, dtype=np.float32)
    m.norm(f"{name}.1.weight", f"{name}.1.bias", 7)
    m.linear(f"{name}.2", 7, d)
    m.norm(f"{name}.3.weight", f"{name}.3.bias", d)


def nvidia_case(
    seed: int = 0,
    *,
    retrieval: bool = False,
    fused: bool = True,
    num_items: int = 30,
    d: int = 12,
    layers: int = 2,
    heads: int = 3,
    width: int = 4,
    contextual: tuple[tuple[str, int], ...] = (("user_id", 9), ("age", 4)),
    actions: int = 5,
    position_rows: int = 70,
    learnable: bool = True,
    residual: bool = True,
    tasks: int = 2,
    norm_length: int = 40,
    max_history: int = 45,
) -> Case:
    m = _Maker(seed)

    def table(name: str) -> str:
        return f"_embedding_collection._model_parallel_embedding_collection.embeddings.{name}.weight"

    m.normal(table("item"), num_items, d, std=0.5)
    if actions:
        m.normal(table("action"), actions, d, std=0.5)
    for name, size in contextual:
        m.normal(table(name), size, d, std=0.5)
    position = "_hstu_block._preprocessor._positional_encoder._position_embeddings_weight"
    if position_rows:
        m.normal(position, position_rows, d)
    for layer in range(layers):
        name = f"_hstu_block._attention_layers.{layer}."
        wide = heads * width
        if fused:
            m.normal(name + "_linear_uvqk_weight", d, 4 * wide, std=1.5 * d**-0.5)
            m.normal(name + "_linear_uvqk_bias", 4 * wide, std=0.2)
            m.normal(name + "_linear_proj_weight", wide, d, std=1.3 * wide**-0.5)
        else:
            m.linear(name + "_linear_uvqk", d, 4 * wide)
            m.normal(name + "_linear_proj.weight", d, wide, std=1.3 * wide**-0.5)
        if learnable:
            m.norm(name + "_input_layernorm_weight", name + "_input_layernorm_bias", d)
        m.norm(name + "_output_layernorm_weight", name + "_output_layernorm_bias", wide)
    if not retrieval:
        m.linear("_mlp._mlp._mlp.0._linear", d, 9)
        m.linear("_mlp._mlp._mlp.1._linear", 9, tasks)
        m.state["_mlp._mlp._mlp.0._linear.weight"] *= 3  # its input has length 1
    oracle = NvidiaOracle(
        m.state,
        NvidiaSettings(
            heads, norm_length, table("item"), table("action") if actions else "",
            tuple(table(name) for name, _ in contextual), not fused, residual,
        ),
    )  # fmt: skip

    def known(item: int, count: int = num_items) -> int:
        return item if 0 <= item < count else 0

    def past(visitor: Visitor) -> tuple[list[int | None], list[tuple[int, int]]]:
        values = [visitor.profile.get(name) for name, _ in contextual]
        pairs = zip(visitor.items, visitor.actions, strict=True)
        events = [(known(item), known(action, actions)) for item, action in pairs]
        return [None if value is None else int(value) for value in values], events[-max_history:]

    def similarities(visitor: Visitor) -> Array:
        return oracle.similarities(*past(visitor))

    def scores(visitor: Visitor) -> Array:
        if retrieval:
            found = similarities(visitor)[[known(item) for item in visitor.candidates]]
            return 1.0 / (1.0 + np.exp(-found))[:, None]
        return oracle.scores(*past(visitor), [known(item) for item in visitor.candidates])

    options: dict[str, Any] = {
        "num_heads": heads,
        "attention_norm_length": norm_length,
        "max_history": max_history,
        "item_table": "item",
        "contextual": [name for name, _ in contextual],
        "residual": residual,
        "retrieve_count": 12,
    }
    if actions:
        options["action_table"] = "action"
    if not retrieval:
        options["tasks"] = [f"task{index}" for index in range(tasks)]
    return Case(
        name="nvidia_retrieval" if retrieval else "nvidia",
        format="nvidia",
        state=m.state,
        options=options,
        scores=scores,
        similarities=similarities if retrieval else None,
        used=lambda: oracle.p.used,
        items=(0, num_items),
        actions=max(actions, 1),
        contextual=contextual,
    )
