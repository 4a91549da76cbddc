"""Hashes of a context's pages: what must share a page does, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtgr.vllm_plugin import CONTEXT_TOKENS, STATIC_TOKENS
from mtgr.vllm_plugin.hashing import page_hasher

PAGE = 4
SALT = "5a" * 32


def request(
    rows: Tensor, context: int, salt: str | None = SALT, hashes: list[bytes] | None = None, static: int = 0
) -> Any:
    return SimpleNamespace(
        prompt_embeds=rows,
        cache_salt=salt,
        block_hashes=hashes or [],
        pooling_params=SimpleNamespace(extra_kwargs={CONTEXT_TOKENS: context, STATIC_TOKENS: static}),
    )


def hashes(rows: Tensor, context: int, **more: Any) -> list[bytes]:
    return page_hasher(PAGE)(request(rows, context, **more))


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def rows(request: pytest.FixtureRequest) -> Tensor:
    return torch.randint(256, (20, 7), generator=torch.Generator().manual_seed(0)).to(request.param)


def test_whole_pages_of_context_only(rows: Tensor) -> None:
    assert [len(hashes(rows, context)) for context in (0, 3, 4, 11, 12, 20)] == [0, 0, 1, 2, 3, 5]


def test_candidates_do_not_matter(rows: Tensor) -> None:
    others = rows.clone()
    others[13:] += 1
    assert hashes(rows, 13) == hashes(others, 13)


def test_a_changed_row_changes_its_page_and_all_after_it(rows: Tensor) -> None:
    for changed in range(16):
        others = rows.clone()
        others[changed, 6] = (others[changed, 6] + 1) % 256
        same = [one == other for one, other in zip(hashes(rows, 16), hashes(others, 16), strict=True)]
        assert same == [True] * (changed // PAGE) + [False] * (4 - changed // PAGE)


def test_equal_rows_on_other_pages_have_other_hashes(rows: Tensor) -> None:
    repeated = rows[:PAGE].repeat(4, 1)
    assert len(set(hashes(repeated, 16))) == 4


def test_salts_share_nothing(rows: Tensor) -> None:
    assert not set(hashes(rows, 16)) & set(hashes(rows, 16, salt="6b" * 32))
    assert not set(hashes(rows, 16)) & set(hashes(rows, 16, salt=None))


def test_goes_on_where_it_stopped(rows: Tensor) -> None:
    whole = hashes(rows, 16)
    assert hashes(rows, 16, hashes=whole[:2]) == whole[2:]
    assert hashes(rows, 16, hashes=whole) == []


def test_rows_need_not_lie_together(rows: Tensor) -> None:
    wider = torch.cat([rows, rows], dim=1)
    assert hashes(wider[:, :7], 16) == hashes(rows, 16)


@pytest.mark.parametrize("static", [0, 1, 4, 5, 8, 15, 16])
def test_static_pages_are_known_by_the_salt_alone(rows: Tensor, static: int) -> None:
    others = rows.clone()
    others[: static // PAGE * PAGE] += 1
    found = hashes(rows, 16, static=static)
    assert found == hashes(others, 16, static=static)
    assert not set(found) & set(hashes(rows, 16, static=static, salt="6b" * 32))
    assert len(set(found)) == 4
    for changed in range(static // PAGE * PAGE, 16):
        others = rows.clone()
        others[changed, 6] = (others[changed, 6] + 1) % 256
        same = [one == other for one, other in zip(found, hashes(others, 16, static=static), strict=True)]
        assert same == [True] * (changed // PAGE) + [False] * (4 - changed // PAGE)


@pytest.mark.parametrize("static", [4, 7, 12, 16])
def test_static_pages_go_on_where_they_stopped(rows: Tensor, static: int) -> None:
    whole = hashes(rows, 16, static=static)
    for done in range(5):
        assert hashes(rows, 16, static=static, hashes=whole[:done]) == whole[done:]
