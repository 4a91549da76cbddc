"""Router settings out of string parameters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mtgr.errors import ConfigurationError
from mtgr.routing.router import RoutingConfig
from mtgr.routing.settings import load_routing_config, routing_config
from tests.conftest import ROOT


def test_absent_parameters_keep_their_defaults() -> None:
    assert routing_config({}) == RoutingConfig()


def test_every_parameter_is_read() -> None:
    parameters = {
        "task_weights": "engagement=2, retention = -0.5",
        "default_top_k": "7",
        "rank_limit": "99",
        "remove_seen": "False",
        "max_batch": "8",
        "max_running": "3",
    }
    assert routing_config(parameters) == RoutingConfig(
        task_weights={"engagement": 2.0, "retention": -0.5},
        default_top_k=7,
        rank_limit=99,
        remove_seen=False,
        max_batch=8,
        max_running=3,
    )
    assert routing_config({"remove_seen": "TRUE"}).remove_seen is True
    one = routing_config({"rank_limit": "99"})
    assert (one.rank_limit, one.default_top_k) == (99, RoutingConfig().default_top_k)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("task_weights", "engagement", "task_weights is 'engagement'; write it as"),
        ("task_weights", "engagement=high", "task_weights is 'engagement=high'"),
        ("task_weights", "", "task_weights is ''"),
        ("task_weights", "engagement=1.0,", "task_weights is"),
        ("task_weights", "engagement=nan", "must be finite"),
        ("task_weights", "engagement=inf", "must be finite"),
        ("default_top_k", "ten", "default_top_k is 'ten'; it must be an integer"),
        ("default_top_k", "1.5", "default_top_k is '1.5'"),
        ("default_top_k", "0", "must be at least 1"),
        ("rank_limit", "", "rank_limit is ''"),
        ("rank_limit", "-1", "must be at least 1"),
        ("max_batch", "0", "max_batch is 0; it must be at least 1"),
        ("max_running", "two", "max_running is 'two'; it must be an integer"),
        ("remove_seen", "yes", "remove_seen is 'yes'; it must be true or false"),
        ("top_k", "3", "unknown parameter 'top_k'"),
    ],
)
def test_wrong_values_are_refused(name: str, value: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        routing_config({name: value})
    assert words in str(caught.value)


def test_the_way_in_process_takes_the_repositorys_settings(tmp_path: Path) -> None:
    assert load_routing_config(tmp_path) == RoutingConfig()  # engines alone
    shutil.copytree(ROOT / "model_repository" / "mtgr_router", tmp_path / "mtgr_router")
    assert load_routing_config(tmp_path) == RoutingConfig()  # what git holds are the defaults
    path = tmp_path / "mtgr_router" / "config.pbtxt"
    path.write_text(path.read_text().replace("engagement=1.0,", "engagement=0.25,"))
    assert load_routing_config(tmp_path).task_weights["engagement"] == 0.25
    path.write_text("max_batch_size: many")
    with pytest.raises(ConfigurationError, match="is not a model config"):
        load_routing_config(tmp_path)
