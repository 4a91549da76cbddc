"""What feature extraction counts, as Prometheus counters and gauges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from mtgr.features.cache import CacheStatistics
from mtgr.metrics import MetricSpec

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


@dataclass
class FeatureMetrics:
    """Turns growing statistics into what is to be added to counters and set on gauges.

    Attributes:
        labels: Answers by label, counted by whoever serves them.
    """

    labels: Counter[str] = field(default_factory=Counter)
    _seen: dict[MetricSpec, float] = field(default_factory=dict)

    def count(self, labels: Iterable[str]) -> None:
        """Count one answer with its labels."""
        self.labels.update(labels)

    def changes(self, statistics: CacheStatistics) -> list[tuple[MetricSpec, float]]:
        """Every time series with what to add since the last call, or, of a gauge, its value."""
        values = [(spec, float(getattr(statistics, name))) for name, spec in _CACHE]
        for label, count in list(self.labels.items()):
            spec = MetricSpec("mtgr_features_labels_total", "Answers by label", labels=(("label", label),))
            values.append((spec, float(count)))
        changes = []
        for spec, value in values:
            changes.append((spec, value - self._seen.get(spec, 0.0) if spec.counter else value))
            self._seen[spec] = value
        return changes
