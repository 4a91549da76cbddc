"""What adaptation to new items gains, and what it costs on the others: metrics before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.checkpoint import Checkpoint
from mtgr.data.dataset import BoolArray, Int8Array, Int64Array
from mtgr.data.samples import Sample
from mtgr.data.split import history_bounds
from mtgr.evaluation.bootstrap import Difference, auc_difference, gauc_difference, mean_difference
from mtgr.evaluation.metrics import auc, gains_at_k, gauc, hits_at_k, item_columns, seen_mask, target_ranks
from mtgr.model import MTGR
from mtgr.training.growth import NEW, parent_ids
from mtgr.training.predict import predict_next_items, predict_tasks
from mtgr.training.prepare import PreparedData

Float64Array = npt.NDArray[np.float64]

CUTOFF = 10
NEW_ITEMS, OTHER_ITEMS = "new items", "other items"


@dataclass(frozen=True)
class Scored:
    """What a model says of held-out events.

    Attributes:
        tasks: FP64 [E, T], probabilities of the held-out events, NaN for others.
        ranks: FP64 [N], rank of each query's item in the whole catalogue without what the user has seen.
    """

    tasks: Float64Array
    ranks: Float64Array


@dataclass(frozen=True)
class Domain:
    """Events of the data by which adaptation is judged, all of them held out.

    Attributes:
        name: What they have in common.
        events: BOOL [E].
        queries: INT64 [N], each user's last of them that has an event before it.
    """

    name: str
    events: BoolArray
    queries: Int64Array

    @classmethod
    def of(cls, name: str, data: PreparedData, events: BoolArray) -> Domain:
        """Held-out events among ``events``, BOOL [E]."""
        held_out = events & ~data.known
        index = np.flatnonzero(held_out)
        users = data.interactions.user[index]
        last = index[np.append(users[1:] != users[:-1], True)] if len(index) else index
        start, end = history_bounds(data.interactions, data.interactions.user[last], data.interactions.time[last])
        return cls(name, held_out, last[end > start])


def score(model: MTGR, data: PreparedData, domain: Domain) -> Scored:
    """Score a domain's events with a model."""
    samples = domain_samples(data, domain)
    last = data.interactions.take(domain.queries)
    ids = data.catalog.raw_ids
    scores = predict_next_items(model, dataclasses.replace(data, last=domain.queries))
    seen = seen_mask(data.interactions, last.user, last.time, ids)
    return Scored(
        predict_tasks(model, samples, len(data.interactions)),
        target_ranks(scores, item_columns(last.item, ids), seen),
    )


def domain_samples(data: PreparedData, domain: Domain) -> list[Sample]:
    """Samples whose candidates are the domain's events, each on what came strictly before it."""
    return dataclasses.replace(data, known=~domain.events).held_out_samples()


@dataclass(frozen=True)
class Adaptation:
    """Metrics of one domain for several stages of a model.

    Attributes:
        domain: Its name.
        events: Held-out events of it.
        scores: By stage, then by metric.
        differences: What each stage after the first gained over the first, with 95 % intervals (users resampled).
    """

    domain: str
    events: int
    scores: Mapping[str, Mapping[str, float]]
    differences: Mapping[str, Mapping[str, Difference]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; a metric that is not defined is null."""
        return {
            "events": self.events,
            "scores": {stage: {k: _json(v) for k, v in values.items()} for stage, values in self.scores.items()},
            "differences": {
                stage: {
                    name: {k: _json(v) for k, v in dataclasses.asdict(value).items()} for name, value in values.items()
                }
                for stage, values in self.differences.items()
            },
        }


def compare(data: PreparedData, domain: Domain, stages: Mapping[str, Scored]) -> Adaptation:
    """Metrics of each stage, and what the later ones gained over the first."""
    first = next(iter(stages))
    events = data.interactions.take(domain.events)
    users = data.interactions.user[domain.queries]
    scores: dict[str, dict[str, float]] = {stage: {} for stage in stages}
    differences: dict[str, dict[str, Difference]] = {stage: {} for stage in stages if stage != first}
    for metric, gains_of in ((f"HR@{CUTOFF}", hits_at_k), (f"NDCG@{CUTOFF}", gains_at_k)):
        gains = {stage: gains_of(scored.ranks, CUTOFF) for stage, scored in stages.items()}
        for stage, gain in gains.items():
            scores[stage][metric] = float(gain.mean()) if len(gain) else float("nan")
            if stage != first and len(gain):
                differences[stage][metric] = mean_difference(gain, gains[first], users)
    for index, task in enumerate(data.schema.task_names):
        labels = data.labels[task][domain.events]
        found = {stage: scored.tasks[domain.events, index] for stage, scored in stages.items()}
        for stage, values in found.items():
            scores[stage][f"AUC {task}"] = auc(labels, values)
            scores[stage][f"GAUC {task}"] = gauc(labels, values, events.user)
            if stage != first and _has_both(labels):
                differences[stage][f"AUC {task}"] = auc_difference(labels, values, found[first], events.user)
                differences[stage][f"GAUC {task}"] = gauc_difference(labels, values, found[first], events.user)
    return Adaptation(domain.name, int(domain.events.sum()), scores, differences)


def table(adaptations: Sequence[Adaptation]) -> str:
    """The domains under each other: a line a metric, a column a stage; ``*`` where a gain's interval is off zero."""
    stages = list(adaptations[0].scores)
    names = list(adaptations[0].scores[stages[0]])
    width = max(len(name) for name in (*names, *(f"{a.domain} ({a.events:,} events)" for a in adaptations)))
    lines = []
    for adaptation in adaptations:
        heading = f"{adaptation.domain} ({adaptation.events:,} events)"
        lines += ["", f"{heading:{width}} " + "".join(f"{stage:>16}" for stage in stages)]
        for name in names:
            cells = []
            for stage in stages:
                gain = adaptation.differences.get(stage, {}).get(name)
                mark = "*" if gain is not None and (gain.low > 0 or gain.high < 0) else " "
                cells.append(f"{adaptation.scores[stage][name]:15.4f}{mark}")
            lines.append(f"{name:{width}} " + "".join(cells))
    return "\n".join([*lines[1:], "", "* differs from the first column (95 % interval, users resampled)"])


def domains_of(data: PreparedData, parent: Checkpoint) -> list[Domain]:
    """Held-out events of new items and of the others; those of all items if none is new."""
    internal = data.catalog.to_internal(data.interactions.item)
    new = parent_ids(parent.catalog, data.catalog)[internal] == NEW
    domains = [Domain.of(NEW_ITEMS, data, new), Domain.of(OTHER_ITEMS, data, ~new)]
    return [domain for domain in domains if len(domain.queries)]


def _has_both(labels: Int8Array) -> bool:
    return bool(labels.min(initial=1) == 0 and labels.max(initial=0) == 1)


def _json(value: float) -> float | None:
    return value if np.isfinite(value) else None
