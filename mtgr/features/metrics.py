"""What feature extraction counts, as Prometheus time series."""

from __future__ import annotations

from collections.abc import Iterable

from mtgr.features.cache import CacheStatistics
from mtgr.metrics import MetricRegistry, MetricSpec, stage_seconds
from mtgr.routing.reasons import Reason, unanswered

UNREAD = ""  # label of what a request asks for, where nobody has looked
_LABELS = "mtgr_features_labels_total"
_CACHE = (
    ("hits", MetricSpec("mtgr_features_cache_hits_total", "Users answered out of the feature cache")),
    ("negative_hits", MetricSpec("mtgr_features_cache_negative_hits_total", "Hits that say a user is not known")),
    ("misses", MetricSpec("mtgr_features_cache_misses_total", "Users that the feature cache could not answer")),
    ("evictions", MetricSpec("mtgr_features_cache_evictions_total", "Users that made room for others")),
    ("invalidations", MetricSpec("mtgr_features_cache_invalidations_total", "Changes that the store announced")),
    ("entries", MetricSpec("mtgr_features_cache_entries", "Users in the feature cache", counter=False)),
    ("bytes", MetricSpec("mtgr_features_cache_bytes", "Size of the feature cache in bytes", counter=False)),
    ("stale", MetricSpec("mtgr_features_stale_total", "Users answered with old features while the store was down")),
    ("unavailable", MetricSpec("mtgr_features_unavailable_total", "Users that the store could not answer")),
    ("loads", MetricSpec("mtgr_features_store_requests_total", "Requests to the feature store")),
    ("load_failures", MetricSpec("mtgr_features_store_failures_total", "Failed requests to the feature store")),
    ("load_seconds", MetricSpec("mtgr_features_store_seconds", "Seconds spent on requests to the feature store")),
)


class FeatureMetrics:
    """Collects what happens, and what the cache counts, for a reporter."""

    def __init__(self) -> None:
        self._registry = MetricRegistry()

    def count(self, labels: Iterable[str]) -> None:
        """Count one answer with its labels."""
        for label in labels:
            self._registry.increment(MetricSpec(_LABELS, "Answers by label", labels=(("label", label),)))

    def stage(self, name: str, seconds: float) -> None:
        """Observe how long a request spent in a stage, ``intake``, ``features`` or ``cache``."""
        self._registry.observe(stage_seconds(name), seconds)

    def refused(self, reason: Reason) -> None:
        """Count a request that was refused before anything was known of it."""
        self._registry.increment(unanswered(UNREAD, UNREAD, reason))

    def changes(self, statistics: CacheStatistics) -> list[tuple[MetricSpec, float]]:
        """What to add to each counter since the last call, and every gauge's value."""
        for name, spec in _CACHE:
            value = float(getattr(statistics, name))
            if spec.counter:
                self._registry.advance(spec, value)
            else:
                self._registry.set(spec, value)
        return self._registry.changes()
