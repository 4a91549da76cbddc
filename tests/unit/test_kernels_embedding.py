"""From rows to tokens, against loops in NumPy.

Runs on whichever implementation serves: PyTorch, and the Triton kernels where Triton's interpreter is on, as the last
tests have it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mtgr.kernels.embedding import Pieces, gather_pieces, place_tokens, segment_rows
from mtgr.schema import FIRST_COLUMN, SLOT_COLUMN, TYPE_COLUMN, TokenType
from tests.interpreted import NO_TRITON, run_interpreted

WIDTH, D = 7, 20


def rows(sizes: list[tuple[int, int, int, int]], n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded rows of users with so many profile, history and real-time tokens and candidates; small ids."""
    generator = np.random.default_rng(seed)
    context, candidates = (generator.integers(0, 9, (len(sizes), m, WIDTH)).astype(np.int32) for m in (n, k))
    for user, (profile, history, realtime, count) in enumerate(sizes):
        kinds = np.repeat([1, 2, 3, 0], [profile, history, realtime, n - profile - history - realtime])
        context[user, :, TYPE_COLUMN] = kinds
        context[user, :, SLOT_COLUMN] = np.arange(n) * (kinds > 0)
        candidates[user, :, TYPE_COLUMN] = np.where(np.arange(k) < count, TokenType.CANDIDATE, 0)
    return torch.from_numpy(context), torch.from_numpy(candidates)


SIZES = [(2, 5, 3, 4), (0, 0, 1, 0), (3, 0, 0, 1), (0, 9, 2, 2)]


@pytest.mark.parametrize(("n", "k"), [(12, 5), (1100, 5), (11, 1030), (12, 0)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_segments(n: int, k: int, is_causal: bool) -> None:
    sizes = [(p, s, r, min(c, k)) for p, s, r, c in SIZES]
    if n > 1000:
        sizes.append((3, 1050, 40, 5))
    context, candidates = rows(sizes, n, k)
    types, segments = segment_rows(context, candidates, is_causal=is_causal)
    assert torch.equal(types.view(-1, n + k), torch.cat([context, candidates], dim=1)[..., TYPE_COLUMN])
    assert types.dtype == torch.int32
    for user, (profile, history, realtime, count) in enumerate(sizes):
        static = 0 if is_causal else profile + history
        places = [user * (n + k), user * (n + k) + n] * 2
        assert segments.sequences[user].tolist() == [static, profile + history + realtime, count, *places]
    padded = (segments.max_context, segments.max_candidates, segments.padded_context, segments.padded_candidates)
    assert padded == (n, k, n, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pieces_side_by_side(dtype: torch.dtype) -> None:
    """Two pieces of the first column's table, one of another's; profile tokens read entry 0 of the first."""
    context, _ = rows(SIZES, 12, 1)
    table = torch.randn(9 * 2 + 9, 3).to(dtype)
    index, factor, offset = [FIRST_COLUMN, FIRST_COLUMN, 5], [2, 2, 1], [0, 1, 18]
    pieces = Pieces(*(torch.tensor(part, dtype=torch.int32) for part in (index, factor, offset)))
    found = gather_pieces(context, table, pieces).view(len(SIZES), 12, 9)
    for user in range(len(SIZES)):
        for token in range(12):
            row = context[user, token].tolist()
            item = 0 if row[TYPE_COLUMN] == TokenType.PROFILE else row[FIRST_COLUMN]
            assert torch.equal(
                found[user, token], torch.cat([table[2 * item], table[2 * item + 1], table[18 + row[5]]])
            )


@pytest.mark.parametrize("k", [5, 0])
def test_tokens_stand_in_their_places(k: int) -> None:
    n = 12
    sizes = [(p, s, r, min(c, k)) for p, s, r, c in SIZES]
    context, candidates = rows(sizes, n, k)
    of_events, of_candidates = torch.randn(len(SIZES) * n, D), torch.randn(len(SIZES) * k, D)
    profile, positions = torch.randn(9, D), torch.randn(n + 1, D)
    _, segments = segment_rows(context, candidates, is_causal=True)
    found = place_tokens(context, candidates, of_events, of_candidates, profile, positions, segments)
    assert found.shape == (len(SIZES) * (n + k), D)
    for user, size in enumerate(sizes):
        for token in range(n):
            row = context[user, token]
            is_profile = row[TYPE_COLUMN] == TokenType.PROFILE
            vector = profile[row[FIRST_COLUMN]] if is_profile else of_events[user * n + token]
            wanted = vector + positions[row[SLOT_COLUMN]]
            torch.testing.assert_close(found[user * (n + k) + token], wanted, rtol=0, atol=1e-6)
        for candidate in range(k):
            wanted = of_candidates[user * k + candidate] + positions[sum(size[:3])]
            torch.testing.assert_close(found[user * (n + k) + n + candidate], wanted, rtol=0, atol=1e-6)


def test_interpreted() -> None:
    """All of the above on the kernels."""
    pytest.importorskip("triton", reason=NO_TRITON)
    assert run_interpreted(__file__, "-k", "not compile and not interpreted")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason=NO_TRITON)
    from mtgr.kernels.triton_embedding import gather_launch, place_launch, segment_launch
    from tests.unit.offline import compile_for, stack

    compile_for(capability, monkeypatch, tmp_path)
    context, candidates = torch.empty(2, 1152, 20, dtype=torch.int32), torch.empty(2, 256, 20, dtype=torch.int32)
    sequences, types = torch.empty(2, 7, dtype=torch.int32), torch.empty(2 * 1408, dtype=torch.int32)
    launches = [segment_launch(context, candidates, types, sequences, is_causal=False)]
    ids = torch.empty(9, dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        table, vectors = torch.empty(1000, 16, dtype=dtype), torch.empty(2 * 1408, 768, dtype=dtype)
        launches.append(gather_launch(context, table, Pieces(ids, ids, ids), torch.empty(2304, 144, dtype=dtype)))
        parts = vectors[:2304], vectors[:512], vectors[:9], vectors[:2049]
        launches.append(place_launch(context, candidates, *parts, sequences, vectors))
    for launch in launches:
        assert stack(launch.compile()) == 0, launch.options
