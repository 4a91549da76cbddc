"""The training loop: seeded, resumable at every epoch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from mtgr.data.samples import Sample
from mtgr.errors import ConfigurationError
from mtgr.files import read_json, replaced_directory, write_json
from mtgr.model import MTGR
from mtgr.schema import ABSENT, FIRST_COLUMN, SLOT_COLUMN, TYPE_COLUMN, TokenType
from mtgr.training.batches import Batch, collate, plan_batches
from mtgr.training.losses import next_item_loss, task_loss
from mtgr.training.recipe import Recipe

_STATE_FILE, PROGRESS_FILE = "state.safetensors", "progress.json"


class Trainer:
    """Trains a model in place.

    Args:
        model: The network.
        samples: Training samples.
        recipe: Settings.
        state_directory: Where the state is kept after every epoch, to be resumed from; None keeps none.
    """

    def __init__(
        self, model: MTGR, samples: Sequence[Sample], recipe: Recipe, state_directory: Path | None = None
    ) -> None:
        self.model = model
        self.samples = samples
        self.recipe = recipe
        self.state_directory = state_directory
        self.epoch = 0
        self.steps = 0
        self.average = [parameter.detach().clone() for parameter in model.parameters()]
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
        )

    def train(self, after_epoch: Callable[[int, float], None] | None = None) -> None:
        """Run the epochs that are left, with a progress bar; then the model's parameters are their moving average.

        Args:
            after_epoch: Called with the number of finished epochs and the epoch's mean loss.
        """
        torch.set_num_threads(self.recipe.threads)
        steps_per_epoch = len(self._plan(0))
        total = self.recipe.epochs * steps_per_epoch
        with tqdm(total=total, initial=self.epoch * steps_per_epoch, unit="step", desc="training") as bar:
            while self.epoch < self.recipe.epochs:
                # Seeded by epoch, so that a resumed run draws what an uninterrupted one would have drawn.
                torch.manual_seed(self.recipe.seed * 100_003 + self.epoch)
                generator = torch.Generator().manual_seed(self.recipe.seed * 100_019 + self.epoch)
                self.model.train()
                losses = []
                plan = self._plan(self.epoch)
                for index, indices in enumerate(plan):
                    rate = self._rate((self.epoch + index / len(plan)) / self.recipe.epochs)
                    batch = collate([self.samples[sample] for sample in indices])
                    losses.append(self._step(batch, rate, generator))
                    bar.update(steps_per_epoch * (index + 1) // len(plan) - steps_per_epoch * index // len(plan))
                self.epoch += 1
                loss = float(np.mean(losses))
                bar.set_postfix(epoch=self.epoch, loss=f"{loss:.4f}")
                if self.state_directory is not None:
                    self._save(self.state_directory)
                if after_epoch is not None:
                    after_epoch(self.epoch, loss)
        self.model.load_state_dict(self.model.state_dict() | self._named_average())
        self.model.eval()

    def resume(self) -> bool:
        """Go on from the state directory; False if it holds nothing.

        Raises:
            ConfigurationError: If the state is of another recipe or model.
        """
        directory = self.state_directory
        if directory is None or not (directory / PROGRESS_FILE).is_file():
            return False
        progress = read_json(directory / PROGRESS_FILE)
        expected = self._identity()
        if {key: progress.get(key) for key in expected} != expected:
            raise ConfigurationError(
                f"{directory} holds the state of another run; finish that one, or remove the directory to start anew."
            )
        try:
            tensors = load_file(directory / _STATE_FILE)
        except (SafetensorError, FileNotFoundError) as error:
            raise ConfigurationError(
                f"the state in {directory} is damaged ({error}); remove it to start anew."
            ) from error
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.average = [tensors[f"average.{name}"] for name, _ in self.model.named_parameters()]
        self.epoch, self.steps = int(progress["epoch"]), int(progress["steps"])
        return True

    def _identity(self) -> dict[str, Any]:
        """What a state must share with this run to be gone on with."""
        digest = hashlib.sha256()
        for sample in self.samples:
            for array in (sample.context, sample.candidates, sample.labels, sample.weights, sample.next_items):
                digest.update(array.tobytes())
        return {
            "recipe": self.recipe.to_dict(),
            "model": self.model.config.to_dict(),
            "samples": digest.hexdigest(),
        }

    def _named_average(self) -> dict[str, Tensor]:
        names = (name for name, _ in self.model.named_parameters())
        return dict(zip(names, self.average, strict=True))

    def _plan(self, epoch: int) -> list[list[int]]:
        return plan_batches(self.samples, self.recipe.batch_tokens, np.random.default_rng([self.recipe.seed, epoch]))

    def _rate(self, progress: float) -> float:
        """Learning rate after a share ``progress`` of the run."""
        warmup = self.recipe.warmup_fraction
        if progress < warmup:
            return self.recipe.learning_rate * max(progress / warmup, 0.01)
        cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
        return self.recipe.learning_rate * (0.01 + 0.99 * cosine)

    def _step(self, batch: Batch, rate: float, generator: torch.Generator) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        hidden = self._hidden(batch.candidates, generator)
        logits, queries = self.model.training_outputs(batch.context, batch.candidates, hidden)
        is_event = batch.context[..., TYPE_COLUMN] > TokenType.PROFILE
        context_items = torch.where(is_event, batch.context[..., FIRST_COLUMN], ABSENT)
        loss = task_loss(logits, batch.labels, batch.weights, batch.valid)
        loss = loss + self.recipe.next_item_weight * next_item_loss(
            self.model, queries, batch.next_items, context_items, self.recipe.num_negatives, generator
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_norm)
        self.optimizer.step()
        self.steps += 1
        # Early parameters are soon forgotten: the average spans a tenth of the steps so far, at most.
        decay = min(self.recipe.average_decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - decay)
        return float(loss.detach())

    def _hidden(self, candidates: Tensor, generator: torch.Generator) -> Tensor:
        """BOOL [B, k, W]: which ids of candidate rows the trunk is not shown this time; never types, slots or times."""
        probability = torch.full((candidates.shape[-1],), self.recipe.column_dropout)
        probability[FIRST_COLUMN] = self.recipe.item_dropout
        probability[[TYPE_COLUMN, SLOT_COLUMN, self.model.time_column]] = 0.0
        return torch.rand(candidates.shape, generator=generator) < probability

    def _save(self, directory: Path) -> None:
        tensors = {f"model.{name}": tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor.contiguous() for name, tensor in self._named_average().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value.contiguous() for key, value in values.items()}
        progress = {"epoch": self.epoch, "steps": self.steps} | self._identity()
        with replaced_directory(directory) as staging:
            save_file(tensors, staging / _STATE_FILE)
            write_json(staging / PROGRESS_FILE, progress)
