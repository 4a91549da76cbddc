"""A scheduler that caches contexts only."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

CONTEXT_TOKENS = "context_tokens"


class ContextScheduler(AsyncScheduler):
    """vLLM's scheduler, with prefix caching that ends where the candidates begin.

    A candidate's keys and values are of no use to anyone else. Left out of the cache, its blocks are the first to be
    taken again, and never displace a user's context; and a request that was seen before still computes every candidate.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        coordinator = self.kv_cache_manager.coordinator
        cache_blocks = coordinator.cache_blocks

        def cache_context(request: Request, num_computed_tokens: int, *rest: Any, **options: Any) -> None:
            cache_blocks(request, min(num_computed_tokens, context_tokens(request)), *rest, **options)

        coordinator.cache_blocks = cache_context

    def add_request(self, request: Request) -> None:
        """Take a request, without the hashes of blocks that hold candidates: they are never looked up."""
        del request.block_hashes[context_tokens(request) // self.block_size :]
        super().add_request(request)


def context_tokens(request: Request) -> int:
    """Leading tokens of a request that are context."""
    params = request.pooling_params
    extra = (params.extra_kwargs or {}) if params is not None else {}
    return int(extra.get(CONTEXT_TOKENS, 0))
