"""The model beside its baselines on held-out events, with confidence intervals for the differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtgr.data.dataset import Task
from mtgr.evaluation.baselines import ItemKNN, ItemRate, Popularity
from mtgr.evaluation.bootstrap import Difference, auc_difference, gauc_difference, mean_difference
from mtgr.evaluation.metrics import auc, gains_at_k, gauc, hits_at_k, item_columns, seen_mask, target_ranks
from mtgr.model import MTGR
from mtgr.training.predict import predict_next_items, predict_tasks
from mtgr.training.prepare import PreparedData

Float64Array = npt.NDArray[np.float64]

MODEL = "MTGR"
CUTOFF = 10


@dataclass(frozen=True)
class Report:
    """Metrics of the model and of the baselines.

    Attributes:
        part: Which events were scored, ``validation`` or ``test``.
        scores: Metric values by model, then by metric. Baselines without a ranking of the catalogue lack HR and NDCG.
        differences: The model's metric minus the baseline's, by baseline, then by metric; 95 % intervals from
            resampling users.
    """

    part: str
    scores: Mapping[str, Mapping[str, float]]
    differences: Mapping[str, Mapping[str, Difference]]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values; a metric that is not defined is null."""
        return {
            "part": self.part,
            "scores": {model: {k: _json(v) for k, v in values.items()} for model, values in self.scores.items()},
            "differences": {
                model: {name: {k: _json(v) for k, v in asdict(value).items()} for name, value in values.items()}
                for model, values in self.differences.items()
            },
        }

    def table(self) -> str:
        """The report as text: one line a metric, the differences below."""
        names = list(self.scores[MODEL])
        width = max(len(name) for name in names)
        lines = [f"{self.part:{width}} " + "".join(f"{model:>12}" for model in self.scores)]
        for name in names:
            cells = (self.scores[model].get(name) for model in self.scores)
            lines.append(f"{name:{width}} " + "".join("           -" if c is None else f"{c:12.4f}" for c in cells))
        for model, values in self.differences.items():
            lines += ["", f"{MODEL} minus {model}, with 95 % intervals (users resampled)"]
            for name, value in values.items():
                mark = "better" if value.low > 0 else "worse" if value.high < 0 else "not told apart"
                lines.append(
                    f"{name:{width}} {value.difference:+12.4f}   [{value.low:+.4f}, {value.high:+.4f}]  {mark}"
                )
        return "\n".join(lines)


def evaluate(model: MTGR, data: PreparedData, tasks: Sequence[Task]) -> Report:
    """Score held-out events and each user's last item with the model and the baselines.

    All of them may use what came strictly before an event, and are fitted on the same known events.

    Args:
        model: The network.
        data: The dataset.
        tasks: The dataset's tasks.
    """
    targets = ~data.known
    events = data.interactions.take(targets)
    ids = data.catalog.raw_ids
    popularity, rate, knn = Popularity(ids), ItemRate(ids), ItemKNN(ids, tasks)
    known = data.interactions.take(data.known)
    for baseline in (popularity, rate, knn):
        baseline.fit(known, data.known_labels)

    predicted = predict_tasks(model, data.held_out_samples(), len(data.interactions))[targets]
    task_scores: dict[str, Mapping[str, Float64Array]] = {
        MODEL: {name: predicted[:, index] for index, name in enumerate(data.schema.task_names)}
    }
    for label, scorer in (("popularity", popularity), ("item rate", rate), ("item-kNN", knn)):
        task_scores[label] = scorer.task_scores(events.user, events.item, events.time, data.interactions)

    last = data.interactions.take(data.last)
    wanted = item_columns(last.item, ids)
    seen = seen_mask(data.interactions, last.user, last.time, ids)
    catalogue = {MODEL: predict_next_items(model, data)}
    for label, retriever in (("popularity", popularity), ("item-kNN", knn)):
        catalogue[label] = retriever.catalogue_scores(last.user, last.time, data.interactions)
    ranks = {label: target_ranks(values, wanted, seen) for label, values in catalogue.items()}

    scores: dict[str, dict[str, float]] = {label: {} for label in task_scores}
    differences: dict[str, dict[str, Difference]] = {label: {} for label in task_scores if label != MODEL}
    for metric, value_of, difference_of in (("AUC", _auc, auc_difference), ("GAUC", gauc, gauc_difference)):
        for task in data.schema.task_names:
            labels = data.labels[task][targets]
            name = f"{metric} {task}"
            for label, values in task_scores.items():
                scores[label][name] = value_of(labels, values[task], events.user)
                if label != MODEL:
                    differences[label][name] = difference_of(
                        labels, task_scores[MODEL][task], values[task], events.user
                    )
    for metric, gain_of in ((f"HR@{CUTOFF}", hits_at_k), (f"NDCG@{CUTOFF}", gains_at_k)):
        gains = {label: gain_of(rank, CUTOFF) for label, rank in ranks.items()}
        for label, gain in gains.items():
            scores[label][metric] = float(gain.mean())
            if label != MODEL:
                differences[label][metric] = mean_difference(gains[MODEL], gain, last.user)
    return Report(data.part, scores, differences)


def _auc(labels: npt.NDArray[Any], scores: npt.NDArray[Any], users: npt.NDArray[Any]) -> float:
    """AUC with the arguments of GAUC."""
    return auc(labels, scores)


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
