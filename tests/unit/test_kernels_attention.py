"""Paged attention against loops in float64 written from its equation.

Everything here runs on whichever implementation serves: PyTorch on the CPU, and the Triton kernel when Triton's
interpreter is on, as test_kernels_triton.py has it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.errors import ConfigurationError
from mtgr.kernels import configs
from mtgr.kernels.bias import MAX_SECONDS, bucket_by_edges
from mtgr.kernels.configs import TOKEN_CLASSES, LaunchConfig, LaunchKey, choose, token_class
from mtgr.kernels.paged_attention import (
    PagedBias,
    paged_attention,
    paged_attention_reference,
    time_bucket_edges,
    use_triton,
    warm_up,
)
from mtgr.model.bias import RelativeBias

Float64Array = npt.NDArray[np.float64]

GARBAGE = 2**30  # a block that does not exist
MAX_POSITIONS = 60
PADDING_TOKENS = 3
ATOL = 1e-6

# None: what is chosen for the size. The others reach every branch of the kernel; PyTorch knows no tiles.
LAUNCH_CONFIGS = (
    [None, LaunchConfig(16, 16, 4, 2), LaunchConfig(32, 64, 4, 2), LaunchConfig(16, 32, 4, 2, splits=3)]
    if use_triton(torch.empty(0))
    else [None]
)


@dataclass(frozen=True)
class Request:
    """One request: ``static`` and ``realtime`` context tokens, the first ``cached`` in the cache already."""

    static: int
    realtime: int
    candidates: int
    cached: int = 0
    is_causal: bool = False

    @property
    def context(self) -> int:
        return self.static + self.realtime

    @property
    def tokens(self) -> int:
        return self.context - self.cached + self.candidates

    def visible(self) -> list[int]:
        of_context = [
            index + 1 if index >= self.static or self.is_causal else self.static
            for index in range(self.cached, self.context)
        ]
        return of_context + [self.context] * self.candidates

    def positions(self) -> list[int]:
        return [*range(self.cached, self.context), *[self.context] * self.candidates]


MIXED = [
    Request(static=37, realtime=9, candidates=11),
    Request(static=20, realtime=0, candidates=0),
    Request(static=40, realtime=24, candidates=5, cached=32),
    Request(static=30, realtime=18, candidates=7, cached=48),
    Request(static=0, realtime=21, candidates=2),
    Request(static=33, realtime=3, candidates=4, is_causal=True),
    Request(static=1, realtime=0, candidates=0),
    Request(static=0, realtime=0, candidates=3),
]


class Step:
    """Random inputs of a step; whatever must not be read is NaN or garbage."""

    def __init__(
        self,
        requests: list[Request],
        num_heads: int = 2,
        head_size: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        padding_requests: int = 2,
        seed: int = 0,
    ) -> None:
        generator = np.random.default_rng(seed)
        self.requests, self.dtype = requests, dtype
        self.num_heads, self.head_size, self.block_size = num_heads, head_size, block_size
        self.scale, self.norm_length = head_size**-0.5, 29
        blocks = [-(-request.context // block_size) for request in requests]
        num_blocks = sum(blocks) + 5
        self.cache = torch.full((num_blocks, num_heads, block_size, 2 * head_size), math.nan, dtype=dtype)
        self.time_cache = torch.full((num_blocks, block_size, 2), -5, dtype=torch.int32)[..., 0]
        # Wider than needed, and rows do not follow on each other.
        wide = torch.full((len(requests) + padding_requests, max(blocks) + 3), GARBAGE, dtype=torch.int32)
        self.block_table = wide[:, : max(blocks) + 1]
        num_tokens = sum(request.tokens for request in requests) + PADDING_TOKENS
        width = num_heads * head_size
        self.merged = torch.full((num_tokens, 4 * width), math.nan, dtype=dtype)
        _, self.v, self.q, self.k = (
            part.unflatten(-1, (num_heads, head_size)) for part in self.merged.split(width, dim=-1)
        )
        self.visible = torch.full((num_tokens,), GARBAGE, dtype=torch.int32)
        self.is_candidate = torch.ones(num_tokens, dtype=torch.bool)
        self.positions = torch.full((num_tokens,), -GARBAGE, dtype=torch.int32)
        self.times = torch.full((num_tokens,), -GARBAGE, dtype=torch.int32)
        self.context_keys: list[Tensor] = []
        self.context_values: list[Tensor] = []
        self.context_times: list[Tensor] = []
        order = generator.permutation(num_blocks)
        starts = [0]
        for index, request in enumerate(requests):
            n = request.context
            own, order = order[: blocks[index]], order[blocks[index] :]
            self.block_table[index, : len(own)] = torch.from_numpy(own)
            keys, values = (self._normal(generator, n) for _ in range(2))
            times = torch.from_numpy(np.sort(generator.integers(0, 10**6, n)).astype(np.int32))
            for slot in range(n):
                block = int(own[slot // block_size])
                self.cache[block, :, slot % block_size, :head_size] = keys[slot]
                self.cache[block, :, slot % block_size, head_size:] = values[slot]
                self.time_cache[block, slot % block_size] = times[slot]
            self.context_keys.append(keys)
            self.context_values.append(values)
            self.context_times.append(times)
            start, stop = starts[-1], starts[-1] + request.tokens
            starts.append(stop)
            self.q[start:stop] = self._normal(generator, request.tokens)
            candidates = slice(stop - request.candidates, stop)
            self.k[candidates] = self._normal(generator, request.candidates)
            self.v[candidates] = self._normal(generator, request.candidates)
            self.visible[start:stop] = torch.tensor(request.visible())
            self.is_candidate[start : candidates.start] = False
            self.positions[start:stop] = torch.tensor(request.positions())
            now = torch.from_numpy(generator.integers(0, 2 * 10**6, request.candidates).astype(np.int32))
            self.times[start:stop] = torch.cat([times[request.cached :], now])
        self.query_start = torch.tensor([*starts, *[starts[-1]] * padding_requests], dtype=torch.int32)
        self.num_valid = starts[-1]
        self.bias: PagedBias | None = None
        self.relative: RelativeBias | None = None

    def _normal(self, generator: np.random.Generator, tokens: int) -> Tensor:
        values = generator.normal(size=(tokens, self.num_heads, self.head_size))
        return torch.from_numpy(values.astype(np.float32)).to(self.dtype)

    def with_bias(self, layer: int = 0) -> Step:
        torch.manual_seed(5)
        relative = RelativeBias(2, MAX_POSITIONS, 128).requires_grad_(False)
        relative.position_table.normal_()
        relative.time_table.normal_()
        tables = (relative.position_table[:, layer].contiguous(), relative.time_table[:, layer].contiguous())
        self.relative = relative
        if self.bias is None:
            edges = time_bucket_edges(relative.time_bucket, relative.time_buckets)
            self.bias = PagedBias(*tables, MAX_POSITIONS, self.positions, self.times, self.time_cache, edges)
        else:
            self.bias = self.bias.for_layer(*tables)
        return self

    def run(self, out_dtype: torch.dtype = torch.float32) -> Tensor:
        # Rows with a gap between them: an output need not be contiguous.
        wide = torch.full((len(self.q), self.num_heads + 1, self.head_size), math.nan, dtype=out_dtype)
        out = wide[:, : self.num_heads]
        got = paged_attention(*self.arguments(), out, scale=self.scale, norm_length=self.norm_length, bias=self.bias)
        assert got is out
        assert wide[:, self.num_heads :].isnan().all()
        assert out[self.num_valid :].isnan().all(), "padding was written"
        return out[: self.num_valid]

    def arguments(self) -> tuple[Tensor, ...]:
        return (
            self.q,
            self.k,
            self.v,
            self.cache,
            self.block_table,
            self.query_start,
            self.visible,
            self.is_candidate,
        )

    def expected(self) -> Float64Array:
        """The equation, token by token and head by head."""
        result = np.zeros((self.num_valid, self.num_heads, self.head_size))
        token = 0
        for index, request in enumerate(self.requests):
            keys, values = self.context_keys[index].double().numpy(), self.context_values[index].double().numpy()
            for seen, position in zip(request.visible(), request.positions(), strict=True):
                bias = self._bias_of(token, position, index)
                for head in range(self.num_heads):
                    query = self.q[token, head].double().numpy()
                    total = np.zeros(self.head_size)
                    for slot in range(seen):
                        total += silu(query @ keys[slot, head] * self.scale + bias[slot]) * values[slot, head]
                    if self.is_candidate[token]:
                        own = query @ self.k[token, head].double().numpy() * self.scale + bias[-1]
                        total += silu(own) * self.v[token, head].double().numpy()
                    result[token, head] = total / self.norm_length
                token += 1
        assert token == self.num_valid
        return result

    def _bias_of(self, token: int, position: int, index: int) -> Float64Array:
        """Bias of a token to each context token, and last to itself."""
        n = self.requests[index].context
        if self.bias is None or self.relative is None:
            return np.zeros(n + 1)
        positions = self.bias.position_table.double().numpy()
        times = self.bias.time_table.double().numpy()
        buckets = self.relative.time_bucket(self.times[token] - self.context_times[index])
        limit = MAX_POSITIONS - 1
        values = [
            positions[min(max(position - slot, -limit), limit) + limit] + times[int(buckets[slot])] for slot in range(n)
        ]
        return np.array([*values, positions[limit] + times[0]])

    def dense(self) -> Tensor:
        """The same in PyTorch, every product and sum in the step's own precision but the division by N."""
        rows = []
        for index, request in enumerate(self.requests):
            start, stop = int(self.query_start[index]), int(self.query_start[index + 1])
            query = self.q[start:stop].transpose(0, 1) * self.scale
            keys, values = (x[index].transpose(0, 1) for x in (self.context_keys, self.context_values))
            visible = torch.arange(request.context) < self.visible[start:stop, None]
            attended = (F.silu(query @ keys.transpose(1, 2)) * visible.to(self.dtype)) @ values
            own = self.is_candidate[start:stop, None]
            k, v = (x[start:stop].transpose(0, 1).masked_fill(~own, 0.0) for x in (self.k, self.v))
            attended = attended + F.silu((query * k).sum(-1, keepdim=True)) * v
            rows.append(attended.transpose(0, 1).float() / self.norm_length)
        return torch.cat(rows)


def silu(x: float) -> float:
    return float(x / (1.0 + math.exp(-x)))


def close(actual: Tensor, expected: Float64Array, atol: float = ATOL) -> None:
    assert not expected.size or expected.std() > 0.005
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=atol)


@pytest.fixture(params=LAUNCH_CONFIGS, ids=str)
def launch_config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr("mtgr.kernels.paged_attention.choose", lambda key: request.param)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.usefixtures("launch_config")
def test_mixed_requests(has_bias: bool, block_size: int) -> None:
    requests = [dataclasses.replace(r, cached=r.cached // block_size * block_size) for r in MIXED]
    step = Step(requests, block_size=block_size)
    if has_bias:
        step.with_bias()
    close(step.run(), step.expected())


@pytest.mark.parametrize("head_size", [48, 64, 96, 128, 256])
def test_head_sizes(head_size: int) -> None:
    step = Step(MIXED[2:5], num_heads=3, head_size=head_size, seed=1).with_bias()
    close(step.run(), step.expected())


@pytest.mark.parametrize(
    "requests",
    [
        [Request(static=32, realtime=16, candidates=6, cached=48)],
        [Request(static=5, realtime=0, candidates=0)],
        [Request(static=0, realtime=0, candidates=1)],
        [Request(static=17, realtime=0, candidates=1, cached=16)],
        [Request(static=16, realtime=1, candidates=0, cached=16)] * 5,
    ],
    ids=["candidates", "static", "one_candidate_alone", "one_of_each", "one_token_each"],
)
def test_small_steps(requests: list[Request]) -> None:
    step = Step(requests, num_heads=1, seed=2)
    close(step.run(), step.expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("launch_config")
def test_low_precision(dtype: torch.dtype) -> None:
    """No more than twice the error of the same network in plain PyTorch of that precision."""
    step = Step(MIXED[:4], head_size=64, dtype=dtype, seed=3)
    expected = step.expected()
    allowed = 2 * float(np.abs(step.dense().double().numpy() - expected).max())
    assert 1e-5 < allowed < 1e-1
    close(step.run(), expected, atol=allowed)
    # An output in the same precision is the same sum rounded once more.
    close(step.run(dtype), expected, atol=allowed + float(np.abs(expected).max()) * torch.finfo(dtype).eps)


def test_integer_flags_and_empty_steps() -> None:
    step = Step(MIXED[:2])
    expected = step.expected()
    step.is_candidate = step.is_candidate.to(torch.int32)
    close(step.run(), expected)
    step.query_start = torch.zeros_like(step.query_start)
    step.num_valid = 0
    assert len(step.run()) == 0


def test_many_queries_and_keys() -> None:
    """Requests longer than any tile, in a cache whose blocks do not follow on each other."""
    step = Step([Request(static=150, realtime=50, candidates=70), Request(static=260, realtime=0, candidates=1)], 1)
    padded = torch.full((*step.cache.shape[:1], 2, *step.cache.shape[1:]), math.nan)
    padded[:, 1] = step.cache
    step.cache = padded[:, 1]
    close(step.run(), step.expected())


def test_time_buckets_at_every_edge() -> None:
    """Values one-hot and logits the bucket's number: the output spells out the bucket of each key."""
    relative = RelativeBias(1, 8, 128)
    edges = time_bucket_edges(relative.time_bucket, relative.time_buckets)
    assert len(edges) == 72
    around = (edges[:-1, None] + torch.arange(-2, 3)).flatten()
    gaps = torch.cat([around, torch.tensor([0, 1, MAX_SECONDS, MAX_SECONDS + 1])]).to(torch.int32)
    head_size = block_size = 32
    gaps = torch.cat([gaps, gaps[: -len(gaps) % block_size]]).clamp(0).view(-1, block_size)
    cache = torch.zeros(len(gaps), 1, block_size, 2 * head_size)
    cache[..., head_size:] = torch.eye(head_size)
    q = torch.zeros(len(gaps), 1, head_size)
    bias = PagedBias(
        position_table=torch.zeros(15),
        time_table=torch.arange(129.0),
        max_positions=8,
        query_positions=torch.zeros(len(gaps), dtype=torch.int32),
        query_times=torch.zeros(len(gaps), dtype=torch.int32),
        key_times=gaps,
        bucket_edges=edges,
    )
    numbers = torch.arange(len(gaps), dtype=torch.int32)
    out = torch.full((len(gaps), 1, head_size), math.nan)
    start = torch.arange(len(gaps) + 1, dtype=torch.int32)
    no_candidates = torch.zeros(len(gaps), dtype=torch.bool)
    visible = torch.full_like(numbers, block_size)
    arguments = (q, q, q, cache, numbers[:, None], start, visible, no_candidates, out)
    paged_attention(*arguments, scale=1.0, norm_length=1, bias=bias)
    buckets = relative.time_bucket(gaps)
    assert buckets.unique().numel() == 71  # one second is in bucket 0, two in bucket 2
    torch.testing.assert_close(out[:, 0], F.silu(buckets.float()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("time_buckets", [1, 8, 71, 128])
def test_bucket_edges(time_buckets: int) -> None:
    relative = RelativeBias(1, 8, time_buckets)
    edges = time_bucket_edges(relative.time_bucket, time_buckets)
    assert edges.dtype == torch.int32
    assert len(edges) == min(time_buckets, 71) + 1
    generator = np.random.default_rng(0)
    spread = torch.from_numpy(np.exp(generator.uniform(0, math.log(MAX_SECONDS), 20_000)).astype(np.int32))
    near = (edges[:-1, None].long() + torch.arange(-300, 301)).clamp(0, MAX_SECONDS).flatten().to(torch.int32)
    for seconds in (spread, near, torch.arange(5000, dtype=torch.int32)):
        assert torch.equal(bucket_by_edges(seconds, edges).long(), relative.time_bucket(seconds))


def test_bucket_edges_of_other_steps_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="logarithms in steps of"):
        time_bucket_edges(lambda seconds: (seconds.float().clamp(min=1).log() / 0.5).long().clamp(max=20), 20)


def test_layers_share_the_buckets_of_a_step() -> None:
    step = Step(MIXED).with_bias(0)
    assert step.bias is not None
    first = step.run()
    kept = dict(step.bias.buckets)
    close(first, step.expected())
    second = step.with_bias(1).run()
    close(second, step.expected())
    assert not torch.allclose(first, second, atol=1e-3)
    assert {key: id(value) for key, value in step.bias.buckets.items()} == {k: id(v) for k, v in kept.items()}
    assert bool(kept) != use_triton(step.q)


def test_reference_serves_the_cpu_and_is_what_kernels_are_compared_with() -> None:
    step = Step(MIXED).with_bias()
    out = torch.empty(len(step.q), step.num_heads, step.head_size)
    settings: dict[str, Any] = {"scale": step.scale, "norm_length": step.norm_length, "bias": step.bias}
    close(paged_attention_reference(*step.arguments(), out, **settings)[: step.num_valid], step.expected())


def test_a_layout_that_the_kernel_cannot_read_is_refused() -> None:
    step = Step(MIXED[:1])
    if not use_triton(step.q):
        assert warm_up(2, 32, torch.float32, 16, device="cpu") == {}
        return
    step.cache = step.cache[:, :, :12]
    with pytest.raises(ConfigurationError, match="power of two"):
        step.run()
    step = Step(MIXED[:1])
    step.q = step.q.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ConfigurationError, match="contiguous"):
        step.run()


def test_what_is_chosen_depends_on_the_class_of_the_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [token_class(n) for n in (1, 16, 17, 64, 300, 4096, 10**6)] == [16, 16, 64, 64, 1024, 4096, 4096]
    monkeypatch.setattr(configs, "_chosen", {})
    key = LaunchKey(2, 256, torch.bfloat16, 16, False, 256)
    few = choose(dataclasses.replace(key, token_class=16))
    many = choose(dataclasses.replace(key, token_class=TOKEN_CLASSES[-1]))
    assert few.block_m < many.block_m
    assert few.splits > many.splits
    best = LaunchConfig(128, 64, 8, 2, 4)
    configs.remember(key, best)
    assert choose(key) == best
    assert choose(dataclasses.replace(key, num_heads=3)) != best
