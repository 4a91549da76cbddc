"""Dense attention against loops in float64 written from its equation.

Everything here runs on whichever implementation serves: PyTorch on the CPU, and the Triton kernels when Triton's
interpreter is on, as test_dense_compilation.py has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.errors import ConfigurationError
from mtgr.kernels import dense_configs
from mtgr.kernels.dense_attention import dense_attention, dense_attention_reference
from mtgr.kernels.dense_configs import LENGTH_CLASSES, DenseConfig, DenseKey, candidates, choose, length_class, remember
from mtgr.kernels.dense_fp8 import SCALE_ROWS, QuantisedHeads, dequantise, quantise
from mtgr.kernels.dense_segments import Segments, by_head, jagged_segments, padded_segments
from mtgr.kernels.dense_tuning import warm_up_dense
from mtgr.kernels.dispatch import use_triton
from mtgr.schema import TokenType

Float64Array = npt.NDArray[np.float64]

NORM_LENGTH = 29
ATOL = 1e-6

# None: what is chosen. The others reach every branch of the kernel; PyTorch knows no tiles.
CONFIGS = (
    [
        None,
        DenseConfig("pointers", 16, 64, 4, 2),
        DenseConfig("pointers", 64, 16, 4, 2),
        DenseConfig("descriptors", 32, 32, 4, 2),
    ]
    if use_triton(torch.empty(0))
    else [None]
)
FP8_CONFIGS = (
    [DenseConfig("descriptors", 128, 64, 4, 2), DenseConfig("descriptors", 32, 128, 4, 2)]
    if use_triton(torch.empty(0))
    else [None]
)


@dataclass(frozen=True)
class User:
    """Tokens of one sequence; ``static`` of its context see each other both ways."""

    static: int
    realtime: int
    candidates: int

    @property
    def context(self) -> int:
        return self.static + self.realtime


MIXED = [User(37, 13, 11), User(0, 21, 3), User(5, 0, 0), User(0, 0, 4), User(70, 0, 40), User(1, 0, 1)]


def random_users(seed: int, count: int, longest: int) -> list[User]:
    generator = np.random.default_rng(seed)
    return [User(*(int(generator.integers(0, longest)) for _ in range(3))) for _ in range(count)]


class Case:
    """Random q, k and v as columns of one projection, padded or jagged."""

    def __init__(
        self,
        users: Sequence[User],
        is_padded: bool = False,
        num_heads: int = 2,
        head_size: int = 32,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.users, self.num_heads, self.head_size, self.dtype = users, num_heads, head_size, dtype
        self.scale = head_size**-0.5
        static, context, candidate = zip(*[(u.static, u.context, u.candidates) for u in users], strict=True)
        if is_padded:
            n, k = max(context) + 3, max(candidate) + 2
            types = torch.zeros(len(users), n + k, dtype=torch.int32)
            for row, user in zip(types, users, strict=True):
                row[: user.static] = TokenType.HISTORY
                row[user.static : user.context] = TokenType.REALTIME
                row[n : n + user.candidates] = TokenType.CANDIDATE
            self.segments = padded_segments(types, n)
            tokens = types.numel()
        else:
            self.segments = jagged_segments(static, context, candidate)
            tokens = sum(context) + sum(candidate)
        torch.manual_seed(seed)
        width = num_heads * head_size
        merged = torch.randn(tokens, 4 * width).to(dtype)
        _, self.v, self.q, self.k = (p.unflatten(-1, (num_heads, head_size)) for p in merged.split(width, dim=-1))

    def run(self, config: DenseConfig | None = None, quantised: QuantisedHeads | None = None) -> Tensor:
        # Rows with a gap between them, full of what must not remain; two rows belong to no sequence.
        wide = torch.full((len(self.q) + 2, self.num_heads + 1, self.head_size), math.nan)
        out = wide[:, : self.num_heads]
        got = dense_attention(
            self.q,
            self.k,
            self.v,
            out,
            self.segments,
            scale=self.scale,
            norm_length=NORM_LENGTH,
            quantised=quantised,
            config=config,
        )
        assert got is out
        assert wide[:, self.num_heads :].isnan().all()
        assert out[-2:].isnan().all()
        return out[:-2]

    def expected(self) -> Float64Array:
        """The equation, token by token and head by head; rows of padding are 0."""
        q, k, v = (x.double().numpy() for x in (self.q, self.k, self.v))
        result = np.zeros(q.shape)
        for user, fields in zip(self.users, self.segments.sequences.tolist(), strict=True):
            rows = range(fields[3], fields[3] + user.context)
            for head in range(self.num_heads):
                for index, row in enumerate(rows):
                    seen = rows[: max(index + 1, user.static)]
                    result[row, head] = sum(self._term(q, k, v, head, row, other) for other in seen)
                for row in range(fields[4], fields[4] + user.candidates):
                    result[row, head] = sum(self._term(q, k, v, head, row, other) for other in [*rows, row])
        return result / NORM_LENGTH

    def _term(self, q: Float64Array, k: Float64Array, v: Float64Array, head: int, row: int, other: int) -> Float64Array:
        logit = float(q[row, head] @ k[other, head]) * self.scale
        return logit / (1.0 + math.exp(-logit)) * v[other, head]

    def plain(self) -> Tensor:
        """PyTorch with every product and sum in the case's own precision but the division by N."""
        result = torch.zeros(self.q.shape)
        for user, fields in zip(self.users, self.segments.sequences.tolist(), strict=True):
            rows = slice(fields[3], fields[3] + user.context)
            own = slice(fields[4], fields[4] + user.candidates)
            q, k, v = (x.transpose(0, 1) for x in (self.q, self.k, self.v))
            tokens = torch.arange(user.context)
            visible = (tokens < (tokens + 1).clamp(min=user.static)[:, None]).to(self.dtype)
            context = (F.silu(q[:, rows] * self.scale @ k[:, rows].transpose(1, 2)) * visible) @ v[:, rows]
            among = F.silu(q[:, own] * self.scale @ k[:, rows].transpose(1, 2)) @ v[:, rows]
            among = among + F.silu((q[:, own] * self.scale * k[:, own]).sum(-1, keepdim=True)) * v[:, own]
            result[rows] = context.transpose(0, 1).float() / NORM_LENGTH
            result[own] = among.transpose(0, 1).float() / NORM_LENGTH
        return result


def close(actual: Tensor, expected: Float64Array, atol: float = ATOL) -> None:
    assert expected.std() > 0.05
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("is_padded", [False, True], ids=["jagged", "padded"])
def test_mixed_users(is_padded: bool, config: DenseConfig | None) -> None:
    case = Case(MIXED, is_padded)
    close(case.run(config), case.expected())


@pytest.mark.parametrize("seed", range(3))
def test_random_lengths(seed: int) -> None:
    case = Case(random_users(seed, 4, 60), is_padded=seed % 2 == 0, num_heads=1, seed=seed)
    close(case.run(CONFIGS[-1]), case.expected())


@pytest.mark.parametrize("head_size", [32, 48, 64, 96, 128, 256])
def test_head_sizes(head_size: int) -> None:
    case = Case(MIXED[:4], num_heads=3, head_size=head_size, seed=1)
    close(case.run(), case.expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_low_precision(dtype: torch.dtype, config: DenseConfig | None) -> None:
    """No more than twice the error of the same equation in plain PyTorch of that precision."""
    case = Case(MIXED, is_padded=True, head_size=64, dtype=dtype, seed=2)
    expected = case.expected()
    allowed = 2 * float(np.abs(case.plain().double().numpy() - expected).max())
    assert 1e-5 < allowed < 5e-2
    close(case.run(config), expected, atol=allowed)


def test_plain_hstu_is_the_case_without_static_tokens() -> None:
    causal = Case([User(0, 45, 0)])
    full = Case([User(45, 0, 0)])
    close(causal.run(), causal.expected())
    assert not np.allclose(causal.expected(), full.expected(), atol=1e-2)
    types = torch.full((1, 45), int(TokenType.HISTORY), dtype=torch.int32)
    assert padded_segments(types, 45, is_causal=True).sequences[0, 0] == 0
    assert padded_segments(types, 45).sequences[0, 0] == 45


def test_heads_may_stand_before_tokens() -> None:
    """[B, H, M, D] as PyTorch's attention has it gives what [B, M, H, D] gives."""
    case = Case([User(20, 9, 7), User(3, 30, 2)], is_padded=True)
    expected = case.expected()
    batch, length = len(case.users), len(case.q) // len(case.users)
    parts = [x.unflatten(0, (batch, length)).transpose(1, 2).contiguous() for x in (case.q, case.k, case.v)]
    flat = [part.view(-1, 1, case.head_size) for part in parts]
    out = torch.full(flat[0].shape, math.nan)
    segments = by_head(case.segments, case.num_heads)
    dense_attention(*flat, out, segments, scale=case.scale, norm_length=NORM_LENGTH)
    close(out.view(batch, case.num_heads, length, -1).transpose(1, 2).flatten(0, 1), expected)


def test_company_does_not_matter() -> None:
    """A user alone and among others, to the bit."""
    case = Case(MIXED)
    together = case.run()
    fields = case.segments.sequences.tolist()[4]
    rows = slice(fields[3], fields[3] + MIXED[4].context + MIXED[4].candidates)
    alone = Case(MIXED[4:5])
    alone.q, alone.k, alone.v = (x[rows] for x in (case.q, case.k, case.v))
    # Tiles of keys are cut the same way, so that sums are taken in one order.
    torch.testing.assert_close(alone.run(), together[rows], rtol=0, atol=1e-6)


def test_reference_serves_the_cpu() -> None:
    case = Case(MIXED, is_padded=True)
    out = torch.full(case.q.shape, math.nan)
    dense_attention_reference(case.q, case.k, case.v, out, case.segments, scale=case.scale, norm_length=NORM_LENGTH)
    close(out, case.expected())


@pytest.mark.parametrize("is_padded", [False, True], ids=["jagged", "padded"])
def test_fp8_operands(is_padded: bool) -> None:
    """e4m3 keeps four bits: a number is off by at most 2^-4 of itself, or by a step of its block's smallest."""
    case = Case(MIXED, is_padded, head_size=64, seed=3)
    case.k[5] *= 30.0  # one loud token takes the small numbers of its own block alone
    made = quantise(case.q, case.k, case.v, case.segments)
    assert made.q.dtype == made.v.dtype == torch.float8_e4m3fn
    new = made.segments.sequences.tolist()
    for source, got, scales in zip((case.q, case.k, case.v), dequantise(made), made.scales, strict=True):
        for user, old, to in zip(MIXED, case.segments.sequences.tolist(), new, strict=True):
            assert to[3] % SCALE_ROWS == to[4] % SCALE_ROWS == 0
            for count, begin, at in ((user.context, old[3], to[3]), (user.candidates, old[4], to[4])):
                if count:
                    wanted = source[begin : begin + count]
                    steps = scales[:, at // SCALE_ROWS][None, :, None] * 2.0**-10
                    wrong = (got[at : at + count] - wanted).abs()
                    assert (wrong <= wanted.abs() * 2.0**-4 + steps).all()
                    largest = wanted[: min(count, SCALE_ROWS)].abs().amax(dim=(0, 2)) / 448
                    torch.testing.assert_close(scales[:, at // SCALE_ROWS], largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("is_padded", "head_size", "config"), [(True, 128, FP8_CONFIGS[0]), (False, 32, FP8_CONFIGS[-1])], ids=str
)
def test_fp8(is_padded: bool, head_size: int, config: DenseConfig | None) -> None:
    """No more than twice the error of FP8 operands in exact arithmetic; the kernel rounds the weights as well."""
    case = Case([*MIXED, User(150, 40, 130)], is_padded, num_heads=1, head_size=head_size, seed=4)
    made = quantise(case.q, case.k, case.v, case.segments)
    exact = torch.full(case.q.shape, math.nan)
    arguments = (case.q, case.k, case.v)
    settings = {"scale": case.scale, "norm_length": NORM_LENGTH}
    dense_attention_reference(*arguments, exact, case.segments, **settings)
    emulated = torch.full(case.q.shape, math.nan)
    dense_attention_reference(*arguments, emulated, case.segments, **settings, quantised=made)
    error = (emulated - exact).norm() / exact.norm()
    assert 0.01 < error < 0.1
    got = case.run(config, made)
    assert (got - exact).abs().max() <= 2 * (emulated - exact).abs().max()
    assert (got - exact).norm() / exact.norm() <= 2 * error


def test_large_values_do_not_saturate() -> None:
    """A block of values a thousand times another's: weights and scales stay inside e4m3."""
    case = Case([User(0, 300, 0)], num_heads=1, head_size=64, seed=5)
    case.v[:128] *= 1000.0
    made = quantise(case.q, case.k, case.v, case.segments)
    got = case.run(FP8_CONFIGS[0], made)
    expected = case.expected()
    assert np.isfinite(got.numpy()).all()
    assert np.linalg.norm(got.double().numpy() - expected) <= 0.1 * np.linalg.norm(expected)


def test_what_is_refused() -> None:
    case = Case(MIXED[:1])
    case.k = case.k.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ConfigurationError, match="contiguous"):
        case.run()
    with pytest.raises(ConfigurationError, match="INT32"):
        Segments(torch.zeros(3, 7), 1, 1)


def test_no_sequences_and_no_tokens() -> None:
    empty = torch.empty(0, 2, 32)
    dense_attention(empty, empty, empty, empty, jagged_segments([], [], []), scale=1.0, norm_length=1)
    out = torch.full((4, 2, 32), math.nan)
    row = torch.randn(4, 2, 32)
    dense_attention(
        row, row, row, out, padded_segments(torch.zeros(2, 2, dtype=torch.int32), 1), scale=1.0, norm_length=1
    )
    assert (out == 0).all()


def test_what_is_chosen_depends_on_the_class_of_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [length_class(n) for n in (1, 256, 257, 2048, 10**6)] == [256, 256, 1024, 4096, LENGTH_CLASSES[-1]]
    monkeypatch.setattr(dense_configs, "_chosen", {})
    monkeypatch.setattr(dense_configs, "_FASTEST", {})
    key, half = (DenseKey(128, dtype, 90, 4096) for dtype in (torch.bfloat16, torch.float16))
    *_, second, best = candidates(key)
    assert choose(key) == candidates(key)[0] not in (second, best)
    monkeypatch.setitem(dense_configs._FASTEST, key, second)
    assert choose(key) == choose(half) == second
    remember(key, best)
    assert choose(key) == best
    assert choose(half) == second
    assert choose(DenseKey(128, torch.bfloat16, 90, 256)).block_m < best.block_m
    assert choose(DenseKey(128, torch.bfloat16, 80, 4096)).variant == "pointers"


def test_without_a_gpu_there_is_nothing_to_measure() -> None:
    assert warm_up_dense(2, 64, torch.bfloat16, batch=1, context=64, num_candidates=16, device="cpu") is None
