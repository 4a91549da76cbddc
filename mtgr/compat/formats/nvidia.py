"""Checkpoints of NVIDIA's recsys-examples, ``torch_module/model.0.pth`` and the dynamic tables beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

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
    with_reserved_rows,
)
from mtgr.compat.nvidia import NvidiaConfig, NvidiaHSTU
from mtgr.compat.options import Options
from mtgr.compat.tensors import ForeignTensors
from mtgr.compat.world import make_world
from mtgr.errors import ConfigurationError
from mtgr.schema import FIRST_ID

_LAYER = "_hstu_block._attention_layers.{}."
_TABLE = re.compile(r"_embedding_collection\.(?:.*\.)?embeddings\.(?P<name>[^./]+)\.weight")
_PACKED = re.compile(r"_embedding_collection\.(?:.*\.)?embeddings\.(?P<names>[^.]+)_weights")
_HEAD = re.compile(r"_mlp\.(?:.*\.)?(?P<index>\d+)\.(?:_linear\.)?weight")
_POSITIONS = re.compile(r"_hstu_block\.(?:_preprocessor\.)?_positional_encoder\._position_embeddings_weight")

# An embedding table: the tensor that holds it, perhaps with others, and its rows.
_Tables = dict[str, tuple[str, Tensor]]


def plan(tensors: ForeignTensors, options: Options) -> Plan:
    """A ranker, or without ``_mlp`` a retriever.

    Raises:
        ConfigurationError: If an option is missing or wrong, or a tensor that sizes are read off.
    """
    layer = _LAYER.format(0)
    fused = _is_fused(tensors)
    width = tensors.shape(layer + "_output_layernorm_weight")[0]
    d_model = (
        tensors.shape(layer + "_linear_proj_weight")[1] if fused else tensors.shape(layer + "_linear_proj.weight")[0]
    )
    num_heads = options.integer("num_heads", None, "the weights do not show how many heads share them")
    head_width = split_heads(width, num_heads, "value")

    tables = _tables(tensors, options, d_model)
    contextual = options.names("contextual", ())
    actions = options.text("action_table", "")
    items = options.text("item_table", "") or _only([name for name in tables if name not in (*contextual, actions)])
    for name in (items, actions, *contextual):
        if name and name not in tables:
            raise ConfigurationError(f"there is no table {name!r}; the checkpoint has {', '.join(tables)}.")
    sizes = contextual_sizes(options, contextual, [len(tables[name][1]) for name in contextual])

    head = _head(tensors)
    widths = [tensors.shape(name)[0] for name in head]
    tasks = options.names("tasks", tuple(f"task_{index}" for index in range(widths[-1]))) if head else ()
    if head and len(tasks) != widths[-1]:
        raise ConfigurationError(f"option tasks names {len(tasks)} outputs, but the checkpoint has {widths[-1]}.")
    positions = _positions(tensors)
    config = NvidiaConfig(
        num_items=served_items(options, len(tables[items][1])),
        d_model=d_model,
        num_layers=tensors.count(r"_hstu_block\._attention_layers\.(\d+)\._output_layernorm_weight$"),
        num_heads=num_heads,
        dqk=head_width,
        dv=head_width,
        attention_norm_length=options.integer(
            "attention_norm_length", None, "it is scaling_seqlen of the training, or the max_seqlen it ran with"
        ),
        norm_epsilon=options.number("norm_epsilon", 1e-5),
        max_history=options.integer("max_history", 512),
        num_profile=max(len(contextual), 1),
        retrieve_count=options.integer("retrieve_count", 1024),
        tasks=tasks,
        contextual_sizes=sizes,
        num_actions=len(tables[actions][1]) if actions else 0,
        position_rows=tensors.shape(positions)[0] if positions else 0,
        residual=options.flag("residual", True),
        learnable_input_norm=layer + "_input_layernorm_weight" in tensors.values,
        head_widths=tuple(widths[:-1]),
        head_activates_last=options.flag("head_activates_last", False),
    )
    layout = options.text("uvqk_layout", "blocks" if fused else "by_head")
    if layout not in ("blocks", "by_head"):
        raise ConfigurationError(f"option uvqk_layout is {layout!r}; it must be blocks or by_head.")
    world = make_world(
        "nvidia",
        num_items=config.num_items,
        first_item=0,
        max_history=config.max_history,
        tasks=tasks or ("next_item",),
        contextual=list(zip(contextual, sizes, strict=True)),
        num_actions=max(config.num_actions, 1),
    )
    sources = _table_sources(config, tables, items, actions, contextual)
    if positions:
        sources["positions.weight"] = Source((positions,))
    for index in range(config.num_layers):
        sources |= _block_sources(config, index, fused, layout)
    for index, name in enumerate(head):
        sources[f"head.{index}.weight"] = Source((name,))
        sources[f"head.{index}.bias"] = Source((name.removesuffix("weight") + "bias",))
    unused = {
        r".*\._extra_state": "state of Transformer Engine",
        r"_loss_module\..*|_metric_module\..*": "of use in training only",
    } | {re.escape(holder): "a table of no feature that is served" for holder, _ in tables.values()}
    notes = (
        f"contexts have at most {config.max_history} events (max_history)",
        f"A V is divided by {config.attention_norm_length} (attention_norm_length)",
        f"U, V, Q, K are stored {'one after the other' if layout == 'blocks' else 'head by head'} (uvqk_layout)",
    )
    return Plan(NvidiaHSTU(config), world, sources, unused, notes)


def _is_fused(tensors: ForeignTensors) -> bool:
    """Fused layers hold their weights as plain parameters, inputs first."""
    return _LAYER.format(0) + "_linear_uvqk_weight" in tensors.values


def _positions(tensors: ForeignTensors) -> str | None:
    return next((name for name in tensors.values if _POSITIONS.fullmatch(name)), None)


def _head(tensors: ForeignTensors) -> list[str]:
    """Weights of the last MLP's layers, in order."""
    numbered = ((match, name) for name in tensors.values if (match := _HEAD.fullmatch(name)))
    return [name for _, name in sorted((int(match["index"]), name) for match, name in numbered)]


def _table_sources(
    config: NvidiaConfig, tables: _Tables, items: str, actions: str, contextual: Sequence[str]
) -> dict[str, Source]:
    """Embeddings by internal ids; the tables were cut out of their tensors already."""

    def profile(*_: Tensor) -> Tensor:
        if not contextual:
            return torch.zeros(FIRST_ID, config.d_model)
        pairs = zip(contextual, config.contextual_sizes, strict=True)
        return table_of_profile([tables[name][1][:size] for name, size in pairs])

    def rows(name: str, count: int) -> Source:
        holder, table = tables[name]
        return Source((holder,), lambda _: with_reserved_rows(table, 0, count))

    sources = {
        "items.weight": rows(items, config.num_items),
        "profile.weight": Source(tuple(dict.fromkeys(tables[name][0] for name in contextual)), profile),
    }
    if actions:
        sources["actions.weight"] = rows(actions, config.num_actions)
    return sources


def _block_sources(config: NvidiaConfig, index: int, fused: bool, layout: str) -> dict[str, Source]:
    """Where the parameters of one block come from."""

    def uvqk(tensor: Tensor) -> Tensor:
        """U, V, Q, K one after the other, of rows that may stand head by head."""
        if layout == "blocks":
            return tensor
        split = tensor.reshape(config.num_heads, 4, config.dv, *tensor.shape[1:])
        return split.transpose(0, 1).reshape(tensor.shape)

    layer, block = _LAYER.format(index), f"blocks.{index}."
    if fused:
        sources = {
            block + "uvqk.weight": Source((layer + "_linear_uvqk_weight",), lambda weight: uvqk(weight.T)),
            block + "uvqk.bias": Source((layer + "_linear_uvqk_bias",), uvqk),
            block + "output.weight": Source((layer + "_linear_proj_weight",), transposed),
        }
    else:
        sources = {
            block + "uvqk.weight": Source((layer + "_linear_uvqk.weight",), uvqk),
            block + "uvqk.bias": Source((layer + "_linear_uvqk.bias",), uvqk),
            block + "output.weight": Source((layer + "_linear_proj.weight",)),
        }
    norms = [("output_norm", "_output_layernorm")]
    norms += [("input_norm", "_input_layernorm")] if config.learnable_input_norm else []
    for ours, theirs in norms:
        sources[f"{block}{ours}.weight"] = Source((f"{layer}{theirs}_weight",))
        sources[f"{block}{ours}.bias"] = Source((f"{layer}{theirs}_bias",))
    return sources


def _tables(tensors: ForeignTensors, options: Options, width: int) -> _Tables:
    """Embedding tables by name.

    Data-parallel tables are packed into one tensor named after all of them, whose rows an option must tell apart.
    """
    tables: _Tables = {}
    for name, tensor in tensors.values.items():
        match, packed = _TABLE.fullmatch(name), _PACKED.fullmatch(name)
        if match:
            tables[match["name"]] = (name, tensor)
        elif packed:
            names = packed["names"].split("/")
            rows = options.integers("packed_rows", (tensor.numel() // width,) if len(names) == 1 else ())
            if len(rows) != len(names) or sum(rows) * width != tensor.numel():
                raise ConfigurationError(
                    f"{name} packs {len(names)} tables into {tensor.numel() // width} rows; give packed_rows, the rows "
                    f"of {', '.join(names)}."
                )
            ends = [sum(rows[:index]) for index in range(len(rows) + 1)]
            for table, (start, end) in zip(names, pairwise(ends), strict=True):
                tables[table] = (name, tensor.reshape(-1, width)[start:end])
    if not tables:
        raise ConfigurationError(
            "the checkpoint has no embedding table; keep dynamicemb_module beside torch_module, or add the tables."
        )
    for name, (_, table) in tables.items():
        if table.ndim != 2 or table.shape[1] != width:
            raise ConfigurationError(f"table {name} has shape {list(table.shape)}; it must be {width} wide.")
    return tables


def _only(names: list[str]) -> str:
    if len(names) != 1:
        raise ConfigurationError(
            f"which of the tables {', '.join(names)} holds the items? Give item_table, and name the others with "
            "action_table and contextual (in the order of the features)."
        )
    return names[0]


FORMAT = Format("nvidia", (r"_hstu_block\._attention_layers\.\d+\._linear_uvqk",), plan)
