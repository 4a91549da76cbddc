"""Router settings out of the string parameters of a ``config.pbtxt``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from mtgr.errors import ConfigurationError
from mtgr.routing.router import RoutingConfig


def load_routing_config(model_repository: Path) -> RoutingConfig:
    """The settings of the repository's router, so that the way in process ranks as the server does.

    Raises:
        ConfigurationError: If they are invalid, or what reads Triton's configs is not installed.
    """
    path = model_repository / "mtgr_router" / "config.pbtxt"
    if not path.is_file():
        return RoutingConfig()
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise ConfigurationError(f"reading {path} needs tritonclient: pip install 'mtgr[client]'.") from error
    try:
        config = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ConfigurationError(f"{path} is not a model config: {error}") from error
    return routing_config({name: value.string_value for name, value in config.parameters.items()})


def routing_config(parameters: Mapping[str, str]) -> RoutingConfig:
    """Parse and check all parameters; absent ones keep their defaults.

    Raises:
        ConfigurationError: If a parameter is unknown or its value is not of its type.
    """
    known = {field.name for field in dataclasses.fields(RoutingConfig)}
    unknown = set(parameters) - known
    if unknown:
        raise ConfigurationError(f"mtgr_router: unknown parameter {sorted(unknown)[0]!r}; remove it or fix its name.")
    default = RoutingConfig()
    return RoutingConfig(
        task_weights=_weights(parameters["task_weights"]) if "task_weights" in parameters else default.task_weights,
        default_top_k=_integer(parameters, "default_top_k", default.default_top_k),
        rank_limit=_integer(parameters, "rank_limit", default.rank_limit),
        remove_seen=_boolean(parameters, "remove_seen", default.remove_seen),
        max_batch=_integer(parameters, "max_batch", default.max_batch),
        max_running=_integer(parameters, "max_running", default.max_running),
        max_pending=_integer(parameters, "max_pending", default.max_pending),
        max_tokens=_integer(parameters, "max_tokens", default.max_tokens),
        engine_timeout=_number(parameters, "engine_timeout", default.engine_timeout),
    )


def _weights(text: str) -> dict[str, float]:
    weights = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            weights[name.strip()] = float(value)
        except ValueError as error:
            raise ConfigurationError(
                f"mtgr_router: task_weights is {text!r}; write it as 'engagement=1.0,retention=0.1'."
            ) from error
    return weights


def _integer(parameters: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(parameters.get(name, default))
    except ValueError as error:
        raise ConfigurationError(f"mtgr_router: {name} is {parameters[name]!r}; it must be an integer.") from error


def _number(parameters: Mapping[str, str], name: str, default: float) -> float:
    try:
        return float(parameters.get(name, default))
    except ValueError as error:
        raise ConfigurationError(f"mtgr_router: {name} is {parameters[name]!r}; it must be a number.") from error


def _boolean(parameters: Mapping[str, str], name: str, default: bool) -> bool:
    text = parameters.get(name, str(default)).lower()
    if text not in ("true", "false"):
        raise ConfigurationError(f"mtgr_router: {name} is {text!r}; it must be true or false.")
    return text == "true"
