"""What training at scale adds: accumulation, processes, states within an epoch, precision, stochastic length."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mtgr.checkpoint import build_model
from mtgr.config import ModelConfig
from mtgr.data.samples import Sample
from mtgr.errors import ConfigurationError
from mtgr.model import MTGR
from mtgr.schema import SLOT_COLUMN, TYPE_COLUMN, TokenType
from mtgr.training.loop import PROGRESS_FILE, Trainer
from mtgr.training.parallel import Workers
from mtgr.training.prepare import PreparedData, prepare
from mtgr.training.recipe import Recipe
from mtgr.training.stochastic_length import shorten, threshold
from tests.unit.synthetic import LIKED, SyntheticDataset

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(
    d_model=16, item_dim=8, feature_dim=4, head_dim=8, num_experts=2, dropout=0.1, embedding_dropout=0.1
)
RECIPE = Recipe(epochs=2, batch_tokens=256, learning_rate=1e-2, column_dropout=0.2, num_negatives=16, threads=1)


def make_data() -> PreparedData:
    return prepare(SyntheticDataset(), LIKED, max_history=16, realtime_step=8)


@pytest.fixture(scope="module")
def data() -> PreparedData:
    return make_data()


@pytest.fixture(scope="module")
def samples(data: PreparedData) -> list[Sample]:
    return data.train_samples()


def new_model(data: PreparedData, config: ModelConfig = CONFIG) -> MTGR:
    torch.manual_seed(RECIPE.seed)
    return build_model(config, data.schema, data.catalog)


def trained(data: PreparedData, samples: list[Sample], **changes: object) -> MTGR:
    model = new_model(data)
    Trainer(model, samples, dataclasses.replace(RECIPE, **changes)).train()  # type: ignore[arg-type]
    return model


def worker(output: Path, state: Path, accumulate: int) -> None:
    """What each process of a run of several does; also the process that a test kills."""
    workers = Workers.join()
    data = make_data()
    model = new_model(data)
    recipe = dataclasses.replace(RECIPE, accumulate=accumulate, save_every=3)
    trainer = Trainer(model, data.train_samples(), recipe, state, workers)
    trainer.resume()
    trainer.train()
    if workers.leads:
        save_file(model.state_dict(), output)
    workers.leave()


def command(output: Path, state: Path, accumulate: int) -> list[str]:
    return ["-m", "tests.unit.test_training_scale", str(output), str(state), str(accumulate)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_two_processes_equal_one_that_accumulates(data: PreparedData, samples: list[Sample], tmp_path: Path) -> None:
    single = new_model(data)
    Trainer(single, samples, dataclasses.replace(RECIPE, accumulate=4, save_every=3)).train()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, *command(tmp_path / "two.safetensors", tmp_path / "state", 2)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    both = load_file(tmp_path / "two.safetensors")
    untrained = new_model(data).state_dict()
    moved = 0.0
    for name, value in single.state_dict().items():
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-5, msg=name)
        moved = max(moved, float((value.float() - untrained[name].float()).abs().max()))
    assert moved > 0.02


def test_killed_within_an_epoch_and_resumed_gives_the_same_weights(tmp_path: Path) -> None:
    whole, cut, state = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors", tmp_path / "state"
    assert (
        subprocess.run(
            [sys.executable, *command(whole, tmp_path / "other", 1)], cwd=ROOT, env=environment(), timeout=240
        ).returncode
        == 0
    )
    with subprocess.Popen([sys.executable, *command(cut, state, 1)], cwd=ROOT, env=environment()) as process:
        deadline = time.monotonic() + 120
        while not (state / PROGRESS_FILE).is_file():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not cut.exists()
    subprocess.run([sys.executable, *command(cut, state, 1)], cwd=ROOT, env=environment(), timeout=240, check=True)
    expected, got = load_file(whole), load_file(cut)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("changes", [{"accumulate": 3}, {"stochastic_length": 1.2}, {"precision": "bf16"}])
def test_stopped_between_two_steps_and_resumed(
    data: PreparedData,
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
) -> None:
    recipe = dataclasses.replace(RECIPE, save_every=2, **changes)  # type: ignore[arg-type]
    whole = new_model(data)
    Trainer(whole, samples, recipe).train()
    save = Trainer._save

    def save_and_stop(trainer: Trainer, directory: Path) -> None:
        save(trainer, directory)
        if trainer.batch:
            raise StoppedError

    interrupted = Trainer(new_model(data), samples, recipe, tmp_path / "state")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", save_and_stop)
        with pytest.raises(StoppedError):
            interrupted.train()
    resumed = new_model(data)
    trainer = Trainer(resumed, samples, recipe, tmp_path / "state")
    assert trainer.resume()
    assert (trainer.epoch, trainer.steps) == (0, 2)
    assert trainer.batch > 0
    losses: list[float] = []
    trainer.train(lambda _, loss: losses.append(loss))
    assert len(losses) == recipe.epochs
    for (name, expected), (_, got) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(expected, got), name


def test_activation_checkpointing_changes_nothing(data: PreparedData, samples: list[Sample]) -> None:
    plain, checkpointed = trained(data, samples), trained(data, samples, activation_checkpointing=True)
    for (name, expected), (_, got) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_activation_checkpointing_computes_blocks_again(data: PreparedData, samples: list[Sample]) -> None:
    def block_calls(**changes: object) -> int:
        model, calls = new_model(data), 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        model.blocks[0].uvqk.register_forward_hook(count)
        Trainer(model, samples, dataclasses.replace(RECIPE, epochs=1, **changes)).train()  # type: ignore[arg-type]
        return calls

    assert block_calls(activation_checkpointing=True) == 2 * block_calls()


def test_bf16_keeps_parameters_in_fp32_and_learns_the_same(data: PreparedData, samples: list[Sample]) -> None:
    losses: dict[str, list[float]] = {}
    for precision in ("fp32", "bf16"):
        model = new_model(data)
        seen = losses.setdefault(precision, [])
        recipe = dataclasses.replace(RECIPE, precision=precision)  # type: ignore[arg-type]
        Trainer(model, samples, recipe).train(lambda _, loss, seen=seen: seen.append(loss))  # type: ignore[misc]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.02)


def history_sample(events: int, labelled: bool = True) -> Sample:
    context = np.zeros((events + 4, 5), dtype=np.int32)
    context[:, TYPE_COLUMN] = [TokenType.PROFILE] + [TokenType.HISTORY] * events + [TokenType.REALTIME] * 3
    context[:, SLOT_COLUMN] = np.arange(events + 4)
    next_items = np.zeros(events + 4, dtype=np.int64)
    next_items[-3:] = 7
    next_items[events] = 9 if labelled else 0  # the last static token
    nothing = np.zeros((1, 1), dtype=np.int8)
    return Sample(context, context[:1], nothing, nothing.astype(np.float32), next_items, np.zeros(1, dtype=np.int64))


def test_stochastic_length_follows_its_equation() -> None:
    longest, alpha = 400, 1.5
    kept = threshold(longest, alpha)
    assert kept == int(400**0.75) == 89
    for events, whole in ((80, 1.0), (89, 1.0), (100, min(1.0, 400**1.5 / 100**2)), (400, 400**1.5 / 400**2)):
        generator = np.random.default_rng(0)
        original = history_sample(events)
        shortened = [shorten(original, longest, alpha, generator) for _ in range(400)]
        lengths = [int((sample.context[:, TYPE_COLUMN] == TokenType.HISTORY).sum()) for sample in shortened]
        assert set(lengths) <= {events, min(events, kept)}
        share = np.mean([length == events for length in lengths])
        assert share == pytest.approx(whole, abs=0.04)


def test_stochastic_length_keeps_what_is_not_history_and_the_order() -> None:
    generator = np.random.default_rng(1)
    original = history_sample(400)
    seen: set[int] = set()
    for _ in range(50):
        sample = shorten(original, 400, 1.2, generator)
        slots = sample.context[:, SLOT_COLUMN]
        assert (np.diff(slots) > 0).all()
        assert slots[0] == 0
        assert slots[-4:].tolist() == [400, 401, 402, 403]  # the labelled last static token and the real-time ones
        np.testing.assert_array_equal(sample.context, original.context[slots])
        np.testing.assert_array_equal(sample.next_items, original.next_items[slots])
        seen |= set(slots.tolist())
    assert len(seen) > 350  # another subsequence each time


@pytest.mark.parametrize(
    "change", [{"accumulate": 0}, {"precision": "fp8"}, {"stochastic_length": 2.5}, {"save_every": -1}]
)
def test_bad_recipes(change: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        Recipe(**change)  # type: ignore[arg-type]


def test_checkpoints_of_before_stay_up_to_date() -> None:
    assert "accumulate" not in Recipe().to_dict()
    assert Recipe(accumulate=2).to_dict()["accumulate"] == 2


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
