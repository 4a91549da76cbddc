"""The demo: start Triton on the model repository and recommend films to three MovieLens users.

python clients/demo.py --model-repository model_repository
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from _show import render

from mtgr.bundle import load_bundle
from mtgr.client import MTGRClient, Recommendation
from mtgr.data.dataset import Item
from mtgr.data.movielens import MovieLens100K
from mtgr.errors import MTGRError
from mtgr.features.store import UserRecord
from mtgr.serving.report import format_reports, strategy_reports
from mtgr.serving.server import TritonServer

USERS = ("196", "22", "6")
STRATEGIES = ("baseline", "onnx")
REPEATS = 20
# Items whose scores differ by less may stand in either order: engines round differently.
SCORE_TOLERANCE = 2e-5


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 if every strategy gave every user the same ranking, 1 if not, 2 after an error."""
    parser = argparse.ArgumentParser(description="Recommend films to three MovieLens users.")
    parser.add_argument("--model-repository", type=Path, default=Path("model_repository"))
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        store = load_bundle(options.model_repository).store()
        catalogue = {item.id: item for item in MovieLens100K().items()}
        with TritonServer(options.model_repository) as server:
            print(format_reports(strategy_reports(options.model_repository, server.models())))
            print(f"\ntritonserver was ready after {time.perf_counter() - start:.1f} s, gRPC on {server.grpc_url}\n")
            with MTGRClient(server.grpc_url) as client:
                agreed = [_show_user(client, user, store.get(user) or UserRecord(), catalogue) for user in USERS]
    except MTGRError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    print("Both strategies gave every user the same ranking." if all(agreed) else "The strategies DISAGREE.")
    return 0 if all(agreed) else 1


def _show_user(client: MTGRClient, user: str, record: UserRecord, catalogue: Mapping[int, Item]) -> bool:
    """Print a user's last liked films, the recommendations, and latencies; whether the strategies agree."""
    liked = record.items[record.actions >= 3][-5:][::-1]
    profile = ", ".join(f"{name} {value}" for name, value in record.profile.items())
    print(f"User {user} ({profile}; {len(record.items)} ratings) last liked:")
    for item in liked.tolist():
        print(f"  {catalogue[item].title} ({catalogue[item].year})")
    # The log ends in 1998: ask as of the second after the user's last rating.
    moment = int(record.times[-1]) + 1
    answers = {}
    for strategy in STRATEGIES:
        runs = [client.recommend(user, strategy=strategy, request_time=moment) for _ in range(REPEATS)]
        answers[strategy] = runs[-1]
        median = statistics.median(run.latency_ms for run in runs)
        print(f"  {strategy:<9} {median:5.1f} ms (median of {REPEATS} requests)")
    print(f"\n{render(answers['onnx'], catalogue)}\n")
    return same_ranking(answers["baseline"], answers["onnx"])


def same_ranking(first: Recommendation, second: Recommendation) -> bool:
    """Whether two answers rank alike, but for items of almost equal score."""
    if len(first) != len(second) or not np.allclose(first.scores, second.scores, rtol=0, atol=SCORE_TOLERANCE):
        return False
    moved = first.items != second.items
    return all(
        np.abs(second.scores - score).min() < SCORE_TOLERANCE
        and (item in second.items or score - first.scores[-1] < SCORE_TOLERANCE)
        for item, score in zip(first.items[moved].tolist(), first.scores[moved].tolist(), strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
