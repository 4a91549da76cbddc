"""The training loop: seeded, resumable, on one process or several.

A step averages the gradients of ``accumulate`` micro-batches of every process. Which micro-batches these are, and what
is drawn at random for each, depends on seed, epoch, and the micro-batch's place in the epoch alone: two processes give
what one gives with twice the accumulation, to rounding, and a resumed run gives what an uninterrupted one gives.
"""

from __future__ import annotations

import functools
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
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from mtgr.data.samples import Sample
from mtgr.errors import ConfigurationError
from mtgr.files import read_json, replaced_directory, write_json
from mtgr.peers.zoo import Trainable
from mtgr.schema import ABSENT, FIRST_COLUMN, SLOT_COLUMN, TYPE_COLUMN, TokenType
from mtgr.training.batches import Batch, collate, plan_batches
from mtgr.training.losses import next_item_loss, task_loss
from mtgr.training.parallel import Workers
from mtgr.training.recipe import Recipe
from mtgr.training.stochastic_length import shorten

_STATE_FILE, PROGRESS_FILE = "state.safetensors", "progress.json"


class Trainer:
    """Trains a model in place.

    Args:
        model: The network.
        samples: Training samples.
        recipe: Settings.
        state_directory: Where the state is kept, to be resumed from; None keeps none.
        workers: The processes of this run; this one alone by default.

    Attributes:
        epoch: Finished epochs.
        batch: Finished micro-batches of the epoch under way.
        steps: Finished steps of the optimizer.
    """

    def __init__(
        self,
        model: Trainable,
        samples: Sequence[Sample],
        recipe: Recipe,
        state_directory: Path | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.model = model
        self.samples = samples
        self.recipe = recipe
        self.state_directory = state_directory
        self.workers = workers or Workers()
        self.epoch = self.batch = self.steps = 0
        self._losses: list[float] = []
        self._device = next(model.parameters()).device
        self._longest_history = max((_history_length(sample) for sample in samples), default=0)
        if recipe.activation_checkpointing:
            _checkpoint_activations(model)
        self.workers.share(model.parameters())
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
        recipe, group_size = self.recipe, self.recipe.accumulate * self.workers.size
        steps_per_epoch = math.ceil(len(self._plan(0)) / group_size)
        total = recipe.epochs * steps_per_epoch
        initial = self.epoch * steps_per_epoch + self.batch // group_size
        with tqdm(total=total, initial=initial, unit="step", desc="training", disable=not self.workers.leads) as bar:
            while self.epoch < recipe.epochs:
                # Seeded by epoch, so that a resumed run draws what an uninterrupted one would have drawn.
                torch.manual_seed(recipe.seed * 100_003 + self.epoch)
                generator = torch.Generator().manual_seed(recipe.seed * 100_019 + self.epoch)
                self.model.train()
                plan = self._plan(self.epoch)
                while self.batch < len(plan):
                    group = plan[self.batch : self.batch + group_size]
                    rate = self._rate((self.epoch + self.batch / len(plan)) / recipe.epochs)
                    self._losses.append(self._step(group, rate, generator))
                    self.batch += len(group)
                    done, all_batches = math.ceil(self.batch / group_size), math.ceil(len(plan) / group_size)
                    bar.update(steps_per_epoch * done // all_batches - steps_per_epoch * (done - 1) // all_batches)
                    if recipe.save_every and self.steps % recipe.save_every == 0 and self.batch < len(plan):
                        self._keep()
                loss = float(np.mean(self._losses))
                self.epoch, self.batch, self._losses = self.epoch + 1, 0, []
                bar.set_postfix(epoch=self.epoch, loss=f"{loss:.4f}")
                self._keep()
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
        self.average = [tensors[f"average.{name}"].to(self._device) for name, _ in self.model.named_parameters()]
        self.epoch, self.steps = int(progress["epoch"]), int(progress["steps"])
        self.batch, self._losses = int(progress.get("batch", 0)), list(progress.get("losses", []))
        return True

    def _identity(self) -> dict[str, Any]:
        """What a state must share with this run to be gone on with."""
        identity = {
            "recipe": self.recipe.to_dict(),
            "model": self.model.config.to_dict(),
            "samples": self._samples_hash,
        }
        return identity if self.workers.size == 1 else identity | {"processes": self.workers.size}

    @functools.cached_property
    def _samples_hash(self) -> str:
        digest = hashlib.sha256()
        for sample in self.samples:
            for array in (sample.context, sample.candidates, sample.labels, sample.weights, sample.next_items):
                digest.update(array.tobytes())
        return digest.hexdigest()

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

    def _step(self, group: Sequence[list[int]], rate: float, generator: torch.Generator) -> float:
        """One step of the optimizer on the micro-batches ``group``; their mean loss."""
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for index, indices in self.workers.own(group):
            thinning = None
            if self._draws_by_batch:
                seed = [self.recipe.seed, self.epoch, self.batch + index]
                thinning = np.random.default_rng(seed)
                torch.manual_seed(int(thinning.integers(1 << 62)))
                generator.manual_seed(int(thinning.integers(1 << 62)))
            loss = self._loss(self._collate(indices, thinning).to(self._device), generator) / len(group)
            loss.backward()
            total += float(loss.detach())
        self.workers.add_gradients(list(self.model.parameters()))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_norm)
        self.optimizer.step()
        self.steps += 1
        # Early parameters are soon forgotten: the average spans a tenth of the steps so far, at most.
        decay = min(self.recipe.average_decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - decay)
        return self.workers.add_up(total)

    @property
    def _draws_by_batch(self) -> bool:
        """Whether random numbers are seeded by micro-batch, which any way to divide or interrupt an epoch needs.

        Otherwise one stream runs through the epoch, as it did before there were such ways: the demo's checkpoint is
        made with it.
        """
        recipe = self.recipe
        return bool(recipe.accumulate > 1 or self.workers.size > 1 or recipe.save_every or recipe.stochastic_length)

    def _collate(self, indices: Sequence[int], thinning: np.random.Generator | None) -> Batch:
        samples = [self.samples[index] for index in indices]
        alpha = self.recipe.stochastic_length
        if alpha and thinning is not None:
            samples = [shorten(sample, self._longest_history, alpha, thinning) for sample in samples]
        return collate(samples)

    def _loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        hidden = self._hidden(batch.candidates, generator).to(self._device)
        is_event = batch.context[..., TYPE_COLUMN] > TokenType.PROFILE
        context_items = torch.where(is_event, batch.context[..., FIRST_COLUMN], ABSENT)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            logits, queries = self.model.training_outputs(batch.context, batch.candidates, hidden)
        loss = task_loss(logits.float(), batch.labels, batch.weights, batch.valid)
        return loss + self.recipe.next_item_weight * next_item_loss(
            self.model, queries.float(), batch.next_items, context_items, self.recipe.num_negatives, generator
        )

    def _hidden(self, candidates: Tensor, generator: torch.Generator) -> Tensor:
        """BOOL [B, k, W]: which ids of candidate rows the trunk is not shown this time; never types, slots or times."""
        probability = torch.full((candidates.shape[-1],), self.recipe.column_dropout)
        probability[FIRST_COLUMN] = self.recipe.item_dropout
        probability[[TYPE_COLUMN, SLOT_COLUMN, self.model.time_column]] = 0.0
        return torch.rand(candidates.shape, generator=generator) < probability

    def _keep(self) -> None:
        if self.state_directory is not None:
            if self.workers.leads:
                self._save(self.state_directory)
            self.workers.wait()

    def _save(self, directory: Path) -> None:
        tensors = {f"model.{name}": tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor.contiguous() for name, tensor in self._named_average().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value.contiguous() for key, value in values.items()}
        progress = {"epoch": self.epoch, "steps": self.steps, "batch": self.batch, "losses": self._losses}
        progress |= self._identity()
        with replaced_directory(directory) as staging:
            save_file(tensors, staging / _STATE_FILE)
            write_json(staging / PROGRESS_FILE, progress)


def _history_length(sample: Sample) -> int:
    return int((sample.context[:, TYPE_COLUMN] == TokenType.HISTORY).sum())


def _checkpoint_activations(model: Trainable) -> None:
    """Let the blocks be computed again in the backward pass; a model without blocks has nothing worth it."""
    for block in getattr(model, "blocks", ()):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
