"""Steps in graphs: padding must not show. The graphs themselves need a GPU; here a stand-in computes when replayed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mtgr.kernels.paged_attention import paged_attention
from mtgr.kernels.store import store_keys_values
from mtgr.vllm_plugin import graphs
from mtgr.vllm_plugin.graphs import StepGraphs, graph_requests, graph_sizes
from mtgr.vllm_plugin.step import StepMetadata

HEADS, SIZE, PAGE, PAGES = 2, 8, 4, 64


class Replayed:
    """Stands for a CUDA graph: remembers nothing but the call, and repeats it on what the buffers hold then."""

    def __init__(self) -> None:
        self.call: Callable[[], tuple[Tensor, Tensor]] | None = None
        self.outputs: tuple[Tensor, Tensor] | None = None

    def replay(self) -> None:
        assert self.call is not None
        assert self.outputs is not None
        for output, value in zip(self.outputs, self.call(), strict=True):
            output.copy_(value)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(compute: graphs.Compute, embeds: Tensor, step: StepMetadata, pool: Any) -> Any:
        graph = Replayed()
        graph.call = lambda: compute(embeds, step)
        graph.outputs = graph.call()
        return graphs.Captured(graph, *graph.outputs)  # type: ignore[arg-type]

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "new_pool", lambda: None)


class Attention:
    """Attends as a model would: embeds are queries, keys, values; the last columns say what a token sees."""

    def __init__(self) -> None:
        self.cache = torch.zeros(PAGES, HEADS, PAGE, 2 * SIZE)

    def __call__(self, embeds: Tensor, step: StepMetadata) -> tuple[Tensor, Tensor]:
        q, k, v = (part.unflatten(1, (HEADS, SIZE)) for part in embeds[:, :-2].chunk(3, dim=1))
        visible, candidate = embeds[:, -2].int().contiguous(), embeds[:, -1].bool().contiguous()
        store_keys_values(k, v, self.cache, step.slots[: len(embeds)].masked_fill(candidate, -1))
        out = torch.zeros(len(embeds), HEADS, SIZE)
        starts = step.query_start
        paged_attention(
            q, k, v, self.cache, step.block_table, starts, visible, candidate, out, scale=1.0, norm_length=16
        )
        return out.flatten(1), out[:, 0, :3].clone()


def random_step(
    generator: torch.Generator, pages: Tensor, lengths: list[tuple[int, int]]
) -> tuple[Tensor, StepMetadata]:
    """Requests of (context, candidates) tokens, all cold."""
    embeds, slots, table = [], [], torch.zeros(len(lengths), 16, dtype=torch.int32)
    starts = [0]
    for index, (context, candidates) in enumerate(lengths):
        own, pages = pages[: -(-context // PAGE)], pages[-(-context // PAGE) :]
        table[index, : len(own)] = own
        rows = torch.randn(context + candidates, 3 * HEADS * SIZE + 2, generator=generator)
        rows[:, -2] = context
        rows[:, -1] = torch.arange(context + candidates) >= context
        embeds.append(rows)
        places = torch.arange(context)
        slots.append(torch.cat([own[places // PAGE] * PAGE + places % PAGE, torch.full((candidates,), 10**6)]))
        starts.append(starts[-1] + context + candidates)
    return torch.cat(embeds), StepMetadata(
        starts[-1], torch.tensor(starts, dtype=torch.int32), table, torch.cat(slots).long()
    )


def test_padding_does_not_show(without_gpu: None) -> None:
    generator = torch.Generator().manual_seed(0)
    captured, plain = Attention(), Attention()
    steps = StepGraphs(captured, 128)
    for lengths in ([(5, 3)], [(30, 20), (7, 2), (9, 1)], [(3, 1)], [(16, 16), (12, 4)], [(40, 56)]):
        pages = torch.randperm(PAGES, generator=generator)
        embeds, step = random_step(generator, pages, lengths)
        found = steps.run(embeds, step)
        assert found is not None
        for one, other in zip(found, plain(embeds, step), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(captured.cache, plain.cache)


def test_tokens_left_over_from_a_larger_step_are_not_stored_again(without_gpu: None) -> None:
    generator = torch.Generator().manual_seed(0)
    captured, plain = Attention(), Attention()
    steps = StepGraphs(captured, 64)
    # The last step's pages are those of the first one's tokens that its own do not cover.
    for first_page, context in ((0, 60), (32, 20), (5, 20)):
        embeds, step = random_step(generator, torch.arange(first_page, PAGES), [(context, 0)])
        steps.run(embeds, step)
        plain(embeds, step)
        assert torch.equal(captured.cache, plain.cache)


def test_what_does_not_fit_is_left_alone(without_gpu: None) -> None:
    steps = StepGraphs(Attention(), 64)
    generator = torch.Generator().manual_seed(0)
    pages = torch.arange(PAGES)
    assert steps.run(*random_step(generator, pages, [(60, 5)])) is None  # more tokens than the largest graph
    assert steps.run(*random_step(generator, pages, [(1, 1)] * 5)) is None  # more requests


@pytest.mark.parametrize("most", [16, 4096, 8192])
def test_every_step_finds_the_smallest_graph_that_takes_it(most: int) -> None:
    steps = StepGraphs(Attention(), most)
    for tokens in (1, 15, 16, 17, 256, 257, 3000):
        for requests in (1, 4, 5, 33):
            fits = [size for size in graph_sizes(most) if size >= tokens and graph_requests(size) >= requests]
            assert steps.fitting(tokens, requests) == min(fits, default=None)


def test_little_is_padded() -> None:
    sizes = graph_sizes(8192)
    assert all(after / before <= 1.51 for before, after in pairwise(sizes[2:]))
    assert {256, 272, 2304} <= set(sizes)  # 256 candidates, with the rest of a page, and after 2,048 tokens of context
