"""``python -m perf.cache_policy``: LRU against TinyLFU admission, as hit ratios on Zipf traffic.

Users are drawn from a Zipf distribution, each asked for equally large records; the cache has room for a share of them.
The first half of the requests warms the cache up and is not counted.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from mtgr.features.bounded import BoundedCache
from mtgr.features.frequency import FrequencySketch

SIZE = 1000


def hit_ratio(policy: str, *, users: int, share: float, exponent: float, requests: int, seed: int) -> float:
    """Share of requests, of the second half, that the cache answers."""
    weights = np.arange(1, users + 1, dtype=np.float64) ** -exponent
    drawn = np.random.default_rng(seed).choice(users, requests, p=weights / weights.sum())
    capacity = int(share * users)
    cache: BoundedCache[bool] = BoundedCache(
        capacity * SIZE, FrequencySketch(capacity) if policy == "tinylfu" else None
    )
    hits = 0
    for index, user in enumerate(drawn.tolist()):
        key = str(user)
        if cache.get(key):
            hits += index >= requests // 2
        else:
            cache.put(key, True, SIZE)
    return hits / (requests - requests // 2)


def main(arguments: list[str] | None = None) -> int:
    """Print a table; 1 if TinyLFU, which the feature cache uses, misses 90%."""
    parser = argparse.ArgumentParser(prog="python -m perf.cache_policy", description=__doc__)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--share", type=float, default=0.6, help="of the users that the cache has room for")
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    ratios = {}
    for policy in ("lru", "tinylfu"):
        ratios[policy] = [
            hit_ratio(
                policy,
                users=options.users,
                share=options.share,
                exponent=options.exponent,
                requests=options.requests,
                seed=seed,
            )
            for seed in range(options.seeds)
        ]
        shown = " ".join(f"{ratio:.2%}" for ratio in ratios[policy])
        print(f"{policy:<8} {np.mean(ratios[policy]):.2%}  ({shown})")
    weights = np.arange(1, options.users + 1, dtype=np.float64) ** -options.exponent
    print(
        f"best     {weights[: int(options.share * options.users)].sum() / weights.sum():.2%}  (the same users always)"
    )
    return 0 if min(ratios["tinylfu"]) > 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
