"""``python -m perf.fleet``: how many replicas, balanced how, by simulation with measured costs (docs/scaling.md).

Costs are the medians of the engine alone in a result of ``perf.bench_vllm``, or a JSON file of one's own:
``{"cold_ms": 45.7, "warm_ms": 13.8, "slots": 1, "cached_users": 256}``, where ``slots`` is how many requests a replica
serves at a time at that speed, and ``cached_users`` how many contexts its pages hold.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from mtgr.errors import ConfigurationError, MTGRError
from mtgr.files import read_json
from perf.fleet_simulation import BALANCES, Balance, Change, Costs, Crowd, Served, lru_hit_ratio, simulate
from perf.record import ROOT, describe, store

MEASURED = ROOT / "perf" / "results" / "bench-vllm-cpu-1thread.json"
# Of the measured network: 512 tokens x 4 layers x keys and values of 256 numbers of 4 bytes are 4 MiB; by default
# vLLM has 1 GiB of pages on a CPU.
MEASURED_CACHED_USERS = 256
# Sizes of the cache that a fleet is sized with, as multiples.
MEMORY = (1, 16)

REPLICAS = 8
USERS = 2000
# As in tests/server/test_fleet.py: pages for one user in twenty-five on each replica.
SCARCE = 80
# Busy part of the slots that leaves p99 within a few times the cost of a cold request.
UTILIZATION = 0.6
WINDOW = 30.0
# Users behind each rate, flattened at the head.
CROWDS = {1_000: Crowd(1_000_000, 1.0, 1_000), 100_000: Crowd(100_000_000, 1.0, 100_000)}


def load_costs(path: Path) -> Costs:
    """Costs of a result of perf.bench_vllm, or of a file of one's own.

    Raises:
        ConfigurationError: If the file has neither form, or a value is not allowed.
    """
    found = read_json(path)
    try:
        if "milliseconds" in found:
            engine = found["milliseconds"]["engine"]
            return Costs(median(engine["vllm cold"]) / 1e3, median(engine["vllm warm"]) / 1e3, 1, MEASURED_CACHED_USERS)
        costs = Costs(
            float(found["cold_ms"]) / 1e3,
            float(found["warm_ms"]) / 1e3,
            int(found.get("slots", 1)),
            int(found["cached_users"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{path} has no costs ({error}); give cold_ms, warm_ms, slots and cached_users."
        ) from error
    if not (0 < costs.warm <= costs.cold and costs.slots >= 1 and costs.cached_users >= 1):
        raise ConfigurationError(f"{path}: 0 < warm_ms <= cold_ms, slots and cached_users from 1 on are allowed.")
    return costs


def compare(costs: Costs, seconds: float, seed: int) -> dict[str, dict[str, float]]:
    """Eight replicas and 2,000 Zipf users, each balance at the same load: what random balancing can just bear."""
    crowd = Crowd(USERS)
    by_chance = lru_hit_ratio(crowd, costs.cached_users)
    rate = UTILIZATION * REPLICAS * costs.capacity(by_chance)
    found = {}
    for balance in BALANCES:
        served = simulate(balance, crowd, costs, replicas=REPLICAS, rate=rate, seconds=seconds, seed=seed)
        found[balance] = figures(served.between(seconds / 4))  # caches are warm by then
    return found


def figures(served: Served) -> dict[str, float]:
    """What tables show; times in milliseconds."""
    return {
        "hit_ratio": served.hit_ratio,
        "p50_ms": 1e3 * float(sorted(served.latency)[len(served.latency) // 2]),
        "p99_ms": 1e3 * served.p99,
        "imbalance": served.imbalance,
    }


def changes(costs: Costs, balance: Balance, seed: int) -> dict[str, Any]:
    """A replica is lost, comes back without its cache, and another one is added: figures of half a minute each."""
    crowd = Crowd(USERS)
    rate = UTILIZATION * (REPLICAS - 1) * costs.capacity(lru_hit_ratio(crowd, costs.cached_users))
    start = 120.0
    moments = {"before": start - WINDOW, "lost": start, "later": start + 90, "back": start + 120, "added": start + 240}
    served = simulate(
        balance,
        crowd,
        costs,
        replicas=REPLICAS,
        rate=rate,
        seconds=moments["added"] + WINDOW,
        seed=seed,
        changes=[
            Change(moments["lost"], 3, up=False),
            Change(moments["back"], 3, up=True),
            Change(moments["added"], REPLICAS, up=True),
        ],
    )
    windows = {name: figures(served.between(moment, moment + WINDOW)) for name, moment in moments.items()}
    return {"windows": windows, "retried": served.retried, "requests": len(served.arrival)}


def replicas_for(rate: float, costs: Costs, hit_ratio: Callable[[int], float]) -> int:
    """The fewest replicas that bear a rate at ``UTILIZATION``, where their number decides what is cached."""

    def bears(count: int) -> bool:
        return count * costs.capacity(hit_ratio(count)) * UTILIZATION >= rate

    # More replicas never hit less, so that what bears it once bears it always.
    low, high = 0, 1
    while not bears(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bears(middle) else (middle, high)
    return high


def sizing(costs: Costs, seconds: float, seed: int) -> dict[str, dict[str, float]]:
    """Replicas for each rate: by ring hash, whose caches add up; without affinity; and without a cache."""
    found: dict[str, dict[str, float]] = {}
    for rate, crowd in CROWDS.items():
        for contexts in (factor * costs.cached_users for factor in MEMORY):
            by_chance = lru_hit_ratio(crowd, contexts)
            ways: dict[str, Callable[[int], float]] = {
                f"ring hash, {contexts:,} contexts": partial(_together, crowd, contexts),
                f"random, {contexts:,} contexts": lambda count, ratio=by_chance: ratio,  # type: ignore[misc]
            }
            for way, hit_ratio in ways.items():
                count = replicas_for(rate, costs, hit_ratio)
                found[f"{rate:,}/s, {way}"] = {"replicas": count, "hit_ratio": hit_ratio(count)}
        found[f"{rate:,}/s, no cache"] = {"replicas": replicas_for(rate, costs, lambda count: 0.0), "hit_ratio": 0.0}
    # The smallest case is also served request by request: a formula knows nothing of queues.
    rate, crowd = next(iter(CROWDS.items()))
    ways_served: tuple[tuple[Balance, str], ...] = (("bounded_ring_hash", "ring hash"), ("random", "random"))
    for balance, way in ways_served:
        row = f"{rate:,}/s, {way}, {costs.cached_users:,} contexts"
        count = int(found[row]["replicas"])
        served = simulate(balance, crowd, costs, replicas=count, rate=rate, seconds=seconds, seed=seed)
        found[f"{row}, simulated"] = {"replicas": count, **figures(served.between(seconds / 2))}
    return found


def _together(crowd: Crowd, contexts: int, replicas: int) -> float:
    """By ring hash a user is cached once, and the replicas' caches are one large one."""
    return lru_hit_ratio(crowd, replicas * contexts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and store the result; 1 if affinity does not find 1.5 times as many prefixes."""
    parser = argparse.ArgumentParser(prog="python -m perf.fleet", description=__doc__)
    parser.add_argument("--costs", type=Path, default=MEASURED)
    parser.add_argument("--seconds", type=float, default=400.0, help="simulated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="fleet-cpu", help="of the result in perf/results")
    options = parser.parse_args(arguments)
    try:
        costs = load_costs(options.costs)
    except MTGRError as error:
        print(f"perf.fleet: {error}", file=sys.stderr)
        return 2
    print(
        f"cold {1e3 * costs.cold:.1f} ms, warm {1e3 * costs.warm:.1f} ms, {costs.slots} at a time, "
        f"{costs.cached_users:,} contexts a replica\n"
    )
    scarce = replace(costs, cached_users=min(SCARCE, costs.cached_users))
    result = {
        **describe(options.seed),
        "costs": {**asdict(costs), "source": _relative(options.costs)},
        "compare": {
            f"{one.cached_users} contexts a replica": compare(one, options.seconds, options.seed)
            for one in dict.fromkeys((scarce, costs))
        },
        "changes": {balance: changes(scarce, balance, options.seed) for balance in ("bounded_ring_hash", "random")},
        "sizing": sizing(costs, options.seconds, options.seed),
    }
    print(tables(result))
    print(store(options.name, result).relative_to(ROOT))
    first = next(iter(result["compare"].values()))
    gain = first["bounded_ring_hash"]["hit_ratio"] / first["random"]["hit_ratio"]
    print(f"affinity finds {gain:.2f} times as many prefixes as random balancing")
    return 0 if gain >= 1.5 and math.isfinite(gain) else 1


def _relative(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name)


def tables(result: dict[str, Any]) -> str:
    """A stored result as Markdown, as docs/scaling.md has it."""
    parts = [
        _table(f"{REPLICAS} replicas, {USERS:,} users, {title}", balances)
        for title, balances in result["compare"].items()
    ]
    parts += [
        _table(
            f"{balance}, replicas come and go, {change['retried']} of {change['requests']:,} tried again",
            change["windows"],
        )
        for balance, change in result["changes"].items()
    ]
    return "\n".join([*parts, _table("replicas for a rate", result["sizing"])])


def _table(title: str, rows: dict[str, dict[str, float]]) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"| {title} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, row in rows.items():
        cells = ["" if column not in row else _shown(column, row[column]) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(column: str, value: float) -> str:
    if column == "hit_ratio":
        return f"{value:.1%}"
    return f"{value:,.0f}" if column == "replicas" or value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
