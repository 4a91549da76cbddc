"""A trained model for a catalogue that has grown: what it knows stays, and new items get a place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtgr.checkpoint import Checkpoint, build_model
from mtgr.config import ModelConfig
from mtgr.errors import ConfigurationError
from mtgr.features.catalog import ItemCatalog
from mtgr.features.modalities import ItemEmbeddings, describe
from mtgr.model import MTGR
from mtgr.model.modalities import ModalityEmbedding
from mtgr.schema import FIRST_ID, Schema
from mtgr.training.prepare import PreparedData

Int64Array = npt.NDArray[np.int64]

NEW = -1

_ITEM_TABLE, _ITEM_PROJECTION = "embedding.item.table.weight", "embedding.item.project.weight"
_ITEM_FEATURES, _ITEM_BIAS, _WIDE_TABLE = "embedding.item.features", "next_item_head.bias", "wide_terms.table.weight"
_MODALITIES = "embedding.item.modalities."


def grown_schema(parent: Schema, data: PreparedData) -> Schema:
    """The parent's schema with the data's items: every other id means what it meant.

    Raises:
        ConfigurationError: If the data have tasks, actions or times that the parent cannot express.
    """
    found = data.schema
    if found.task_names != parent.task_names:
        raise ConfigurationError(
            f"the data have the tasks {', '.join(found.task_names)}, but the checkpoint was trained on "
            f"{', '.join(parent.task_names)}; both must be the same."
        )
    if found.num_actions > parent.num_actions:
        raise ConfigurationError(
            f"the data have {found.num_actions} kinds of action, but the checkpoint knows {parent.num_actions}; map "
            "them onto those, or train a new model."
        )
    if int(data.interactions.time.min()) < parent.epoch:
        raise ConfigurationError("the data begin before the checkpoint's epoch; leave out what is older.")
    return dataclasses.replace(
        parent,
        name=found.name,
        num_items=found.num_items,
        items_hash=found.items_hash,
        categories=found.categories,
    )


def parent_ids(parent: ItemCatalog, catalog: ItemCatalog) -> Int64Array:
    """INT64 [I]: the parent's internal id of each of the catalogue's, ``NEW`` where it has none."""
    internal = parent.to_internal(catalog.raw_ids)
    return np.concatenate([np.arange(FIRST_ID), np.where(internal < FIRST_ID, NEW, internal)])


def grown_model(
    parent: Checkpoint, schema: Schema, catalog: ItemCatalog, embeddings: Mapping[str, ItemEmbeddings] | None = None
) -> MTGR:
    """The parent's network on a larger catalogue, in eval mode.

    New items start at the mean of the known ones; side features and content tell them apart. Where only known items
    occur, it answers as the parent does.

    Args:
        parent: A trained checkpoint of this project.
        schema: Out of ``grown_schema``.
        catalog: All items, the parent's among them.
        embeddings: Content of new items for the parent's modalities, and modalities that the parent has not had; the
            content that the parent knows stays, unless it is given anew.

    Raises:
        ConfigurationError: If the parent is not an MTGR network, an item is missing, or embeddings do not fit.
    """
    if not isinstance(parent.model, MTGR) or not isinstance(parent.config, ModelConfig):
        raise ConfigurationError("a converted public checkpoint cannot be fine-tuned; train a checkpoint of MTGR.")
    source = parent_ids(parent.catalog, catalog)
    if (source >= FIRST_ID).sum() != len(parent.catalog.raw_ids):
        raise ConfigurationError("the new catalogue lacks items of the checkpoint; add them to it.")
    embeddings = embeddings or {}
    known = {modality.name for modality in parent.config.modalities}
    added = describe({name: matrix for name, matrix in embeddings.items() if name not in known})
    config = dataclasses.replace(parent.config, modalities=(*parent.config.modalities, *added))
    model = build_model(config, schema, catalog)
    for module in model.modules():
        if isinstance(module, ModalityEmbedding):
            name = module.modality.name
            if name in embeddings:
                module.fill(embeddings[name], catalog)
            if name not in known:
                torch.nn.init.zeros_(module.project.weight)  # what is new says nothing yet
    state = model.state_dict()
    for name, old in parent.model.state_dict().items():
        state[name] = _grown(name, old, state[name], source, parent, schema)
    model.load_state_dict(state)
    return model.eval()


def _grown(name: str, old: Tensor, fresh: Tensor, source: Int64Array, parent: Checkpoint, schema: Schema) -> Tensor:
    """The parent's tensor in the grown network's shape."""
    if name == _ITEM_FEATURES:
        return fresh  # the catalogue's
    if name in (_ITEM_TABLE, _ITEM_BIAS):
        return _rows(old, source)
    if name == _WIDE_TABLE:  # the first of its columns is the item
        items = parent.schema.num_items
        return torch.cat([_rows(old[:items], source), old[items:]])
    if name == _ITEM_PROJECTION:
        return _columns(old, fresh, parent.schema, schema)
    if name.startswith(_MODALITIES) and name.endswith(".vectors"):
        given = fresh[:, -1] == 0  # an item whose content was given, or the reserved id that has none
        kept = torch.from_numpy(source != NEW) & ~given
        result = fresh.clone()
        result[kept] = old[torch.from_numpy(source)[kept]]
        return result
    if old.shape != fresh.shape:
        raise ConfigurationError(f"{name} of the checkpoint does not fit the grown network; train a new model.")
    return old


def _rows(old: Tensor, source: Int64Array) -> Tensor:
    index = torch.from_numpy(source)
    rows = old[index.clamp(min=0)]
    rows[index == NEW] = old[FIRST_ID:].mean(dim=0)
    return rows


def _columns(old: Tensor, fresh: Tensor, before: Schema, after: Schema) -> Tensor:
    """Side features' projection: categories by name, new ones 0, then the decades, which are always the same."""
    result = torch.zeros_like(fresh)
    places = [after.categories.index(name) for name in before.categories]
    result[:, places] = old[:, : len(places)]
    result[:, len(after.categories) :] = old[:, len(places) :]
    return result
