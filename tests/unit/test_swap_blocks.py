"""vLLM's operator that copies pages, where vLLM has none."""

from __future__ import annotations

import ctypes

import pytest
import torch

from perf import swap_blocks
from perf.swap_blocks import serve_swap_blocks


def test_pages_are_copied_between_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_blocks, "_NAMESPACE", "mtgr_test")  # where no vLLM has registered anything
    library = serve_swap_blocks(lambda target, source, size: ctypes.memmove(target, source, size) and None)
    assert library is not None
    assert serve_swap_blocks() is None
    source = torch.arange(32, dtype=torch.int32)
    target = torch.zeros(32, dtype=torch.int32)
    sources = torch.tensor([source[8:].data_ptr(), source.data_ptr()])
    targets = torch.tensor([target.data_ptr(), target[24:].data_ptr()])
    torch.ops.mtgr_test.swap_blocks_batch(sources, targets, torch.tensor([16, 8]), True)
    assert target[:4].tolist() == [8, 9, 10, 11]
    assert target[24:26].tolist() == [0, 1]
    assert int(target.count_nonzero()) == 5
