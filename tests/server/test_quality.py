"""What the demo's checkpoint promises: trained in time, and better than popularity and item-kNN."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BARS = ("AUC engagement", "AUC retention", "AUC monetization", "GAUC engagement", "HR@10", "NDCG@10")


@pytest.mark.parametrize("baseline", ["popularity", "item-kNN"])
def test_better_than_the_baselines(checkpoint: Path, baseline: str) -> None:
    differences = json.loads((checkpoint / "metrics.json").read_text())["differences"][baseline]
    assert all(differences[bar]["difference"] > 0 for bar in BARS)
    # Training rounds differently on another processor, which moves a metric by some thousandths, about as much as the
    # closest interval is away from zero: one of six may be missed there, all hold where the README's table was made.
    above_zero = [bar for bar in BARS if differences[bar]["low"] > 0]
    assert len(above_zero) >= (len(BARS) if baseline == "popularity" else len(BARS) - 1)


def test_trained_in_under_three_minutes(checkpoint: Path) -> None:
    record = json.loads((checkpoint / "config.json").read_text())["record"]
    # Twice the promise: a machine that runs tests besides is no place to time anything.
    assert record["training_seconds"] < 360
