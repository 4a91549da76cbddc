"""Read the tensors of a foreign checkpoint without running anything that comes with them.

Safetensors where there are any; other files go through ``torch.load(weights_only=True)``, which builds tensors and
plain containers and refuses everything else. Tables in NVIDIA's dynamicemb format are raw numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mtgr.errors import ConfigurationError
from mtgr.files import read_json

OPTIONS_FILE = "mtgr.json"

# Names that the state dict goes by in what training loops save, and prefixes that wrappers put before every parameter.
_CONTAINERS = ("model_state_dict", "dense_dict", "state_dict", "model", "module")
_PREFIXES = ("module.", "model.", "_orig_mod.", "_dmp_wrapped_module.")
_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_DYNAMIC_KEYS = re.compile(r"(?P<table>.+)_emb_keys\.rank_(?P<rank>\d+)\.world_size_(?P<size>\d+)")
_SPARSE_IDS = 1_000_000  # rows that a table may have beyond what is filled, before its ids are taken for hashes


@dataclass(frozen=True)
class ForeignTensors:
    """What a source holds.

    Attributes:
        values: Tensors by name, wrappers' prefixes removed.
        files: Names of the files they come from.
        options: What ``mtgr.json`` beside them says: hyper-parameters that no tensor shows.
        ignored: Names of entries that are no tensors.
    """

    values: Mapping[str, Tensor]
    files: tuple[str, ...]
    options: Mapping[str, Any]
    ignored: tuple[str, ...] = ()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that must be there.

        Raises:
            ConfigurationError: If it is not.
        """
        if name not in self.values:
            raise ConfigurationError(f"the checkpoint lacks {name}; it is incomplete, or of another version.")
        return tuple(self.values[name].shape)

    def count(self, pattern: str) -> int:
        """How many numbers, from 0, ``pattern`` matches a name with; its first group is the number.

        Raises:
            ConfigurationError: If there is none, or one is left out.
        """
        found = {int(match[1]) for name in self.values if (match := re.match(pattern, name))}
        if found != set(range(len(found))) or not found:
            raise ConfigurationError(f"the checkpoint's layers {sorted(found)} are not numbered from 0 without a gap.")
        return len(found)


def read_tensors(source: Path) -> ForeignTensors:
    """Read a file, or what a directory holds.

    Raises:
        ConfigurationError: If there is nothing that can be read safely, or it is not clear what to read.
    """
    if not source.exists():
        raise ConfigurationError(f"{source} does not exist.")
    paths = _files(source) if source.is_dir() else [source]
    values: dict[str, Tensor] = {}
    ignored: list[str] = []
    for path in paths:
        found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
        tensors = _without_prefixes({name: value for name, value in found.items() if isinstance(value, Tensor)})
        twice = sorted(set(values) & set(tensors))
        if twice:
            raise ConfigurationError(f"{source}: {twice[0]} is in more than one file; leave one of them.")
        values |= tensors
        ignored += sorted(name for name, value in found.items() if not isinstance(value, Tensor))
    if source.is_dir():
        values |= _read_dynamic_tables(source / "dynamicemb_module")
    if not values:
        raise ConfigurationError(f"{source} holds no tensors.")
    folder = source if source.is_dir() else source.parent
    options = read_json(folder / OPTIONS_FILE) if (folder / OPTIONS_FILE).is_file() else {}
    if not isinstance(options, dict):
        raise ConfigurationError(f"{folder / OPTIONS_FILE} must hold a JSON object.")
    return ForeignTensors(values, tuple(path.name for path in paths), options, tuple(ignored))


def _files(directory: Path) -> list[Path]:
    """What to read of a directory; known names first."""
    chosen = sorted(directory.glob("*.safetensors"))
    for name in ("non_sparse.ckpt", "torch_module/model.0.pth"):
        if (directory / name).is_file():
            return [*chosen, directory / name]
    if chosen:
        return chosen
    others = [path for path in sorted(directory.iterdir()) if path.is_file() and path.suffix in _TORCH_SUFFIXES]
    if not others and _is_distributed(directory):
        raise ConfigurationError(
            f"{directory} is a checkpoint of torch.distributed, whose index only unpickling reads; where it was "
            "trained, call torch.distributed.checkpoint.format_utils.dcp_to_torch_save and give the file that it makes."
        )
    if len(others) != 1:
        if not others:
            raise ConfigurationError(
                f"there is no checkpoint in {directory}; run `make train`, or name another folder."
            )
        raise ConfigurationError(f"{directory} holds {', '.join(path.name for path in others)}; name one of them.")
    return others


def _is_distributed(directory: Path) -> bool:
    return any(directory.rglob("*.distcp")) or (directory / ".metadata").is_file()


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{path} is not a safetensors file: {error}.") from error


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no common class, and whatever it is, the file stays unread
        raise ConfigurationError(
            f"{path} cannot be read without running code in it, or is no PyTorch file ({_first_line(error)}); where it "
            "was trained, save its state dict with safetensors.torch.save_file."
        ) from error
    while isinstance(found, Mapping) and not any(isinstance(value, Tensor) for value in found.values()):
        inner = [found[name] for name in _CONTAINERS if isinstance(found.get(name), Mapping)]
        if not inner:
            break
        found = inner[0]
    if not isinstance(found, Mapping):
        raise ConfigurationError(f"{path} holds no state dict but {type(found).__name__}; save one.")
    return {str(name): value for name, value in found.items()}


def _without_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = dict(tensors)
    while names:
        prefix = next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in names)), None)
        if prefix is None:
            break
        names = {name.removeprefix(prefix): value for name, value in names.items()}
    return names


def _read_dynamic_tables(directory: Path) -> dict[str, Tensor]:
    """Tables that NVIDIA's dynamicemb dumps: INT64 keys and FP32 rows, one pair of files a rank."""
    ranks: dict[str, list[Path]] = {}
    for path in sorted(directory.rglob("*_emb_keys.rank_*")):
        match = _DYNAMIC_KEYS.fullmatch(path.name)
        if match:
            ranks.setdefault(match["table"], []).append(path)
    return {f"_embedding_collection.embeddings.{table}.weight": _dynamic_table(paths) for table, paths in ranks.items()}


def _dynamic_table(paths: Sequence[Path]) -> Tensor:
    keys = [np.fromfile(path, dtype="<i8") for path in paths]
    rows = [np.fromfile(path.with_name(path.name.replace("_emb_keys.", "_emb_values.")), dtype="<f4") for path in paths]
    ids = np.concatenate(keys)
    flat = np.concatenate(rows)
    if not len(ids) or len(flat) % len(ids) or ids.min() < 0 or len(np.unique(ids)) != len(ids):
        raise ConfigurationError(f"{paths[0].parent}: keys and rows of {paths[0].name} do not belong together.")
    if ids.max() >= len(ids) + _SPARSE_IDS:
        raise ConfigurationError(
            f"{paths[0].name} has ids up to {ids.max()} for {len(ids)} rows, so they are hashes; number them from 0."
        )
    table = np.zeros((int(ids.max()) + 1, len(flat) // len(ids)), dtype=np.float32)
    table[ids] = flat.reshape(len(ids), -1)
    return torch.from_numpy(table)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
