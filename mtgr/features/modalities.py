"""Embeddings of items' text, images or sound, as another model made them: read, checked, and put in catalogue order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mtgr.config import Modality, StoredPrecision
from mtgr.errors import ConfigurationError
from mtgr.features.catalog import ItemCatalog
from mtgr.schema import FIRST_ID, UNKNOWN

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

IDS_TENSOR, VECTORS_TENSOR = "ids", "vectors"


@dataclass(frozen=True)
class ItemEmbeddings:
    """One modality's matrix.

    Attributes:
        ids: INT64 [E], raw item ids, distinct, in any order.
        vectors: FP32 [E, width]; a row of zeros counts as none.
    """

    ids: Int64Array
    vectors: Float32Array

    def __post_init__(self) -> None:
        """Check that ids and vectors belong together.

        Raises:
            ConfigurationError: If shapes do not fit, an id comes twice, or a number is not finite.
        """
        if self.ids.ndim != 1 or self.vectors.ndim != 2 or len(self.ids) != len(self.vectors):
            raise ConfigurationError(
                f"item embeddings have shape {list(self.vectors.shape)} and ids {list(self.ids.shape)}; "
                "give a matrix [items, width] and one id for each of its rows."
            )
        if self.vectors.shape[1] == 0 or len(np.unique(self.ids)) != len(self.ids):
            raise ConfigurationError("item embeddings must have at least one column, and each item's id once.")
        if not np.isfinite(self.vectors).all():
            row = int((~np.isfinite(self.vectors)).any(axis=1).argmax())
            raise ConfigurationError(
                f"the embedding of item {self.ids[row]} has a number that is not finite; leave the item out."
            )

    @property
    def width(self) -> int:
        """Numbers per item."""
        return int(self.vectors.shape[1])

    @property
    def hash(self) -> str:
        """Hex SHA-256 of ids and vectors, whatever their order."""
        order = np.argsort(self.ids)
        digest = hashlib.sha256(self.ids[order].astype("<i8").tobytes())
        digest.update(np.ascontiguousarray(self.vectors[order], dtype="<f4").data)
        return digest.hexdigest()

    @classmethod
    def load(cls, path: Path, ids: Path | None = None) -> ItemEmbeddings:
        """Read a matrix.

        Args:
            path: A .safetensors file with the tensors ``vectors`` and ``ids``, or a .npy file.
            ids: The .npy file of the ids that belong to a .npy matrix.

        Raises:
            ConfigurationError: If a file is missing, damaged, or of another form.
        """
        if path.suffix == ".npy":
            if ids is None:
                raise ConfigurationError(f"{path} has no item ids; name their .npy file too: NAME={path}:IDS.npy.")
            values = {VECTORS_TENSOR: _read_npy(path), IDS_TENSOR: _read_npy(ids)}
        elif ids is not None:
            raise ConfigurationError(f"{path} holds its own ids (tensor '{IDS_TENSOR}'); leave {ids} out.")
        else:
            values = _read_safetensors(path)
        vectors, raw = values[VECTORS_TENSOR], values[IDS_TENSOR]
        if vectors.dtype.kind != "f" or raw.dtype.kind not in "iu":
            raise ConfigurationError(
                f"{path} has vectors of {vectors.dtype} and ids of {raw.dtype}; they must be floats and integers."
            )
        # Too large for FP32 is infinite, which the check above refuses with the item's id.
        with np.errstate(over="ignore"):
            return cls(raw.astype(np.int64), vectors.astype(np.float32))

    def aligned(self, catalog: ItemCatalog) -> tuple[Float32Array, BoolArray]:
        """Unit vectors in the order of the catalogue's internal ids.

        Scale differs from encoder to encoder, and direction is what they are trained for. Items that the catalogue does
        not have are left out.

        Returns:
            FP32 [I, width], 0 where there is none, and BOOL [I], whether there is one.
        """
        vectors = np.zeros((catalog.num_items, self.width), dtype=np.float32)
        internal = catalog.to_internal(self.ids)
        norms = np.linalg.norm(self.vectors.astype(np.float64), axis=1)
        kept = (internal != UNKNOWN) & (norms > 0)
        vectors[internal[kept]] = self.vectors[kept] / norms[kept, None]
        present = np.zeros(catalog.num_items, dtype=np.bool_)
        present[internal[kept]] = True
        return vectors, present


def read_modalities(options: Sequence[str]) -> dict[str, ItemEmbeddings]:
    """Matrices by name out of command line options ``NAME=FILE.safetensors`` or ``NAME=FILE.npy:IDS.npy``.

    Raises:
        ConfigurationError: If an option is not of this form, a name comes twice, or a file cannot be read.
    """
    found: dict[str, ItemEmbeddings] = {}
    for option in options:
        name, separator, files = option.partition("=")
        path, _, ids = files.partition(":")
        if not separator or not name or not path or name in found:
            raise ConfigurationError(
                f"--modality {option}: write it as NAME=FILE.safetensors or NAME=FILE.npy:IDS.npy, each name once."
            )
        found[name] = ItemEmbeddings.load(Path(path), Path(ids) if ids else None)
    return found


def describe(embeddings: Mapping[str, ItemEmbeddings], precision: StoredPrecision = "fp32") -> tuple[Modality, ...]:
    """What a model config says of the matrices, in their order."""
    return tuple(Modality(name, matrix.width, precision) for name, matrix in embeddings.items())


def coverage(embeddings: ItemEmbeddings, catalog: ItemCatalog) -> float:
    """The share of the catalogue's items that have an embedding."""
    return float(embeddings.aligned(catalog)[1][FIRST_ID:].mean())


def _read_npy(path: Path) -> npt.NDArray[Any]:
    try:
        values: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path} does not exist.") from error
    except (ValueError, OSError) as error:
        raise ConfigurationError(f"{path} is not a .npy array of numbers ({error}).") from error
    return values


def _read_safetensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        values: dict[str, npt.NDArray[Any]] = load_file(path)
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path} does not exist.") from error
    except (SafetensorError, TypeError, KeyError) as error:
        raise ConfigurationError(f"{path} is not a safetensors file that NumPy can read ({error}).") from error
    if not {VECTORS_TENSOR, IDS_TENSOR} <= values.keys():
        raise ConfigurationError(
            f"{path} holds {', '.join(sorted(values)) or 'nothing'}; name its tensors '{VECTORS_TENSOR}' and "
            f"'{IDS_TENSOR}'."
        )
    return values
