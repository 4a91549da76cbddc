"""What a training run is made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from mtgr.errors import ConfigurationError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Recipe:
    """Settings of the optimisation.

    Attributes:
        epochs: Passes over the training samples.
        batch_tokens: Tokens of a padded batch.
        learning_rate: Peak of AdamW's learning rate; linear warm-up, then a cosine down to a hundredth.
        weight_decay: AdamW's decay of matrices; vectors are not decayed.
        warmup_fraction: Share of all steps spent warming up.
        average_decay: Decay of the exponential moving average of the parameters, per step; the average is what is kept.
        column_dropout: Probability that a feature of a candidate is hidden from the network (not from its wide terms).
        item_dropout: The same for the candidate's item.
        next_item_weight: Weight of the next-item loss beside the sum of the task losses.
        num_negatives: Sampled negatives of the next-item loss; all items of a catalogue that is not larger.
        gradient_norm: Gradients are clipped to this norm.
        seed: Of everything random; a resumed run equals an uninterrupted one.
        threads: PyTorch threads.
        accumulate: Micro-batches of ``batch_tokens`` whose gradients are averaged in one step, per process.
        precision: ``bf16`` computes under autocast; parameters, optimizer and losses stay fp32.
        activation_checkpointing: Whether blocks are computed again in the backward pass instead of being remembered.
        stochastic_length: Alpha of HSTU's stochastic length, in (1, 2); 0 takes every history whole.
        save_every: Steps after which the state is kept, beside the end of each epoch; 0 for that alone.
    """

    epochs: int = 12
    batch_tokens: int = 4096
    learning_rate: float = 3e-3
    weight_decay: float = 0.3
    warmup_fraction: float = 0.05
    average_decay: float = 0.995
    column_dropout: float = 0.5
    item_dropout: float = 0.1
    next_item_weight: float = 1.0
    num_negatives: int = 2048
    gradient_norm: float = 1.0
    seed: int = 1
    threads: int = 2
    accumulate: int = 1
    precision: Precision = "fp32"
    activation_checkpointing: bool = False
    stochastic_length: float = 0.0
    save_every: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        for name in ("epochs", "batch_tokens", "num_negatives", "threads", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"recipe: {name} must be at least 1.")
        for name in ("learning_rate", "gradient_norm"):
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"recipe: {name} must be positive.")
        for name in ("warmup_fraction", "average_decay", "column_dropout", "item_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigurationError(f"recipe: {name} must lie in [0, 1).")
        for name in ("weight_decay", "next_item_weight", "save_every"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"recipe: {name} must not be negative.")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigurationError("recipe: precision must be 'fp32' or 'bf16'.")
        if self.stochastic_length and not 1 < self.stochastic_length < 2:
            raise ConfigurationError("recipe: stochastic_length must lie in (1, 2), or be 0 for whole histories.")

    def with_seed(self, seed: int) -> Recipe:
        """The same with another seed."""
        return dataclasses.replace(self, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-ready values, later settings only where they are not at their defaults."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if k not in _LATER_SETTINGS or v != _LATER_SETTINGS[k]}


_LATER_SETTINGS = {
    field.name: field.default
    for field in dataclasses.fields(Recipe)
    if field.name in ("accumulate", "precision", "activation_checkpointing", "stochastic_length", "save_every")
}
