"""Dense attention with a relative bias against loops in float64: PyTorch's path, and the kernel under the interpreter.

Compiled for Ampere, Hopper and Blackwell, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.errors import ConfigurationError
from mtgr.kernels.bias import time_bucket_edges
from mtgr.kernels.dense_attention import dense_attention, launch_of
from mtgr.kernels.dense_bias import DenseBias
from mtgr.kernels.dense_configs import DenseConfig, DenseKey, candidates, choose
from mtgr.kernels.dense_fp8 import quantise
from mtgr.kernels.dispatch import use_triton
from mtgr.model.bias import RelativeBias
from tests.interpreted import NO_TRITON, run_interpreted
from tests.unit.test_dense_attention import MIXED, NORM_LENGTH, Case, Float64Array, User, close, random_users

# Shorter than the longest context of MIXED, so that distances are clipped.
MAX_POSITIONS = 40
TIME_BUCKETS = 40

# None: what is chosen. PyTorch knows no tiles.
CONFIGS = (
    [
        None,
        DenseConfig("pointers", 16, 64, 4, 2),
        DenseConfig("pointers", 64, 16, 4, 2),
        DenseConfig("descriptors", 32, 32, 4, 2),
        DenseConfig("specialised", 192, 64, 4, 4),
    ]
    if use_triton(torch.empty(0))
    else [None]
)


class BiasedCase(Case):
    """A case whose logits get the bias of one of two layers, with times from the same second to years apart."""

    def __init__(self, users: Sequence[User], is_padded: bool = False, seed: int = 0, **sizes: object) -> None:
        super().__init__(users, is_padded, seed=seed, **sizes)  # type: ignore[arg-type]
        torch.manual_seed(seed + 100)
        self.relative = RelativeBias(2, MAX_POSITIONS, TIME_BUCKETS).requires_grad_(False)
        for table in (self.relative.position_table, self.relative.time_table):
            table.normal_()
        tokens = len(self.q)
        self.times = torch.exp(torch.rand(tokens) * 20.0).to(torch.int32) * (torch.rand(tokens) > 0.2)
        self.positions = torch.zeros(tokens, dtype=torch.int64)
        for user, fields in zip(self.users, self.segments.sequences.tolist(), strict=True):
            self.positions[fields[3] : fields[3] + user.context] = torch.arange(user.context)
            self.positions[fields[4] : fields[4] + user.candidates] = user.context
        tables = [self.tables(layer) for layer in range(2)]
        edges = time_bucket_edges(self.relative.time_bucket, TIME_BUCKETS)
        self.bias = DenseBias(*tables[0], MAX_POSITIONS, self.times.to(torch.int32).contiguous(), edges)
        distance = (self.positions[:, None] - self.positions).clamp(1 - MAX_POSITIONS, MAX_POSITIONS - 1)
        self.distance = distance + MAX_POSITIONS - 1
        self.buckets = self.relative.time_bucket(self.times.long()[:, None] - self.times.long())
        self.layer = 0

    def tables(self, layer: int) -> tuple[Tensor, Tensor]:
        relative = self.relative
        return relative.position_table[:, layer].contiguous(), relative.time_table[:, layer].contiguous()

    def of_layer(self, layer: int) -> BiasedCase:
        self.layer, self.bias = layer, self.bias.for_layer(*self.tables(layer))
        return self

    def everywhere(self) -> Tensor:
        """FP32 [T, T] of all rows to all, of which only those within a sequence mean something."""
        positions, times = self.tables(self.layer)
        return positions[self.distance] + times[self.buckets]

    def biased(self, config: DenseConfig | None = None) -> Tensor:
        out = torch.full(self.q.shape, math.nan)
        settings = {"scale": self.scale, "norm_length": NORM_LENGTH}
        return dense_attention(self.q, self.k, self.v, out, self.segments, **settings, bias=self.bias, config=config)

    def expected(self) -> Float64Array:
        self._everywhere = self.everywhere().double().numpy()
        return super().expected()

    def _term(self, q: Float64Array, k: Float64Array, v: Float64Array, head: int, row: int, other: int) -> Float64Array:
        logit = float(q[row, head] @ k[other, head]) * self.scale + float(self._everywhere[row, other])
        return logit / (1.0 + math.exp(-logit)) * v[other, head]

    def plain(self) -> Tensor:
        """PyTorch with every product and sum, and the bias, in the case's own precision but the division by N."""
        result = torch.zeros(self.q.shape)
        bias = self.everywhere().to(self.dtype)
        for user, fields in zip(self.users, self.segments.sequences.tolist(), strict=True):
            rows = slice(fields[3], fields[3] + user.context)
            own = slice(fields[4], fields[4] + user.candidates)
            q, k, v = (x.transpose(0, 1) for x in (self.q * self.scale, self.k, self.v))
            tokens = torch.arange(user.context)
            visible = (tokens < (tokens + 1).clamp(min=user.static)[:, None]).to(self.dtype)
            context = (F.silu(q[:, rows] @ k[:, rows].transpose(1, 2) + bias[rows, rows]) * visible) @ v[:, rows]
            among = F.silu(q[:, own] @ k[:, rows].transpose(1, 2) + bias[own, rows]) @ v[:, rows]
            diagonal = bias.diagonal()[own, None]
            among = among + F.silu((q[:, own] * k[:, own]).sum(-1, keepdim=True) + diagonal) * v[:, own]
            result[rows] = context.transpose(0, 1).float() / NORM_LENGTH
            result[own] = among.transpose(0, 1).float() / NORM_LENGTH
        return result


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("is_padded", [False, True], ids=["jagged", "padded"])
def test_mixed_users(is_padded: bool, config: DenseConfig | None) -> None:
    case = BiasedCase(MIXED, is_padded)
    expected = case.expected()
    close(case.biased(config), expected, atol=2e-6)
    # A bias of another layer, and none, are far away.
    assert np.abs(expected - BiasedCase(MIXED, is_padded).of_layer(1).expected()).max() > 0.1
    assert np.abs(expected - Case(MIXED, is_padded).expected()).max() > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_random_lengths(seed: int) -> None:
    case = BiasedCase(random_users(seed, 4, 60), is_padded=seed % 2 == 0, num_heads=1, seed=seed)
    close(case.biased(CONFIGS[-1]), case.expected(), atol=2e-6)


@pytest.mark.parametrize("head_size", [48, 128, 256])
def test_head_sizes(head_size: int) -> None:
    case = BiasedCase(MIXED[:4], num_heads=3, head_size=head_size, seed=1)
    close(case.biased(), case.expected(), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_low_precision(dtype: torch.dtype, config: DenseConfig | None) -> None:
    """No more than twice the error of the same equation in plain PyTorch of that precision."""
    case = BiasedCase(MIXED, is_padded=True, head_size=64, dtype=dtype, seed=2)
    expected = case.expected()
    allowed = 2 * float(np.abs(case.plain().double().numpy() - expected).max())
    assert 1e-5 < allowed < 0.1
    close(case.biased(config), expected, atol=allowed)


def test_times_on_both_sides_of_every_edge() -> None:
    """The kernel guesses buckets by a logarithm; an integer decides, so that none is off by one."""
    case = BiasedCase([User(0, 2 * TIME_BUCKETS, 0)], num_heads=1)
    edges = case.bias.bucket_edges[:-1].repeat_interleave(2)
    times = edges - torch.tensor([1, 0], dtype=torch.int32).repeat(len(edges) // 2)
    case.times[: len(times)] = times
    case.times[0] = 0
    case.bias.times.copy_(case.times)
    case.buckets = case.relative.time_bucket(case.times.long()[:, None] - case.times.long())
    assert len(case.buckets[0].unique()) > 0.9 * TIME_BUCKETS
    close(case.biased(), case.expected(), atol=2e-6)


def test_layers_share_buckets() -> None:
    if use_triton(torch.empty(0)):
        return  # the kernel keeps nothing
    case = BiasedCase(MIXED, is_padded=True)
    case.biased()
    kept = {key: id(value) for key, value in case.bias.buckets.items()}
    assert len(kept) == 9  # of each user's context and candidates that are there
    second = case.of_layer(1)
    close(second.biased(), second.expected(), atol=2e-6)
    assert {key: id(value) for key, value in case.bias.buckets.items()} == kept


def test_any_tokens_to_whole_contexts() -> None:
    case = BiasedCase(MIXED[:2])
    rows = case.segments.sequences[0, 3:].tolist()
    n, c = MIXED[0].context, MIXED[0].candidates
    positions = torch.full((1, c), n)
    own, keys = case.times[None, rows[1] : rows[1] + c], case.times[None, rows[0] : rows[0] + n]
    found = case.bias.between(positions, own.to(torch.int32), keys.to(torch.int32))
    assert torch.equal(found[0], case.everywhere()[rows[1] : rows[1] + c, rows[0] : rows[0] + n])
    assert case.bias.own() == case.everywhere()[0, 0]


def test_what_is_refused() -> None:
    case = BiasedCase(MIXED[:2], head_size=64)
    with pytest.raises(ConfigurationError, match="contiguous vectors"):
        DenseBias(*case.tables(0), MAX_POSITIONS, case.times.long(), case.bias.bucket_edges)
    made = quantise(case.q, case.k, case.v, case.segments)
    with pytest.raises(ConfigurationError, match="no relative bias"):
        dense_attention(
            case.q, case.k, case.v, torch.empty_like(case.q), case.segments, scale=1.0, norm_length=1,
            quantised=made, bias=case.bias,
        )  # fmt: skip


def test_a_bias_has_configurations_of_its_own() -> None:
    """None of them is specialised."""
    for size, dtype in ((64, torch.bfloat16), (256, torch.float16), (128, torch.float32)):
        for capability in (0, 80, 90, 100):
            key = DenseKey(size, dtype, capability, 4096, has_bias=True)
            assert choose(key) in candidates(key)
            assert all(config.variant != "specialised" for config in candidates(key))


@pytest.mark.skipif(use_triton(torch.empty(0)), reason="This is that run.")
def test_interpreted() -> None:
    """All of the above on the kernel."""
    pytest.importorskip("triton", reason=NO_TRITON)
    assert run_interpreted(Path(__file__), "-k", "not compiles and not interpreted") >= 25


@pytest.mark.skipif(use_triton(torch.empty(0)), reason="Nothing is compiled under the interpreter.")
@pytest.mark.parametrize("capability", [80, 90, 100], ids=["sm_80", "sm_90", "sm_100"])
def test_it_compiles(
    capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Registers and shared memory suffice, and no element of the bias passes through shared memory."""
    pytest.importorskip("triton", reason=NO_TRITON)
    from mtgr.kernels.compilation import parallel_compilation
    from tests.unit.offline import MAX_STACK, SHARED, compile_for, finished, stack

    compile_for(capability, monkeypatch, tmp_path_factory.getbasetemp() / "triton")
    compiled = {}
    with parallel_compilation():
        for dtype, size in ((torch.bfloat16, 64), (torch.float16, 128), (torch.bfloat16, 256), (torch.float32, 64)):
            case = BiasedCase([User(5, 3, 2), User(70, 0, 20)], is_padded=True, head_size=size, dtype=dtype)
            choices = candidates(DenseKey(size, dtype, capability, 4096, has_bias=True))
            for config in choices if size == 128 and capability < 100 else choices[:1]:
                launch = launch_of(
                    case.q, case.k, case.v, torch.empty_like(case.q), case.segments, scale=0.1, norm_length=7,
                    bias=case.bias, config=config,
                )  # fmt: skip
                compiled[f"{dtype} {size} {config}"] = (dtype, launch.compile())
    for name, (dtype, future) in compiled.items():
        kernel = finished(future)
        assert stack(kernel) <= MAX_STACK, name
        assert kernel.metadata.shared <= SHARED[capability], name
        assembly = kernel.asm["ptx"]
        assert ("tanh.approx" in assembly) == (dtype != torch.float32), name
        assert "ld.global.nc.f32" in assembly, name
        assert not re.search(r"cp\.async\.ca[^;]*, 0x4", assembly), name
