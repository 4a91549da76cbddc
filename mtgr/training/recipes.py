"""Recipes per dataset: the sizes of the networks, the contexts and the optimisation that the comparison trains with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mtgr.config import ModelConfig
from mtgr.errors import ConfigurationError
from mtgr.training.recipe import Recipe


@dataclass(frozen=True)
class QualityRecipe:
    """How every model of one comparison is trained.

    Attributes:
        model: Sizes, common to all models.
        training: The optimisation.
        max_history: Longest segment S, in events.
        realtime_step: R_max, in events.
        note: Where the numbers come from, and what they were tried on.
    """

    model: ModelConfig
    training: Recipe
    max_history: int
    realtime_step: int
    note: str

    def with_epochs(self, epochs: int) -> QualityRecipe:
        """The same with another number of epochs."""
        return dataclasses.replace(self, training=dataclasses.replace(self.training, epochs=epochs))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-ready values; the seed belongs to a cell."""
        training = self.training.to_dict()
        del training["seed"]
        return {
            "model": self.model.to_dict(),
            "training": training,
            "max_history": self.max_history,
            "realtime_step": self.realtime_step,
        }


def _published(num_layers: int, width: int, heads: int, positions: int = 512) -> ModelConfig:
    """Sizes of a comparison in the manner of Meta's: one width for tokens and items."""
    return ModelConfig(
        num_layers=num_layers,
        d_model=width,
        num_heads=heads,
        item_dim=width,
        relative_bias=True,
        dropout=0.2,
        embedding_dropout=0.2,
        max_positions=positions,
    )


RECIPES: dict[str, QualityRecipe] = {
    "movielens-100k": QualityRecipe(
        model=ModelConfig(
            num_layers=2,
            d_model=64,
            num_heads=2,
            item_dim=64,
            relative_bias=True,
            dropout=0.2,
            embedding_dropout=0.1,
            max_positions=512,
            attention_norm_length=256,
        ),
        training=Recipe(epochs=6, batch_tokens=2048, learning_rate=4e-3, threads=1),
        max_history=100,
        realtime_step=100,
        note="short trials on the validation part, one thread",
    ),
    # Meta's public recipes, as far as they carry over: length 200, 128 negatives, temperature 0.05, dropout 0.2, width
    # 50 (64 here, for kernels), 2 blocks of 1 head for HSTU and SASRec; AdamW as in the demo.
    "movielens-1m": QualityRecipe(
        model=_published(num_layers=2, width=64, heads=1),
        training=Recipe(
            epochs=101,
            batch_tokens=65_536,
            learning_rate=1e-3,
            weight_decay=0.0,
            num_negatives=128,
            precision="bf16",
            save_every=500,
        ),
        max_history=200,
        realtime_step=100,
        note="Meta's ml-1m settings; for a GPU, not run",
    ),
    "movielens-20m": QualityRecipe(
        model=_published(num_layers=16, width=256, heads=8),
        training=Recipe(
            epochs=101,
            batch_tokens=65_536,
            learning_rate=1e-3,
            weight_decay=0.0,
            num_negatives=128,
            precision="bf16",
            activation_checkpointing=True,
            save_every=500,
        ),
        max_history=200,
        realtime_step=100,
        note="Meta's ml-20m large settings; for several GPUs, not run",
    ),
    "kuairand-pure": QualityRecipe(
        model=_published(num_layers=3, width=128, heads=2),
        training=Recipe(
            epochs=5, batch_tokens=65_536, learning_rate=1e-3, num_negatives=512, precision="bf16", save_every=500
        ),
        max_history=200,
        realtime_step=100,
        note="a first guess, not run",
    ),
    "kuairand-1k": QualityRecipe(
        model=_published(num_layers=3, width=128, heads=2, positions=2_304),
        training=Recipe(
            epochs=3,
            batch_tokens=65_536,
            learning_rate=1e-3,
            num_negatives=2_048,
            precision="bf16",
            activation_checkpointing=True,
            stochastic_length=1.6,
            save_every=200,
        ),
        max_history=2_000,
        realtime_step=100,
        note="a first guess, not run; histories of thousands of events, so thinned",
    ),
}


def find_recipe(dataset: str) -> QualityRecipe:
    """The recipe of ``dataset``.

    Raises:
        ConfigurationError: If there is none.
    """
    if dataset not in RECIPES:
        raise ConfigurationError(f"there is no recipe for {dataset!r}; add one to mtgr/training/recipes.py.")
    return RECIPES[dataset]
