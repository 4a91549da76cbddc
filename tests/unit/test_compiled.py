"""The compiled engine against the reference network, on the CPU: the same answers, to the rule of each precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.precision import mean_spearman
from export.requests import real_requests
from mtgr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mtgr.engines.baseline import BaselineEngine
from mtgr.engines.compiled import CompiledEngine
from mtgr.engines.compiled_network import CompiledNetwork, CompiledPrecision
from mtgr.errors import ConfigurationError, InvalidRequestError
from mtgr.model import MTGR
from mtgr.schema import SLOT_COLUMN, TYPE_COLUMN, TokenType
from tests.interpreted import NO_TRITON, run_interpreted
from tests.unit.models import batch, random_user, small_catalog, small_config, small_schema, spread_model

SCHEMA, CATALOG = small_schema(), small_catalog()
CONFIGS: dict[str, dict[str, Any]] = {
    "mtgr": {},
    "causal": {"static_attention": "causal"},
    "bias": {"relative_bias": True},
    "two_widths": {"dqk": 8, "dv": 12},
    "two_widths_and_bias": {"dqk": 8, "dv": 12, "relative_bias": True},
    "shared_bottom": {"heads": "shared_bottom", "item_dim": 12},
}


def model_of(name: str = "mtgr", **more: Any) -> MTGR:
    return spread_model(small_config(**CONFIGS[name], **more), SCHEMA, CATALOG).requires_grad_(False)


def users(seed: int = 0) -> list[Any]:
    generator = np.random.default_rng(seed)
    sizes = [(3, 10, 5, 8), (2, 30, 0, 3), (0, 0, 12, 8), (3, 0, 0, 1), (1, 60, 20, 20)]
    return [random_user(SCHEMA, generator, profile=p, history=s, realtime=r, candidates=k) for p, s, r, k in sizes]


def scores(network: Any, seed: int = 0) -> list[np.ndarray]:
    """Each user's scores out of one padded batch."""
    several = users(seed)
    rows = batch(several, 90, 24)
    found = network(*rows).float().numpy()
    return [one[: len(user.candidates)] for one, user in zip(found, several, strict=True)]


def worst(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_the_references(name: str) -> None:
    model = model_of(name)
    wanted = scores(model)
    assert np.mean([one.std(axis=0).mean() for one in wanted if len(one) > 2]) > 0.05
    network = CompiledNetwork(model)
    assert network.has_kernel == (not name.startswith("two_widths"))
    assert worst(scores(network.rank), wanted) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_items_are_the_references(name: str) -> None:
    model = model_of(name)
    context, _ = batch(users(1), 90, 24)
    items, logits = CompiledNetwork(model).retrieve(context)
    wanted_items, wanted_logits = model.retrieve(context)
    torch.testing.assert_close(logits, wanted_logits, rtol=0, atol=2e-4)
    swapped = items != wanted_items
    assert logits[swapped].numel() < 0.02 * logits.numel()
    for row, wanted, values in zip(items, wanted_items, logits, strict=True):
        close = (values[:, None] - values[None, :]).abs() < 1e-4
        for place in (row != wanted).nonzero().flatten().tolist():
            assert wanted[place] in row[close[place]]


def test_random_weights_of_everything_are_read() -> None:
    """Each parameter of the network, changed, changes the scores: none was left out of the merged tables."""
    model = model_of()
    wanted = scores(CompiledNetwork(model).rank)
    for name, _ in model.named_parameters():
        if name.startswith("next_item_head"):
            continue
        changed = copy.deepcopy(model)
        changed.get_parameter(name).mul_(1.5).add_(0.1)
        assert worst(scores(CompiledNetwork(changed).rank), wanted) > 1e-6, name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["mtgr", "bias"])
def test_low_precision(name: str, precision: CompiledPrecision) -> None:
    """At most twice the error of the reference network in that precision."""
    model = model_of(name)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    twin, network = copy.deepcopy(model).to(dtype), CompiledNetwork(model, precision)
    native, found = [], []
    for seed in range(6):  # one batch's largest error is a matter of luck
        for exact, one, other in zip(scores(model, seed), scores(twin, seed), scores(network.rank, seed), strict=True):
            native.append(np.abs(one - exact).ravel())
            found.append(np.abs(other - exact).ravel())
    allowed, errors = np.concatenate(native), np.concatenate(found)
    assert 1e-5 < errors.max() <= 2 * allowed.max()
    assert errors.mean() <= 1.2 * allowed.mean()
    # What is looked up and added to a logit is not rounded.
    assert network.model.wide_terms.table.weight.dtype == torch.float32


def test_a_large_norm_length_does_not_underflow_in_fp16() -> None:
    model = model_of(attention_norm_length=1 << 22, norm_epsilon=1e-14)
    exact, twin = scores(model), scores(copy.deepcopy(model).to(torch.float16))
    assert worst(scores(CompiledNetwork(model, "fp16").rank), exact) <= 2 * worst(twin, exact) < 0.1


class RoundedLinear(torch.nn.Module):
    """A linear layer whose operands pass through e4m3, in plain PyTorch: scales by 128 columns and 128 x 128."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.bias = layer.bias
        self.weight = layer.weight.clone()
        for row in range(0, len(self.weight), 128):
            for column in range(0, self.weight.shape[1], 128):
                block = self.weight[row : row + 128, column : column + 128]
                scale = block.abs().max() / 448
                block.copy_((block / scale).to(torch.float8_e4m3fn).float() * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = []
        for part in x.split(128, dim=-1):
            scale = part.abs().amax(dim=-1, keepdim=True) / 448
            parts.append((part / scale).to(torch.float8_e4m3fn).float() * scale)
        return torch.nn.functional.linear(torch.cat(parts, dim=-1), self.weight, self.bias)


def rounded(model: MTGR) -> MTGR:
    """A copy with the linear layers of all blocks but the last in FP8."""
    twin = copy.deepcopy(model)
    for block in twin.blocks[:-1]:
        block.uvqk, block.output = RoundedLinear(block.uvqk), RoundedLinear(block.output)
    return twin


@pytest.mark.parametrize("width", [24, 160])
def test_fp8(width: int) -> None:
    """At most twice the error of the reference network whose linear layers round in FP8; it costs more than BF16."""
    model = model_of(d_model=width)
    network, coarser = CompiledNetwork(model, "fp8"), CompiledNetwork(model, "bf16")
    exact = [scores(model, seed) for seed in range(3)]

    def error(other: Any) -> float:
        return max(worst(scores(other, seed), one) for seed, one in enumerate(exact))

    assert error(coarser.rank) < error(network.rank) <= 2 * error(rounded(model))


def test_fp8_ranks_real_users_as_the_reference_does(checkpoint: Path) -> None:
    """Rank correlation over held-out candidates as DESIGN asks of eight bits, and FP16 as it asks of sixteen."""
    trained = load_checkpoint(checkpoint)
    requests = real_requests(trained, count=200).held_out
    assert len(requests) == 200

    def ranked(network: Any) -> list[np.ndarray]:
        with torch.inference_mode():
            return [network(*map(torch.from_numpy, (one.context, one.candidates)))[0].numpy() for one in requests]

    wanted = ranked(trained.model)
    assert np.mean([one.std(axis=0).mean() for one in wanted]) > 0.05
    found = {name: ranked(CompiledNetwork(trained.model, name).rank) for name in ("fp32", "fp16", "fp8")}
    assert worst(found["fp32"], wanted) < 1e-5
    assert mean_spearman(found["fp16"], wanted) >= 0.999
    assert 0.99 <= mean_spearman(found["fp8"], wanted) < 0.9999


def test_the_model_stays_as_it_was() -> None:
    model = model_of("bias")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    CompiledNetwork(model, "bf16")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.relative_bias is not None


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="choose one of fp32, fp16, bf16, fp8"):
        CompiledNetwork(model_of(), "int4")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "precision"), [("mtgr", "fp32"), ("mtgr", "fp8"), ("bias", "fp32")])
def test_a_few_tokens(name: str, precision: CompiledPrecision) -> None:
    """Small enough for Triton's interpreter: a user with all kinds of tokens and one without real-time ones."""
    model = model_of(name)
    generator = np.random.default_rng(5)
    sizes = [(2, 5, 4, 6), (1, 3, 0, 6), (3, 8, 6, 4)]
    rows = batch(
        [random_user(SCHEMA, generator, profile=p, history=s, realtime=r, candidates=k) for p, s, r, k in sizes]
    )
    network = CompiledNetwork(model, precision)
    found, wanted = network.rank(*rows), model(*rows)
    assert wanted[0].std(dim=0).mean() > 0.05
    allowed = 1e-5 if precision == "fp32" else 2 * float((rounded(model)(*rows) - wanted).abs().max())
    for user, (*_, count) in enumerate(sizes):
        torch.testing.assert_close(found[user, :count], wanted[user, :count], rtol=0, atol=allowed)
    if precision == "fp32":
        torch.testing.assert_close(network.retrieve(rows[0])[1], model.retrieve(rows[0])[1], rtol=0, atol=2e-4)


def test_interpreted() -> None:
    """The same on the kernels instead of PyTorch."""
    pytest.importorskip("triton", reason=NO_TRITON)
    assert run_interpreted(__file__, "-k", "few_tokens") >= 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    model = model_of()
    save_checkpoint(Checkpoint(model, model.config, SCHEMA, CATALOG), path)
    return path


def arrays(seed: int = 2) -> dict[str, np.ndarray]:
    context, candidates = batch(users(seed), 64, 16)
    return {"context": context.numpy(), "candidates": candidates.numpy()}


def test_the_engine_answers_as_baseline_does(directory: Path) -> None:
    engine, baseline = CompiledEngine(directory), BaselineEngine(directory)
    engine.warm_up([("rank", 1, 64, 16)])
    inputs = arrays()
    found, wanted = engine.infer(inputs), baseline.infer(inputs)
    assert found.keys() == wanted.keys()
    valid = inputs["candidates"][..., TYPE_COLUMN] != TokenType.PADDING
    np.testing.assert_allclose(found["task_scores"][valid], wanted["task_scores"][valid], rtol=0, atol=1e-5)
    found, wanted = (one.infer({"context": inputs["context"]}) for one in (engine, baseline))
    np.testing.assert_allclose(found["scores"], wanted["scores"], rtol=0, atol=2e-4)
    assert (found["items"] != wanted["items"]).mean() < 0.02
    zeros = {name: np.zeros_like(rows) for name, rows in inputs.items()}
    assert np.isfinite(engine.infer(zeros)["task_scores"]).all()  # as a model's warm-up sends them


def changed(**changes: Any) -> dict[str, np.ndarray]:
    inputs = arrays()
    for name, change in changes.items():
        change(inputs[name])
    return inputs


def put(user: int, token: int, column: int, value: int) -> Any:
    def change(rows: np.ndarray) -> None:
        rows[user, token, column] = value

    return change


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (changed(context=put(0, 2, TYPE_COLUMN, TokenType.PADDING)), "padding before a token"),
        (changed(context=put(0, 4, TYPE_COLUMN, TokenType.REALTIME)), "then real-time rows"),
        (changed(context=put(0, 4, TYPE_COLUMN, TokenType.CANDIDATE)), "then real-time rows"),
        (changed(context=put(0, 4, SLOT_COLUMN, 5)), "slots 0, 1, 2"),
        (changed(candidates=put(0, 1, TYPE_COLUMN, TokenType.HISTORY)), "no candidate"),
        (changed(candidates=put(0, 1, 2, 10**6)), "out of range"),
        (changed(context=put(0, 5, 2, 10**6)), "out of range"),
        (changed(context=put(0, 1, 2, -1)), "out of range"),
        (changed(context=put(0, 1, 2, SCHEMA.profile_size)), "out of range"),
        ({"candidates": arrays()["candidates"]}, "at least one"),
        ({"context": arrays()["context"][..., :5]}, "must be"),
        ({"context": arrays()["context"][:2], "candidates": arrays()["candidates"]}, "one set for each"),
    ],
)
def test_rows_that_cannot_be_served_are_refused(directory: Path, inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        CompiledEngine(directory).infer(inputs)


def test_a_context_that_leaves_candidates_no_position_is_refused(directory: Path) -> None:
    engine = CompiledEngine(directory)
    user = random_user(SCHEMA, np.random.default_rng(0), history=509, realtime=0)
    assert len(user.context) == engine.network.model.config.max_positions
    engine.infer({"context": user.context[None]})
    with pytest.raises(InvalidRequestError, match="candidates need one more"):
        engine.infer({"context": user.context[None], "candidates": user.candidates[None]})


def test_padding_to_a_bucket_does_not_matter() -> None:
    network, several = CompiledNetwork(model_of()), users(3)
    short = network.rank(*batch(several, 90, 24))
    long = network.rank(*batch(several, 128, 64))
    for index, user in enumerate(several):
        k = len(user.candidates)
        torch.testing.assert_close(short[index, :k], long[index, :k], rtol=0, atol=1e-6)
