"""What the vllm engine counts, as Prometheus counters and gauges."""

from __future__ import annotations

from mtgr.engines.vllm_rows import EngineStatistics
from mtgr.engines.vllm_service import VLLMService
from mtgr.metrics import MetricRegistry, MetricSpec

_FIELDS = {
    "requests": MetricSpec("mtgr_vllm_requests_total", "Requests that vLLM answered"),
    "aborted": MetricSpec("mtgr_vllm_aborted_total", "Requests whose caller gave up, or whose time was over"),
    "failed": MetricSpec("mtgr_vllm_failed_total", "Requests that vLLM failed to answer"),
    "context_tokens": MetricSpec("mtgr_vllm_context_tokens_total", "Context tokens of answered requests"),
    "context_tokens_cached": MetricSpec("mtgr_vllm_prefix_hit_tokens_total", "Context tokens found in the cache"),
    "candidate_tokens": MetricSpec("mtgr_vllm_candidate_tokens_total", "Candidates of answered requests"),
    "preemptions": MetricSpec("mtgr_vllm_preemptions_total", "Requests put back for want of pages"),
    "queue_seconds": MetricSpec("mtgr_vllm_queue_seconds_total", "Time from arrival to being scheduled, summed"),
    "running": MetricSpec("mtgr_vllm_running_requests", "Requests in a step right now", counter=False),
    "waiting": MetricSpec("mtgr_vllm_waiting_requests", "Requests that wait for a step", counter=False),
    "kv_usage": MetricSpec("mtgr_vllm_kv_usage", "Part of the pages that requests in flight hold", counter=False),
}
_HIT_RATIO = MetricSpec(
    "mtgr_vllm_prefix_hit_ratio", "Context tokens found in the cache, of those since the last report", counter=False
)
_UP = MetricSpec("mtgr_vllm_up", "Whether the engine can answer", counter=False)
_RESTARTS = MetricSpec("mtgr_vllm_restarts_total", "Engines that died and were started again")


class VLLMMetrics:
    """Turns growing statistics into what is to be added to counters and set on gauges.

    Args:
        service: Where they come from.
    """

    def __init__(self, service: VLLMService) -> None:
        self._service = service
        self._registry = MetricRegistry()
        self._last = EngineStatistics()
        self._registry.set(_HIT_RATIO, 0.0)

    def changes(self) -> list[tuple[MetricSpec, float]]:
        """Each series with what to add to it, or its value if it is a gauge."""
        now, last, registry = self._service.statistics(), self._last, self._registry
        for name, spec in _FIELDS.items():
            (registry.advance if spec.counter else registry.set)(spec, getattr(now, name))
        tokens = now.context_tokens - last.context_tokens
        if tokens:
            registry.set(_HIT_RATIO, (now.context_tokens_cached - last.context_tokens_cached) / tokens)
        self._last = now
        registry.advance(_RESTARTS, self._service.restarts)
        registry.set(_UP, float(self._service.failure is None))
        return registry.changes()
