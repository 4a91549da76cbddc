"""Dataclasses of settings out of YAML: strict, bounded, and with errors that name the key."""

from __future__ import annotations

import dataclasses
import math
import re
import stat
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml

from mtgr.errors import ConfigurationError

T = TypeVar("T")

MAX_BYTES = 64 << 10

_SHOWN = 60  # characters of a wrong value in a message


class _StrictLoader(yaml.SafeLoader):
    """Plain values only: no aliases, with which a short file becomes a huge one, no tags, and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(problem="aliases are not allowed", problem_mark=event.start_mark)
        if event.tag not in (None, "!"):
            raise yaml.constructor.ConstructorError(problem="tags are not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"key {_shown(key)} is not text"
            elif key in seen:
                problem = f"key {_shown(key)} is there twice"
            else:
                seen.add(key)
                continue
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
        return super().construct_mapping(node, deep)


# What is none of these is text: YAML 1.1 would make 8 out of 010, 90 out of 1:30, true out of on, and text out of 1e-3.
_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", "null|~|", ["n", "~", ""]),
    ("bool", "true|false", ["t", "f"]),
    ("int", "[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", list("-+.0123456789")),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"({_pattern})\Z"), _first)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping out of a YAML file.

    Raises:
        ConfigurationError: If the file is missing, too large, or no mapping of plain values.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its writer
            raise ConfigurationError(f"{path} is not a file; name a file of settings.")
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


def build(kind: type[T], values: Any, base: T | None = None, path: str = "") -> T:
    """A dataclass, and those in its fields, out of plain values.

    Args:
        kind: The dataclass; its fields are numbers, booleans, texts, tuples, mappings, dataclasses, or None.
        values: A mapping by the fields' names.
        base: Where absent ones come from, in dataclasses inside it too; without it they keep their defaults. What is no
            dataclass is replaced as a whole.
        path: Where the values stand, for messages.

    Raises:
        ConfigurationError: If a key is unknown or missing, or a value of another type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"{path or 'the file'} is {_shown(values)}; it must be a mapping.")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    prefix = f"{path}." if path else ""
    for name in values:
        if name not in fields:
            raise ConfigurationError(
                f"{prefix}{name[:_SHOWN]} is not a setting; choose out of {', '.join(sorted(fields))}."
            )
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and base is None and name not in values:
            raise ConfigurationError(f"{prefix}{name} is missing.")
    hints = typing.get_type_hints(kind)
    known = {} if base is None else {name: getattr(base, name) for name in fields}
    given = {name: _value(hints[name], value, known.get(name), f"{prefix}{name}") for name, value in values.items()}
    return kind(**{**known, **given})


def _value(kind: Any, value: Any, base: Any, path: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        if value is None and type(None) in get_args(kind):
            return None
        return _value(options[0], value, base, path)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, base, path)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigurationError(f"{path} is {_shown(value)}; it must be a list.")
        return tuple(_value(get_args(kind)[0], entry, None, f"{path}[{index}]") for index, entry in enumerate(value))
    if origin is not None:  # a mapping
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{path} is {_shown(value)}; it must be a mapping.")
        return {
            name: _value(get_args(kind)[1], entry, None, f"{path}.{name[:_SHOWN]}") for name, entry in value.items()
        }
    return _plain(kind, value, path)


def _plain(kind: type, value: Any, path: str) -> Any:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 63 else math.inf
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigurationError(f"{path} is {_shown(value)}; it must be {names[kind]}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigurationError(f"{path} is {value}; it must be a finite number.")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
