"""The trained models of the comparison by name: how each differs from MTGR."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mtgr.config import ModelConfig
from mtgr.errors import ConfigurationError
from mtgr.features.catalog import ItemCatalog
from mtgr.model import MTGR
from mtgr.peers.dlrm import DLRM
from mtgr.peers.norm import share_norms
from mtgr.peers.sasrec import SASRec
from mtgr.schema import TIME, Schema

Trainable = MTGR | DLRM
"""What the trainer trains: a network with ``training_outputs``, ``next_item_logits`` and a next-item head."""

NO_CROSS_FEATURES = ("item", TIME)


def _mtgr(config: ModelConfig, schema: Schema, num_features: int) -> Trainable:
    return MTGR(config, schema, num_features)


def _shared_norms(config: ModelConfig, schema: Schema, num_features: int) -> Trainable:
    model = MTGR(config, schema, num_features)
    share_norms(model)
    return model


@dataclass(frozen=True)
class ModelSpec:
    """One model of the comparison.

    Attributes:
        label: Name in tables.
        make: Makes the network of a config, a schema and the number of static side features of an item.
        changes: Values of the config that are its own.
        cross_features: Whether candidates carry features of user and item, or the item alone.
    """

    label: str
    make: Callable[[ModelConfig, Schema, int], Trainable]
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)
    cross_features: bool = True

    def config(self, base: ModelConfig) -> ModelConfig:
        """``base`` with this model's own values."""
        return dataclasses.replace(base, **dict(self.changes))  # type: ignore[arg-type]

    def schema(self, base: Schema) -> Schema:
        """``base``, without cross features for models that have none."""
        return base if self.cross_features else dataclasses.replace(base, candidate_columns=NO_CROSS_FEATURES)

    def build(self, base: ModelConfig, schema: Schema, catalog: ItemCatalog) -> Trainable:
        """A freshly initialised network that knows the items' side features.

        Args:
            base: Sizes, common to all models.
            schema: This model's, from ``schema``.
            catalog: The items.
        """
        model = self.make(self.config(base), schema, catalog.features.shape[1])
        if isinstance(model, MTGR) and model.relative_bias is not None:
            # Attention begins as a sum over what is visible: from logits around 0, SiLU makes next to nothing of it.
            torch.nn.init.ones_(model.relative_bias.position_table)
        model.embedding.item.features.copy_(torch.from_numpy(catalog.features))
        return model


_CAUSAL = {"static_attention": "causal"}
# What blocks without a softmax take beside the common sizes; tried on MovieLens-100K's validation part with HSTU. Short
# contexts leave little of A V / N, which a large N or epsilon would drown.
_POINTWISE = {"attention_norm_length": 32, "norm_epsilon": 1e-8}

MODELS: dict[str, ModelSpec] = {
    "mtgr": ModelSpec("MTGR", _mtgr, _POINTWISE),
    # HSTU: causal, relative bias by position and time, one norm for all tokens, no features of user and item together.
    "hstu": ModelSpec(
        "HSTU", _shared_norms, {**_POINTWISE, **_CAUSAL, "relative_bias": True, "dropout": 0.0}, cross_features=False
    ),
    "sasrec": ModelSpec("SASRec", SASRec, {**_CAUSAL, "relative_bias": False}, cross_features=False),
    "dlrm": ModelSpec("DLRM-style", DLRM),
    "mtgr-no-cross-features": ModelSpec("MTGR without cross features", _mtgr, _POINTWISE, cross_features=False),
    "mtgr-no-group-norm": ModelSpec("MTGR without GroupLN", _shared_norms, _POINTWISE),
    "mtgr-no-dynamic-mask": ModelSpec("MTGR without dynamic mask (causal)", _mtgr, {**_POINTWISE, **_CAUSAL}),
}


def find_model(name: str) -> ModelSpec:
    """The model called ``name``.

    Raises:
        ConfigurationError: If there is none.
    """
    if name not in MODELS:
        raise ConfigurationError(f"there is no model {name!r}; choose among {', '.join(MODELS)}.")
    return MODELS[name]
