"""Dataclasses of settings out of YAML: strict, bounded, and with errors that name the key."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml

from mtgr.errors import ConfigurationError

T = TypeVar("T")

MAX_BYTES = 64 << 10


class _StrictLoader(yaml.SafeLoader):
    """Plain values only: no aliases, with which a short file becomes a huge one, and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(
                problem="aliases are not allowed", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key!r} is not text", problem_mark=node.start_mark
                )
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key!r} is there twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping out of a YAML file.

    Raises:
        ConfigurationError: If the file is missing, too large, or no mapping of plain values.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(data) > MAX_BYTES:
        raise ConfigurationError(f"{path} is larger than {MAX_BYTES >> 10} KiB, more than any settings need.")
    try:
        values = yaml.load(data.decode(), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigurationError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path} must hold a mapping of settings.")
    return values


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``: mappings are merged, all other values replaced."""
    result = dict(base)
    for name, value in changes.items():
        known = result.get(name)
        both = isinstance(known, Mapping) and isinstance(value, Mapping)
        result[name] = merged(known, value) if both else value  # type: ignore[arg-type]
    return result


def build(kind: type[T], values: Any, path: str = "") -> T:
    """A dataclass, and those in its fields, out of plain values.

    Args:
        kind: The dataclass; its fields are numbers, booleans, texts, tuples, mappings, dataclasses, or None.
        values: A mapping by the fields' names; absent ones keep their defaults.
        path: Where the values stand, for messages.

    Raises:
        ConfigurationError: If a key is unknown or missing, or a value of another type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"{path or 'the file'} is {values!r}; it must be a mapping.")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    prefix = f"{path}." if path else ""
    for name in values:
        if name not in fields:
            raise ConfigurationError(f"{prefix}{name} is not a setting; choose out of {', '.join(sorted(fields))}.")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigurationError(f"{prefix}{name} is missing.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def _value(kind: Any, value: Any, path: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        if value is None and type(None) in get_args(kind):
            return None
        return _value(options[0], value, path)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigurationError(f"{path} is {value!r}; it must be a list.")
        return tuple(_value(get_args(kind)[0], entry, f"{path}[{index}]") for index, entry in enumerate(value))
    if origin is not None:  # a mapping
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{path} is {value!r}; it must be a mapping.")
        return {name: _value(get_args(kind)[1], entry, f"{path}.{name}") for name, entry in value.items()}
    return _plain(kind, value, path)


def _plain(kind: type, value: Any, path: str) -> Any:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigurationError(f"{path} is {value!r}; it must be {names[kind]}.")
    return value
