"""The Hugging Face style config of an exported model."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from mtgr.config import ModelConfig
from mtgr.schema import Schema
from mtgr.vllm_plugin import MODEL_TYPE
from mtgr.vllm_plugin.rows import RowCodec


class MTGRConfig(PretrainedConfig):
    """What vLLM wants to know of a model, derived from the project's own configs.

    Args:
        mtgr: ``model`` (``ModelConfig.to_dict``), ``schema`` (``Schema.to_dict``), ``num_features`` (static side
            features per item) and ``model_version``; None for an empty config, which Transformers wants to be possible.
        kwargs: What Transformers adds.
    """

    model_type = MODEL_TYPE

    def __init__(self, mtgr: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.mtgr = mtgr
        if mtgr is not None:
            model, schema = self.network_config, self.schema
            self.vocab_size = 1  # there are no token ids: requests are rows
            self.hidden_size = model.d_model
            self.num_hidden_layers = model.num_layers
            self.num_attention_heads = self.num_key_value_heads = model.num_heads
            self.head_dim = model.dqk
            self.max_position_embeddings = 1 << 16
            # The width of a token in `prompt_embeds`.
            self.projection_size = RowCodec(schema).width
        super().__init__(**kwargs)

    @property
    def network_config(self) -> ModelConfig:
        """Hyper-parameters of the network."""
        assert self.mtgr is not None
        return ModelConfig.from_dict(self.mtgr["model"])

    @property
    def schema(self) -> Schema:
        """Meaning of the rows."""
        assert self.mtgr is not None
        return Schema.from_dict(self.mtgr["schema"])
