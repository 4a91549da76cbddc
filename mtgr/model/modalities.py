"""What items' text, images or sound add to their vectors: frozen embeddings, projected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtgr.config import Modality
from mtgr.errors import ConfigurationError
from mtgr.features.catalog import ItemCatalog
from mtgr.features.modalities import ItemEmbeddings
from mtgr.schema import UNKNOWN

_INITIAL_SCALE = 0.1  # of a unit vector's projection: beside item tables that start at 0.05


class ModalityEmbedding(nn.Module):
    """Projection of one modality's matrix, a linear layer without a bias.

    The matrix has one column more than the embeddings: 1 for items that have none, and for unknown items. So the
    projection's last column is their learned default, and no engine needs a case for them. It starts at 0.

    Attributes:
        vectors: Float [I, width + 1], frozen, in the precision that the config names.
        project: The projection to ``item_dim``.
    """

    vectors: Tensor

    def __init__(self, modality: Modality, num_items: int, width: int) -> None:
        super().__init__()
        self.modality = modality
        self.project = nn.Linear(modality.width + 1, width, bias=False)
        nn.init.normal_(self.project.weight, std=_INITIAL_SCALE)
        nn.init.zeros_(self.project.weight[:, -1])
        dtype = torch.float16 if modality.precision == "fp16" else None
        self.register_buffer("vectors", torch.zeros(num_items, modality.width + 1, dtype=dtype))
        self.vectors[UNKNOWN:, -1] = 1.0

    def forward(self, items: Tensor) -> Tensor:
        """Float [..., item_dim] of INT [...] item ids."""
        return self._projected(F.embedding(items, self.vectors))

    def all(self) -> Tensor:
        """Those of the whole catalogue, float [I, item_dim]."""
        return self._projected(self.vectors)

    def fill(self, embeddings: ItemEmbeddings, catalog: ItemCatalog) -> None:
        """Take the matrix.

        Raises:
            ConfigurationError: If it has another width than the config says, or no item of the catalogue.
        """
        if embeddings.width != self.modality.width:
            raise ConfigurationError(
                f"the {self.modality.name} embeddings have {embeddings.width} columns, but the network takes "
                f"{self.modality.width}; make them with the encoder that it was trained with."
            )
        vectors, present = embeddings.aligned(catalog)
        if not present.any():
            raise ConfigurationError(
                f"the {self.modality.name} embeddings have none of the catalogue's items; check their ids."
            )
        missing = torch.from_numpy(~present)
        missing[:UNKNOWN] = False
        self.vectors.copy_(torch.cat([torch.from_numpy(vectors), missing[:, None].float()], dim=1))

    def _projected(self, rows: Tensor) -> Tensor:
        projected: Tensor = self.project(rows.to(self.project.weight.dtype))
        return projected


class ItemModalities(nn.ModuleDict):
    """The sum of all modalities' projections, by name.

    Args:
        modalities: At least one.
        num_items: Item ids, I.
        width: Of an item's vector.

    Raises:
        ConfigurationError: If a name cannot be one of a module's.
    """

    def __init__(self, modalities: Sequence[Modality], num_items: int, width: int) -> None:
        super().__init__()
        for modality in modalities:
            if hasattr(self, modality.name):
                raise ConfigurationError(f"a modality cannot be called {modality.name}; choose another name.")
            self[modality.name] = ModalityEmbedding(modality, num_items, width)

    def forward(self, items: Tensor) -> Tensor:
        """Float [..., item_dim] of INT [...] item ids."""
        first, *others = self.embeddings()
        total: Tensor = first(items)
        for other in others:
            total = total + other(items)
        return total

    def all(self) -> Tensor:
        """Those of the whole catalogue, float [I, item_dim]."""
        first, *others = self.embeddings()
        total = first.all()
        for other in others:
            total = total + other.all()
        return total

    def embeddings(self) -> list[ModalityEmbedding]:
        """The modalities in the config's order."""
        return [cast(ModalityEmbedding, module) for module in self.values()]

    def fill(self, embeddings: Mapping[str, ItemEmbeddings], catalog: ItemCatalog) -> None:
        """Take the matrices by name.

        Raises:
            ConfigurationError: If one is missing or too many, or does not fit.
        """
        if set(embeddings) != set(self):
            raise ConfigurationError(
                f"the network takes the modalities {', '.join(self)}, but was given {', '.join(embeddings) or 'none'}; "
                "give each of them once."
            )
        for name, matrix in embeddings.items():
            cast(ModalityEmbedding, self[name]).fill(matrix, catalog)
