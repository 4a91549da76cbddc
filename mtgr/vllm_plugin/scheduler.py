"""A scheduler that caches contexts only, and lets requests of cached contexts go first."""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

from mtgr.vllm_plugin.hashing import context_tokens

# After so long nobody overtakes a request any more, or a stream of cached ones would keep it waiting for ever.
PATIENCE_SECONDS = 0.25


class ContextScheduler(AsyncScheduler):
    """vLLM's scheduler, with prefix caching that ends where the candidates begin.

    A candidate's keys and values are of no use to anyone else. Left out of the cache, its blocks are the first to be
    taken again, and never displace a user's context; and a request that was seen before still computes every candidate.

    Where more requests wait than one step computes, those whose context is cached, and which so take little of it, are
    put before those whose context is not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        coordinator = self.kv_cache_manager.coordinator
        cache_blocks = coordinator.cache_blocks

        def cache_context(request: Request, num_computed_tokens: int, *rest: Any, **options: Any) -> None:
            cache_blocks(request, min(num_computed_tokens, context_tokens(request)), *rest, **options)

        coordinator.cache_blocks = cache_context

    def add_request(self, request: Request) -> None:
        """Take up a request; where pages go to the host's memory, those of its context alone."""
        if self.connector is not None:
            # The connector wants a hash of every whole page, candidates' too: one that is nobody else's.
            hashes = request.block_hashes
            pages = range(len(hashes), request.num_tokens // self.hash_block_size)
            hashes.extend(f"{request.request_id}, page {page}".encode() for page in pages)
            request.kv_transfer_params = {"max_offload_tokens": context_tokens(request)}
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Choose the requests of the next step."""
        if len(self.waiting) > 1:
            self._put_cached_first()
        return super().schedule(*args, **kwargs)

    def _put_cached_first(self) -> None:
        late = time.time() - PATIENCE_SECONDS
        ordered = sorted(self.waiting, key=lambda request: request.arrival_time > late and not self._is_cached(request))
        self.waiting.clear()
        self.waiting.extend(ordered)

    def _is_cached(self, request: Request) -> bool:
        """Whether the first page of the context is there: with it, as a rule, is all that stood in it then."""
        hashes = request.block_hashes
        groups = list(range(len(self.kv_cache_config.kv_cache_groups)))
        return bool(hashes) and self.kv_cache_manager.block_pool.get_cached_block(hashes[0], groups) is not None
