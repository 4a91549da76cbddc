"""Checkpoints of Meta's research trainer, ``research/trainer/train.py``."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from mtgr.compat.convert import Plan, Source
from mtgr.compat.formats.format import Format, served_items, split_heads, transposed
from mtgr.compat.options import Options
from mtgr.compat.research import ResearchConfig, ResearchHSTU
from mtgr.compat.tensors import ForeignTensors
from mtgr.compat.world import make_world
from mtgr.errors import ConfigurationError

_ITEMS = "_embedding_module._item_emb.weight"
_POSITIONS = "_input_features_preproc._pos_emb.weight"
_LAYER = "_hstu._attention_layers.{}."
# train.py keeps so many positions for the items to be predicted (gr_output_length 10, plus one).
_OUTPUT_POSITIONS = 11
_HEADS_IN_NAME = re.compile(r"-h(\d+)-dqk\d+-dv\d+-l")


def plan(tensors: ForeignTensors, options: Options) -> Plan:
    """A retriever out of the trainer's state dict.

    Raises:
        ConfigurationError: If an option is missing or wrong, or a tensor that sizes are read off.
    """
    if "_input_features_preproc._rating_emb.weight" in tensors.values:
        raise ConfigurationError(
            "this checkpoint reads ratings (a _rating_emb table); only the preprocessor without them is supported, "
            "LearnablePositionalEmbeddingInputFeaturesPreprocessor."
        )
    rows, width = tensors.shape(_ITEMS)
    num_layers = tensors.count(r"_hstu\._attention_layers\.(\d+)\._uvqk$")
    num_positions = tensors.shape(_POSITIONS)[0]
    relative_bias = _LAYER.format(0) + "_rel_attn_bias._pos_w" in tensors.values
    norm_length = num_positions
    if relative_bias:
        norm_length = (tensors.shape(_LAYER.format(0) + "_rel_attn_bias._pos_w")[0] + 1) // 2
    elif "_attn_mask" in tensors.values:
        norm_length = tensors.shape("_attn_mask")[0]

    total = tensors.shape(_LAYER.format(0) + "_uvqk")[1] // 2
    output = tensors.shape(_LAYER.format(0) + "_o.weight")[1]
    concat_ua = options.flag("concat_ua", output >= total)
    value_width = output // 3 if concat_ua else output
    named = next((match[1] for file in tensors.files if (match := _HEADS_IN_NAME.search(file))), None)
    num_heads = options.integer(
        "num_heads", int(named) if named else None, "the weights do not show how many heads share them"
    )
    default_history = num_positions - _OUTPUT_POSITIONS if num_positions > _OUTPUT_POSITIONS else num_positions
    max_history = options.integer("max_history", default_history)
    config = ResearchConfig(
        num_items=served_items(options, rows - 1),
        d_model=width,
        num_layers=num_layers,
        num_heads=num_heads,
        dqk=split_heads(total - value_width, num_heads, "key"),
        dv=split_heads(value_width, num_heads, "value"),
        attention_norm_length=norm_length,
        norm_epsilon=options.number("norm_epsilon", 1e-6),
        max_history=max_history,
        retrieve_count=options.integer("retrieve_count", 1024),
        num_positions=num_positions,
        relative_bias=relative_bias,
        time_buckets=_time_buckets(tensors) if relative_bias else 128,
        activation=options.text("linear_activation", "silu"),  # type: ignore[arg-type]
        concat_ua=concat_ua,
        user_norm=options.text("user_embedding_norm", "l2_norm"),  # type: ignore[arg-type]
        normalise_items=options.flag("item_l2_norm", True),
    )
    world = make_world(
        "meta-research", num_items=config.num_items, first_item=1, max_history=max_history, tasks=("next_item",)
    )
    sources = {
        "items.weight": Source((_ITEMS,), lambda table: _items(table, config.num_items)),
        "positions.weight": Source((_POSITIONS,)),
    }
    for index in range(num_layers):
        layer, block = _LAYER.format(index), f"blocks.{index}."
        sources[block + "uvqk.weight"] = Source((layer + "_uvqk",), transposed)
        sources[block + "output.weight"] = Source((layer + "_o.weight",))
        sources[block + "output.bias"] = Source((layer + "_o.bias",))
        if relative_bias:
            sources[block + "position_bias"] = Source((layer + "_rel_attn_bias._pos_w",))
            sources[block + "time_bias"] = Source((layer + "_rel_attn_bias._ts_w",))
    asked = options.integer("attention_norm_length", norm_length)
    notes = [
        f"A V is divided by {norm_length}, the size of the position table"
        + (f", and not by {asked} (attention_norm_length)" if asked != norm_length else ""),
        f"contexts have at most {max_history} events (max_history)",
        f"users: {config.user_norm}, items: {'l2_norm' if config.normalise_items else 'as they are'}",
    ]
    unused = {"_attn_mask": "the causal mask is built from slots"}
    return Plan(ResearchHSTU(config), world, sources, unused, tuple(notes))


def _time_buckets(tensors: ForeignTensors) -> int:
    return tensors.shape(_LAYER.format(0) + "_rel_attn_bias._ts_w")[0] - 1


def _items(table: Tensor, num_items: int) -> Tensor:
    """Row i of the checkpoint is internal id i + 1; row 0 is padding, which both reserved ids stand for."""
    return torch.cat([table[:1], table[: num_items + 1]])


FORMAT = Format("meta-research", (r"_hstu\._attention_layers\.\d+\._uvqk$", re.escape(_ITEMS)), plan)
