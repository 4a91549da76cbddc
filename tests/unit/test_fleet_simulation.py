"""The simulated fleet: against queueing theory, against Che's approximation, and what its balances promise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from mtgr.errors import ConfigurationError
from perf import fleet, fleet_simulation
from perf.fleet import MEASURED, load_costs, replicas_for, tables
from perf.fleet_simulation import BALANCES, Balance, Change, Costs, Crowd, Ring, Served, lru_hit_ratio, simulate
from tests.conftest import ROOT

COSTS = Costs(cold=0.040, warm=0.010, slots=1, cached_users=100)
CROWD = Crowd(2000)


def run(balance: Balance, **changed: object) -> Served:
    settings: dict[str, object] = {"replicas": 8, "rate": 150.0, "seconds": 100.0, "seed": 1}
    return simulate(balance, CROWD, COSTS, **(settings | changed))  # type: ignore[arg-type]


def test_one_server_waits_as_the_pollaczek_khinchine_formula_says() -> None:
    # Everybody is new, so that every service takes as long: M/D/1.
    costs = Costs(cold=0.010, warm=0.010, slots=1, cached_users=1)
    for load in (0.3, 0.6, 0.8):
        served = simulate("random", CROWD, costs, replicas=1, rate=load / 0.010, seconds=3000, seed=2)
        wait = served.latency.mean() - 0.010
        assert wait == pytest.approx(0.010 * load / (2 * (1 - load)), rel=0.08)


def test_slots_serve_side_by_side() -> None:
    costs = replace(COSTS, cold=0.010, warm=0.010, slots=4)
    served = simulate("random", CROWD, costs, replicas=1, rate=100, seconds=100, seed=3)
    # M/D/4 at a quarter: hardly anybody waits.
    assert served.latency.mean() < 0.0105
    assert served.latency.min() == pytest.approx(0.010)


def test_a_request_costs_what_the_cache_says_and_waits_at_least_nothing() -> None:
    for balance in BALANCES:
        served = run(balance)
        cost = np.where(served.hit, COSTS.warm, COSTS.cold)
        assert (served.latency >= cost - 1e-9).all()
        assert set(served.replica.tolist()) == set(range(8))


def test_every_balance_gets_the_same_requests() -> None:
    first, *others = (run(balance) for balance in BALANCES)
    for other in others:
        np.testing.assert_array_equal(first.arrival, other.arrival)


@pytest.mark.parametrize(("exponent", "offset"), [(1.0, 0.0), (0.8, 0.0), (1.0, 50.0)])
def test_hit_ratios_are_those_of_ches_approximation(exponent: float, offset: float) -> None:
    crowd = Crowd(2000, exponent, offset)
    settings = {"replicas": 4, "rate": 100.0, "seconds": 600.0, "seed": 4}
    together = simulate("ring_hash", crowd, COSTS, **settings).between(200)  # type: ignore[arg-type]
    apart = simulate("random", crowd, COSTS, **settings).between(200)  # type: ignore[arg-type]
    assert apart.hit_ratio == pytest.approx(lru_hit_ratio(crowd, 100), abs=0.01)
    # A ring's shares are not equal, and neither are its caches' needs.
    assert together.hit_ratio == pytest.approx(lru_hit_ratio(crowd, 400), abs=0.02)


def test_bins_stand_for_all_users() -> None:
    for users in (1, 10, 2000, 1_000_000):
        counts, shares = Crowd(users).bins()
        assert counts.sum() == users
        assert (counts * shares).sum() == pytest.approx(1)
    assert lru_hit_ratio(CROWD, 2000) == 1.0
    assert lru_hit_ratio(Crowd(2000, 0.0), 500) == pytest.approx(0.25, abs=1e-6)  # all alike


def owners(members: list[int]) -> np.ndarray:
    ring = Ring(members)
    return np.array([ring.owner(point) for point in ring.owners(2000).tolist()])


def test_a_ring_moves_few_users() -> None:
    before = owners(list(range(8)))
    without = owners([0, 1, 2, 4, 5, 6, 7])
    assert not (without == 3).any()
    # Beside the lost one's users a few others move, because the rest get more points, as in Envoy.
    assert ((before != without) & (before != 3)).mean() < 0.13
    more = owners(list(range(9)))
    assert 0.8 / 9 < (more == 8).mean() < 1.2 / 9
    assert ((before != more) & (more != 8)).mean() < 0.13
    shares = np.bincount(before) / len(before)
    assert shares.max() < 1.3 / 8


def test_a_walk_along_the_ring_meets_every_replica_once() -> None:
    ring = Ring(range(5))
    for point in ring.owners(20).tolist():
        met = list(ring.walk(point))
        assert met[0] == ring.owner(point)
        assert sorted(met) == list(range(5))


def test_affinity_pays_and_its_bound_takes_little() -> None:
    costs = replace(load_costs(MEASURED), cached_users=fleet.SCARCE)
    found = fleet.compare(costs, seconds=100, seed=0)
    assert found["bounded_ring_hash"]["hit_ratio"] >= 1.5 * found["random"]["hit_ratio"]
    assert found["bounded_ring_hash"]["hit_ratio"] >= 0.93 * found["ring_hash"]["hit_ratio"]
    assert found["bounded_ring_hash"]["imbalance"] < found["ring_hash"]["imbalance"]
    assert found["bounded_ring_hash"]["p99_ms"] < min(
        found["ring_hash"]["p99_ms"], found["least_request"]["p99_ms"], found["random"]["p99_ms"]
    )


def test_who_was_at_a_lost_replica_is_served_by_another() -> None:
    moment = 50.3
    calm = run("random", rate=250.0)
    there = (calm.arrival < moment) & (calm.arrival + calm.latency > moment) & (calm.replica == 3)
    busy = run("random", rate=250.0, changes=[Change(moment, 3, up=False), Change(70.0, 3, up=True)])
    assert busy.retried == there.sum() > 0
    assert not (busy.between(moment, 70.0).replica == 3).any()
    assert (busy.between(71.0).replica == 3).any()
    assert not (busy.replica[there] == 3).any()
    assert (busy.latency[there] > moment - busy.arrival[there]).all()


def test_a_replica_that_comes_back_has_forgotten() -> None:
    changes = [Change(60.0, 3, up=False), Change(60.5, 3, up=True)]
    served = run("ring_hash", changes=changes)
    own = served.replica == 3
    before = served.hit[own & (served.arrival > 50) & (served.arrival < 60)].mean()
    after = served.hit[own & (served.arrival > 60.5) & (served.arrival < 64)].mean()
    assert after < before - 0.1


def test_replicas_are_as_few_as_bear_the_rate() -> None:
    def hit_ratio(count: int) -> float:
        return lru_hit_ratio(Crowd(100_000), 100 * count)

    count = replicas_for(500, COSTS, hit_ratio)
    assert count * COSTS.capacity(hit_ratio(count)) * fleet.UTILIZATION >= 500
    assert (count - 1) * COSTS.capacity(hit_ratio(count - 1)) * fleet.UTILIZATION < 500


def test_costs_are_measured_or_given(tmp_path: Path) -> None:
    measured = load_costs(MEASURED)
    assert (round(1e3 * measured.cold, 1), round(1e3 * measured.warm, 1)) == (45.7, 13.8)
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"cold_ms": 8, "warm_ms": 2, "slots": 4, "cached_users": 1000}))
    assert load_costs(own) == Costs(0.008, 0.002, 4, 1000)
    assert load_costs(own).capacity(0.5) == pytest.approx(800)
    for wrong in ({"cold_ms": 8}, {"cold_ms": 2, "warm_ms": 8, "cached_users": 1}, {"milliseconds": {}}):
        own.write_text(json.dumps(wrong))
        with pytest.raises(ConfigurationError, match=r"own\.json"):
            load_costs(own)


def test_the_simulated_ring_is_the_gateways() -> None:
    text = (ROOT / "deploy" / "gateway" / "envoy.yaml").read_text(encoding="utf-8")
    cluster = next(one for one in yaml.safe_load(text)["static_resources"]["clusters"] if one["name"] == "grpc")
    assert cluster["ring_hash_lb_config"]["minimum_ring_size"] == fleet_simulation.RING_SIZE
    bound = cluster["common_lb_config"]["consistent_hashing_lb_config"]["hash_balance_factor"]
    assert bound == 100 * fleet_simulation.BOUND


def test_the_document_shows_the_stored_result() -> None:
    result = json.loads((ROOT / "perf" / "results" / "fleet-cpu.json").read_text(encoding="utf-8"))
    assert tables(result) in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
