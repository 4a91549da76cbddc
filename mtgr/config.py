"""Model hyper-parameters and the presets, as validated immutable configs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mtgr.errors import ConfigurationError

StaticAttention = Literal["full", "causal"]
HeadKind = Literal["shared_bottom", "mmoe"]
StoredPrecision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Modality:
    """Embeddings that another model made of the items' text, images or sound: a side feature of every item.

    Attributes:
        name: What they were made of, such as ``text``; the name of the tensors in a checkpoint.
        width: Numbers per item.
        precision: In which the frozen matrix is stored: ``fp16`` halves it.
    """

    name: str
    width: int
    precision: StoredPrecision = "fp32"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: If one is out of range.
        """
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ConfigurationError(
                f"model config: a modality is called {self.name!r}; use small letters, digits and underscores."
            )
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise ConfigurationError(
                f"model config: modality {self.name} has width {self.width!r}; it must be a positive integer."
            )
        if self.precision not in ("fp32", "fp16"):
            raise ConfigurationError(
                f"model config: modality {self.name} is stored in {self.precision!r}; it must be 'fp32' or 'fp16'."
            )


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of an MTGR network.

    Attributes:
        num_layers: HSTU blocks.
        d_model: Width of the residual stream, d.
        num_heads: Attention heads.
        dqk: Query and key width per head; 0 means d_model / num_heads.
        dv: Value width per head; 0 means d_model / num_heads.
        attention_norm_length: The constant N that A V is divided by. Never the current length: a score must not
            depend on padding or on who shares the batch, and cached keys must stay valid as a context grows.
        norm_epsilon: Epsilon of every layer norm, in units of variance. The attention output is divided by N before it
            is normalised, so for one token its variance is about N ** -2 of a full context's.
        static_attention: ``full``: profile and history see each other both ways (MTGR). ``causal``: they see only
            earlier tokens (plain HSTU).
        max_positions: Size of the position table; the longest context plus one.
        relative_bias: Whether attention logits carry learned position and log-time biases (HSTU; MTGR has none).
        time_buckets: Buckets of log time differences in the relative bias.
        feature_dim: Width of one feature's embedding before the segment's MLP.
        item_dim: Width of an item's embedding, shared with the next-item head.
        heads: Structure of the multi-task towers.
        num_experts: Experts of the ``mmoe`` heads.
        head_dim: Hidden width of experts and towers.
        retrieve_count: Items that retrieval returns, m; cut to the catalogue's size.
        temperature: Divides the cosine similarities of the next-item head.
        dropout: Probability of zeroing an element of a block's update, training only.
        embedding_dropout: The same for the elements of token embeddings.
        modalities: Embeddings of the items' content that the network takes in, none by default.
    """

    num_layers: int = 2
    d_model: int = 64
    num_heads: int = 2
    dqk: int = 0
    dv: int = 0
    attention_norm_length: int = 256
    norm_epsilon: float = 1e-6
    static_attention: StaticAttention = "full"
    max_positions: int = 2049
    relative_bias: bool = False
    time_buckets: int = 128
    feature_dim: int = 16
    item_dim: int = 64
    heads: HeadKind = "mmoe"
    num_experts: int = 4
    head_dim: int = 64
    retrieve_count: int = 1024
    temperature: float = 0.05
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    modalities: tuple[Modality, ...] = ()

    def __post_init__(self) -> None:
        """Fill in the head widths and check every value.

        Raises:
            ConfigurationError: If a value is out of range or values do not fit each other.
        """
        for name in (
            "num_layers",
            "d_model",
            "num_heads",
            "attention_norm_length",
            "max_positions",
            "time_buckets",
            "feature_dim",
            "item_dim",
            "num_experts",
            "head_dim",
            "retrieve_count",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"model config: {name} is {value!r}; it must be a positive integer.")
        for name in ("dqk", "dv"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ConfigurationError(f"model config: {name} is {value!r}; it must be 0 or a positive integer.")
            if value == 0:
                if self.d_model % self.num_heads:
                    raise ConfigurationError(
                        f"model config: d_model {self.d_model} is not a multiple of num_heads {self.num_heads}; "
                        f"set {name} yourself."
                    )
                object.__setattr__(self, name, self.d_model // self.num_heads)
        for name in ("norm_epsilon", "temperature", "dropout", "embedding_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigurationError(f"model config: {name} is {value!r}; it must be a finite number.")
        if not isinstance(self.relative_bias, bool):
            raise ConfigurationError(
                f"model config: relative_bias is {self.relative_bias!r}; it must be true or false."
            )
        if not 0 < self.norm_epsilon < 1:
            raise ConfigurationError(f"model config: norm_epsilon is {self.norm_epsilon}; it must lie in (0, 1).")
        if self.static_attention not in ("full", "causal"):
            raise ConfigurationError(
                f"model config: static_attention is {self.static_attention!r}; it must be 'full' or 'causal'."
            )
        if self.heads not in ("shared_bottom", "mmoe"):
            raise ConfigurationError(f"model config: heads is {self.heads!r}; it must be 'shared_bottom' or 'mmoe'.")
        if not self.temperature > 0:
            raise ConfigurationError(f"model config: temperature is {self.temperature}; it must be positive.")
        for name in ("dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigurationError(f"model config: {name} is {getattr(self, name)}; it must lie in [0, 1).")
        if len({modality.name for modality in self.modalities}) != len(self.modalities):
            raise ConfigurationError("model config: two modalities have one name; give each its own.")

    @property
    def block_parameters(self) -> int:
        """Parameters of the linear layers of all blocks: the dense size that presets are named by."""
        uvqk = self.d_model * self.num_heads * 2 * (self.dqk + self.dv)
        return self.num_layers * (uvqk + self.num_heads * self.dv * self.d_model)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-ready values."""
        values = dataclasses.asdict(self)
        values["modalities"] = list(values["modalities"])
        if not self.modalities:  # as before there were any, so that hashes of checkpoints stay
            del values["modalities"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build a config from JSON values.

        Raises:
            ConfigurationError: If a key is unknown or a value invalid.
        """
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ConfigurationError(f"model config: unknown key {sorted(unknown)[0]!r}; remove it or fix its name.")
        try:
            modalities = tuple(
                value if isinstance(value, Modality) else Modality(**value) for value in values.get("modalities", ())
            )
        except TypeError as error:
            raise ConfigurationError(
                "model config: modalities must be a list of objects with name, width and precision."
            ) from error
        return cls(**{**values, "modalities": modalities})


# Widths of MTGR's Table of sizes (arXiv 2505.18654) from small to large; 22/1024 is its largest offline model.
_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "num_layers": 2,
        "d_model": 96,
        "num_heads": 3,
        "item_dim": 96,
        "relative_bias": True,  # what comes next in MovieLens-100K follows from the last few events
        "dropout": 0.2,
        "embedding_dropout": 0.1,
    },
    "small": {"num_layers": 3, "d_model": 512, "num_heads": 2},
    "medium": {"num_layers": 5, "d_model": 768, "num_heads": 3},
    "large": {"num_layers": 15, "d_model": 768, "num_heads": 3},
    "xlarge": {"num_layers": 22, "d_model": 1024, "num_heads": 8},
    "8b": {"num_layers": 24, "d_model": 8192, "num_heads": 64},
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The preset ``name`` with some values replaced.

    Raises:
        ConfigurationError: If there is no such preset or a value is invalid.
    """
    if name not in _PRESETS:
        raise ConfigurationError(f"there is no preset {name!r}; choose one of {', '.join(_PRESETS)}.")
    values = dict(_PRESETS[name])
    if name != "tiny":
        width = int(values["d_model"])
        values |= {
            "attention_norm_length": 2048,
            "feature_dim": 64,
            "item_dim": min(width, 512),
            "head_dim": min(width, 1024),
        }
    return ModelConfig.from_dict(values | overrides)


def preset_names() -> tuple[str, ...]:
    """Names of the presets, smallest first."""
    return tuple(_PRESETS)
