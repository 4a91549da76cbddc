"""Hashes of a context's pages, by which the cache knows them.

vLLM hashes pickled lists of token ids, which here are none, and the embeddings of each page, candidates' too: half a
millisecond for 1,024 tokens. Rows are bytes that lie together already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from mtgr.vllm_plugin import CONTEXT_TOKENS

Hasher = Callable[[Any], list[bytes]]


def context_tokens(request: Any) -> int:
    """Leading tokens of a request that are context."""
    params = request.pooling_params
    extra = (params.extra_kwargs or {}) if params is not None else {}
    return int(extra.get(CONTEXT_TOKENS, 0))


def page_hasher(page_size: int, *unused: Any) -> Hasher:
    """What gives a request its hashes; in the place of vLLM's ``get_request_block_hasher``.

    A page's hash is that of its rows and of the page before, the first one's of its rows and the request's salt: equal
    hashes mean equal salts and equal rows up to the page's end. Pages that hold candidates get none.
    """

    def hashes(request: Any) -> list[bytes]:
        done, pages = len(request.block_hashes), context_tokens(request) // page_size
        if request.prompt_embeds is None or done >= pages:
            return []
        rows = request.prompt_embeds[done * page_size : pages * page_size].contiguous()
        data = memoryview(rows.view(torch.uint8).numpy()).cast("B")
        size = len(data) // (pages - done)
        last = request.block_hashes[-1] if done else (request.cache_salt or "").encode()
        found = []
        for start in range(0, len(data), size):
            last = hashlib.blake2b(data[start : start + size], digest_size=32, key=last[:64]).digest()
            found.append(last)
        return found

    return hashes
