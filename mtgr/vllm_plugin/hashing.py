"""Hashes of a context's pages, by which the cache knows them.

vLLM hashes pickled lists of token ids, which here are none, and the embeddings of each page, candidates' too: half a
millisecond for 1,024 tokens. Rows are bytes that lie together already, and a request's salt says all of the static
ones, so that only real-time rows are left to be hashed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from mtgr.vllm_plugin import CONTEXT_TOKENS, STATIC_TOKENS

Hasher = Callable[[Any], list[bytes]]


def context_tokens(request: Any) -> int:
    """Leading tokens of a request that are context."""
    return _extra(request, CONTEXT_TOKENS)


def _extra(request: Any, name: str) -> int:
    params = request.pooling_params
    extra = (params.extra_kwargs or {}) if params is not None else {}
    return int(extra.get(name, 0))


def page_hasher(page_size: int, *unused: Any) -> Hasher:
    """What gives a request its hashes; in the place of vLLM's ``get_request_block_hasher``.

    The salt must be a digest of all static rows. A page of these alone is known by the salt and its number; any other
    by a hash of its rows and of the page before. So equal hashes mean equal salts and equal rows up to the page's end.
    Pages that hold candidates get none.
    """

    def hashes(request: Any) -> list[bytes]:
        done, pages = len(request.block_hashes), context_tokens(request) // page_size
        if request.prompt_embeds is None or done >= pages:
            return []
        salt = (request.cache_salt or "").encode()
        static = min(_extra(request, STATIC_TOKENS) // page_size, pages)
        found = [salt + page.to_bytes(4, "little") for page in range(done, static)]
        done = max(done, static)
        if done == pages:
            return found
        rows = request.prompt_embeds[done * page_size : pages * page_size].contiguous()
        data = memoryview(rows.view(torch.uint8).numpy()).cast("B")
        size = len(data) // (pages - done)
        before = [*request.block_hashes, *found]
        last = before[-1] if before else salt
        for start in range(0, len(data), size):
            page = hashlib.blake2b(last, digest_size=32)
            page.update(data[start : start + size])
            last = page.digest()
            found.append(last)
        return found

    return hashes
