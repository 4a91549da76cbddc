"""Checkpoints of Meta's DLRMv3 (also MLPerf's) and of TorchEasyRec's DlrmHSTU: one network, two ways to name it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtgr.compat.convert import Plan, Source
from mtgr.compat.formats.format import (
    Format,
    contextual_sizes,
    served_items,
    split_heads,
    table_of_profile,
    transposed,
)
from mtgr.compat.options import Options
from mtgr.compat.stu import STUConfig, STUModel
from mtgr.compat.tensors import ForeignTensors
from mtgr.compat.world import make_world
from mtgr.errors import ConfigurationError
from mtgr.schema import FIRST_ID

_LAYER = "_hstu_transducer._stu_module._stu_layers.{}."
_INPUT = "_hstu_transducer._input_preprocessor."
_ENCODER = "_hstu_transducer._positional_encoder."
_OUTPUT = "_hstu_transducer._output_postprocessor."
_CONTEXTUAL = _INPUT + "_batched_contextual_linear_"


@dataclass(frozen=True)
class _Dialect:
    """What the two differ in.

    Attributes:
        name: Of the format.
        table: Pattern of an embedding table's name.
        mlp: Where the layers of an input MLP stand below its name.
        gain: Name of the gain of a norm in such an MLP.
        bias: Name of its bias.
        merges_contextual: Whether contextual tokens share one place in the mask, and see the whole context.
    """

    name: str
    table: re.Pattern[str]
    mlp: str
    gain: str
    bias: str
    merges_contextual: bool


_META = _Dialect(
    "meta-dlrmv3", re.compile(r"_embedding_collection\.(?:.*\.)?embeddings\.(?P<name>[^.]+)\.weight"), "", "weight",
    "bias", merges_contextual=False,
)  # fmt: skip
_ALIBABA = _Dialect(
    "torch-easy-rec",
    re.compile(r"embedding_group\.(?:.*\.)?(?:embeddings|embedding_bags)\.(?P<name>[^.]+?)(?:_emb)?\.weight"),
    "_mlp.", "_weight", "_bias", merges_contextual=True,
)  # fmt: skip


def _plan(dialect: _Dialect, tensors: ForeignTensors, options: Options) -> Plan:
    tables = {match["name"]: name for name in tensors.values if (match := dialect.table.fullmatch(name))}
    contextual = options.names("contextual", ())
    features = options.names("item_tables", ()) or _only([name for name in tables if name not in contextual])
    for name in (*features, *contextual):
        if name not in tables:
            raise ConfigurationError(f"there is no table {name!r}; the checkpoint has {', '.join(tables)}.")
    if _CONTEXTUAL + "bias" in tensors.values and tensors.values[_CONTEXTUAL + "bias"].ndim == 3:
        raise ConfigurationError(
            "this checkpoint interleaves items and actions (ContextualInterleavePreprocessor); only "
            "ContextualPreprocessor is supported."
        )
    tokens = tensors.shape(_CONTEXTUAL + "weights")[0] if _CONTEXTUAL + "weights" in tensors.values else 0
    if tokens != len(contextual):
        raise ConfigurationError(
            f"the checkpoint has {tokens} contextual tokens; name their features in order with the option contextual."
        )
    minimums = options.integers("contextual_min_lengths", (0,) * tokens)
    sizes = contextual_sizes(options, contextual, [tensors.shape(tables[name])[0] for name in contextual])

    layer = _LAYER.format(0)
    num_layers = tensors.count(r"_hstu_transducer\._stu_module\._stu_layers\.(\d+)\._uvqk_weight$")
    d_model, total = tensors.shape(layer + "_uvqk_weight")
    value_width = tensors.shape(layer + "_output_weight")[0] // 3
    num_heads = options.integer("num_heads", None, "the weights do not show how many heads share them")
    dqk, dv = split_heads(total // 2 - value_width, num_heads, "key"), split_heads(value_width, num_heads, "value")
    for name, width in (("dqk", dqk), ("dv", dv)):
        if options.integer(name, width) != width:
            raise ConfigurationError(f"option {name}: this checkpoint's heads are {width} wide.")
    group_norm = tensors.shape(layer + "_output_norm_weight")[0] != value_width

    weights = _action_weights(tensors)
    masks = options.integers("action_masks", weights)
    postprocess, periods = _postprocess(tensors)
    head = _head(dialect, tensors)
    tasks = options.names("tasks", tuple(f"task_{index}" for index in range(tensors.shape(head[-1])[0])))
    if len(tasks) != tensors.shape(head[-1])[0]:
        raise ConfigurationError(f"option tasks names {len(tasks)} outputs, not {tensors.shape(head[-1])[0]}.")
    max_history = options.integer("max_history", 1024)
    additional = _INPUT + "_additional_embedding_mlp." + dialect.mlp + "0.weight"
    content = _INPUT + "_content_embedding_mlp." + dialect.mlp + "0.weight"
    action = _INPUT + "_action_embedding_mlp." + dialect.mlp + "0.weight"
    table_rows = tuple(tensors.shape(tables[name])[0] for name in features)
    config = STUConfig(
        num_items=served_items(options, table_rows[0]),
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        dqk=dqk,
        dv=dv,
        attention_norm_length=options.integer(
            "attention_norm_length", None, "the network divides by the max_seq_len that it was trained with"
        ),
        norm_epsilon=options.number("norm_epsilon", 1e-6),
        max_history=max_history,
        num_profile=max(tokens, 1),
        tasks=tasks,
        item_widths=tuple(tensors.shape(tables[name])[1] for name in features),
        item_table_rows=table_rows,
        content_hidden=tensors.shape(content)[0],
        additional_hidden=tensors.shape(additional)[0] if len(features) > 1 else 0,
        item_hidden=tensors.shape("_item_embedding_mlp.0.weight")[0],
        contextual_sizes=sizes,
        contextual_min_lengths=minimums,
        contextual_attention=options.flag("contextual_attention", dialect.merges_contextual),
        contextual_positions=options.flag("contextual_positions", True),
        alpha=options.number("attn_alpha", dqk**-0.5),
        group_norm=group_norm,
        max_attention_length=options.integer("max_attn_len", 0),
        position_rows=_rows(tensors, _ENCODER + "_position_embeddings_weight"),
        time_rows=_rows(tensors, _ENCODER + "_timestamp_embeddings_weight"),
        time_step=options.number("time_bucket_increments", 60.0),
        time_scale=options.text("time_bucket_fn", "sqrt"),  # type: ignore[arg-type]
        action_masks=masks,
        action_weights=weights,
        action_width=tensors.shape(_INPUT + "_action_encoder._action_embedding_table")[1] if weights else 8,
        action_hidden=tensors.shape(action)[0] if weights else 256,
        postprocess=postprocess,  # type: ignore[arg-type]
        num_periods=periods,
        head_widths=tuple(tensors.shape(name)[0] for name in head[:-1]),
        head_norm="swish_layer_norm" if dialect is _META else "layer_norm_silu",
    )
    world = make_world(
        dialect.name,
        num_items=config.num_items,
        first_item=0,
        max_history=max_history,
        tasks=tasks,
        contextual=list(zip(contextual, sizes, strict=True)),
        num_actions=max(len(masks), 1),
    )
    sources = _sources(dialect, tensors, config, [tables[name] for name in features], [tables[n] for n in contextual])
    unused = {re.escape(name): "a table of no feature that is served" for name in tables.values()}
    if len(features) == 1:
        unused[re.escape(_INPUT) + r"_additional_embedding_mlp\..*"] = "there are no further item features"
    notes = [
        f"contexts have at most {max_history} events (max_history)",
        f"A V is divided by {config.attention_norm_length} (attention_norm_length)",
    ]
    if weights:
        notes.append(f"actions 0 to {len(masks) - 1} stand for the bits {', '.join(map(str, masks))} (action_masks)")
    return Plan(STUModel(config), world, sources, unused, tuple(notes))


def _sources(
    dialect: _Dialect, tensors: ForeignTensors, config: STUConfig, items: Sequence[str], contextual: Sequence[str]
) -> dict[str, Source]:
    """Where every parameter comes from."""
    sources: dict[str, Source] = {}
    for index, name in enumerate(items):
        sources[f"item_tables.{index}.weight"] = Source((name,))
    sources["item_rows"] = Source(_side_names(dialect, items), lambda *rows: _item_rows(config, rows))

    def mlp(ours: str, theirs: str, inner: str, gain: str, bias: str) -> None:
        for layer in (0, 2):
            sources[f"{ours}.{layer}.weight"] = Source((f"{theirs}.{inner}{layer}.weight",))
            sources[f"{ours}.{layer}.bias"] = Source((f"{theirs}.{inner}{layer}.bias",))
        for layer in (1, 3):
            sources[f"{ours}.{layer}.weight"] = Source((f"{theirs}.{inner}{layer}.{gain}",))
            sources[f"{ours}.{layer}.bias"] = Source((f"{theirs}.{inner}{layer}.{bias}",))

    mlp("content", _INPUT + "_content_embedding_mlp", dialect.mlp, dialect.gain, dialect.bias)
    if config.additional_hidden:
        mlp("additional", _INPUT + "_additional_embedding_mlp", dialect.mlp, dialect.gain, dialect.bias)
    mlp("item_tower", "_item_embedding_mlp", "", dialect.gain, dialect.bias)

    parts = (*contextual, *((_CONTEXTUAL + "weights", _CONTEXTUAL + "bias") if contextual else ()))
    sources["profile.weight"] = Source(parts, lambda *given: _profile(config, given)[0])
    sources["profile_bias.weight"] = Source(parts, lambda *given: _profile(config, given)[1])
    sources["profile_min_lengths"] = Source((), lambda: _profile_min_lengths(config))
    if config.action_weights:
        encoder = _INPUT + "_action_encoder."
        sources["action_table"] = Source((encoder + "_action_embedding_table",))
        sources["target_action"] = Source((encoder + "_target_action_embedding_table",), torch.flatten)
        sources["action_bits"] = Source((encoder + "_combined_action_weights",), lambda bits: _bits(config, bits))
        mlp("action", _INPUT + "_action_embedding_mlp", dialect.mlp, dialect.gain, dialect.bias)
    if config.position_rows:
        sources["positions.weight"] = Source((_ENCODER + "_position_embeddings_weight",))
    if config.time_rows:
        sources["times.weight"] = Source((_ENCODER + "_timestamp_embeddings_weight",))
    for index in range(config.num_layers):
        layer, block = _LAYER.format(index), f"blocks.{index}."
        sources[block + "input_norm.weight"] = Source((layer + "_input_norm_weight",))
        sources[block + "input_norm.bias"] = Source((layer + "_input_norm_bias",))
        sources[block + "uvqk.weight"] = Source((layer + "_uvqk_weight",), transposed)
        sources[block + "uvqk.bias"] = Source((layer + "_uvqk_beta",))
        sources[block + "norm_gain"] = Source((layer + "_output_norm_weight",))
        sources[block + "norm_bias"] = Source((layer + "_output_norm_bias",))
        sources[block + "output.weight"] = Source((layer + "_output_weight",), transposed)
    if config.postprocess != "l2_norm":
        sources["output_norm.weight"] = Source((_OUTPUT + "_layer_norm.weight",))
        sources["output_norm.bias"] = Source((_OUTPUT + "_layer_norm.bias",))
    if config.postprocess == "time_layer_norm":
        sources["period_units"] = Source((_OUTPUT + "_period_units",), torch.flatten)
        sources["units_per_period"] = Source((_OUTPUT + "_units_per_period",), torch.flatten)
        sources["time_combiner.weight"] = Source((_OUTPUT + "_time_feature_combiner.weight",))
        sources["time_combiner.bias"] = Source((_OUTPUT + "_time_feature_combiner.bias",))
    *hidden, last = _head(dialect, tensors)
    for index, name in enumerate(hidden):
        # The norm stands one place after the linear layer, in a sequence of both.
        norm = re.sub(r"\.(\d+)\.weight$", lambda match: f".{int(match[1]) + 1}.", name)
        for part in ("weight", "bias"):
            sources[f"head_hidden.{index}.{part}"] = Source((name.removesuffix("weight") + part,))
            sources[f"head_norms.{index}.{part}"] = Source((norm + part,))
    sources["head.weight"] = Source((last,))
    sources["head.bias"] = Source((last.removesuffix("weight") + "bias",))
    return sources


def _side_names(dialect: _Dialect, items: Sequence[str]) -> tuple[str, ...]:
    """Tensors that say which row of a further feature's table an item has."""
    names = []
    for name in items[1:]:
        match = dialect.table.fullmatch(name)
        assert match is not None
        names.append(f"item_features.{match['name']}")
    return tuple(names)


def _item_rows(config: STUConfig, sides: Sequence[Tensor]) -> Tensor:
    """INT64 [I, F]: rows of each item's features; reserved ids have those of item 0."""
    ids = torch.arange(config.num_items)
    columns = [ids, *(side[: config.num_items].to(torch.int64) for side in sides)]
    for column, rows in zip(columns, config.item_table_rows, strict=True):
        if len(column) != config.num_items or int(column.min()) < 0 or int(column.max()) >= rows:
            raise IndexError("an item has no row in a feature's table")
    known = torch.stack(columns, dim=1)
    return torch.cat([known[:1], known[:1], known])


def _profile(config: STUConfig, given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Contextual embeddings through each feature's own linear map, and its bias, by id of the profile column."""
    if not config.contextual_sizes:
        return torch.zeros(FIRST_ID, config.d_model), torch.zeros(FIRST_ID, config.d_model)
    *tables, weights, bias = given
    cut = [table[:size].double() for table, size in zip(tables, config.contextual_sizes, strict=True)]
    mapped = [table @ weight.double() for table, weight in zip(cut, weights, strict=True)]
    biases = bias.double()
    filler = torch.zeros(FIRST_ID, config.d_model, dtype=torch.float64)
    repeated = [row.expand(1 + size, -1) for row, size in zip(biases, config.contextual_sizes, strict=True)]
    return table_of_profile(mapped), torch.cat([filler, *repeated])


def _profile_min_lengths(config: STUConfig) -> Tensor:
    lengths = [0] * FIRST_ID
    for size, minimum in zip(config.contextual_sizes, config.contextual_min_lengths, strict=True):
        lengths += [minimum] * (1 + size)
    return torch.tensor(lengths)


def _bits(config: STUConfig, weights: Tensor) -> Tensor:
    """FP32 [2 + A, types]: which types of action each action is; reserved ids are none."""
    bits = [[float(mask & int(weight) > 0) for weight in weights.tolist()] for mask in (0, 0, *config.action_masks)]
    return torch.tensor(bits)


def _action_weights(tensors: ForeignTensors) -> tuple[int, ...]:
    name = _INPUT + "_action_encoder._combined_action_weights"
    return tuple(int(weight) for weight in tensors.values[name].tolist()) if name in tensors.values else ()


def _postprocess(tensors: ForeignTensors) -> tuple[str, int]:
    """What becomes of the outputs, and the number of periods."""
    if _OUTPUT + "_layer_norm.weight" not in tensors.values:
        return "l2_norm", 0
    if _OUTPUT + "_time_feature_combiner.weight" not in tensors.values:
        return "layer_norm", 0
    return "time_layer_norm", tensors.values[_OUTPUT + "_period_units"].numel()


def _head(dialect: _Dialect, tensors: ForeignTensors) -> list[str]:
    """Weights of the last MLP's linear layers, in order."""
    if dialect is _META:
        pattern = r"_multitask_module\._prediction_module\.(\d+)\.weight"
        matrices = (name for name, tensor in tensors.values.items() if tensor.ndim == 2)
        linear = sorted((int(match[1]), name) for name in matrices if (match := re.fullmatch(pattern, name)))
        names = [name for _, name in linear]
    else:
        pattern = r"_multitask_module\.tower_mlp\.mlp\.(\d+)\.perceptron\.0\.weight"
        hidden = sorted((int(match[1]), name) for name in tensors.values if (match := re.fullmatch(pattern, name)))
        names = [*(name for _, name in hidden), "_multitask_module.linear.weight"]
    if not names or names[-1] not in tensors.values:
        raise ConfigurationError("the checkpoint lacks the multi-task module; it is incomplete, or of another version.")
    return names


def _rows(tensors: ForeignTensors, name: str) -> int:
    return tensors.shape(name)[0] if name in tensors.values else 0


def _only(names: Sequence[str]) -> tuple[str, ...]:
    if len(names) != 1:
        raise ConfigurationError(
            f"which of the tables {', '.join(names) or '(none)'} holds the items? Give item_tables, the items' own "
            "table first, and name the contextual features in order with the option contextual."
        )
    return (names[0],)


def _plan_dlrm_v3(tensors: ForeignTensors, options: Options) -> Plan:
    return _plan(_META, tensors, options)


def _plan_torch_easy_rec(tensors: ForeignTensors, options: Options) -> Plan:
    return _plan(_ALIBABA, tensors, options)


_MARK = r"_hstu_transducer\._stu_module\._stu_layers\.\d+\._uvqk_weight$"
DLRM_V3 = Format(_META.name, (_MARK, r"_embedding_collection\."), _plan_dlrm_v3)
TORCH_EASY_REC = Format(_ALIBABA.name, (_MARK, r"embedding_group\."), _plan_torch_easy_rec)
