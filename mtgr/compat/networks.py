"""Foreign networks by the name that a config gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtgr.compat.base import ForeignConfig, ForeignModel
from mtgr.compat.nvidia import NvidiaConfig, NvidiaHSTU
from mtgr.compat.research import ResearchConfig, ResearchHSTU
from mtgr.compat.stu import STUConfig, STUModel
from mtgr.errors import ConfigurationError

_CONFIGS: dict[str, type[ForeignConfig]] = {
    config.network: config for config in (ResearchConfig, STUConfig, NvidiaConfig)
}


def foreign_config(values: Mapping[str, Any]) -> ForeignConfig:
    """The config that a converted checkpoint holds.

    Raises:
        ConfigurationError: If the network is not known, or the config is wrong.
    """
    network = values.get("network")
    if network not in _CONFIGS:
        raise ConfigurationError(f"there is no network {network!r}; known are {', '.join(_CONFIGS)}.")
    return _CONFIGS[network].from_dict(values)


def build_foreign_model(config: ForeignConfig) -> ForeignModel:
    """The network of a config, its parameters not filled."""
    if isinstance(config, ResearchConfig):
        return ResearchHSTU(config)
    if isinstance(config, STUConfig):
        return STUModel(config)
    assert isinstance(config, NvidiaConfig)
    return NvidiaHSTU(config)
