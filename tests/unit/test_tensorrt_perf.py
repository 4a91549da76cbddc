"""The steps that measure plans on a GPU, run with ONNX Runtime in the place of plans."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.tensorrt_ways import WAYS
from mtgr.errors import ConfigurationError
from perf.tensorrt_entries import PLANS, TINY_PLANS, graph_of
from perf.tensorrt_export import chosen
from perf.tensorrt_gpu import finite, kept
from perf.tensorrt_measure import bound_of, error_of, in_parts, padded_to, sample
from perf.tensorrt_plans import main, results
from perf.tensorrt_serve import best_of

WIDTH = 3


def graph(context: int | str, candidates: int | str) -> onnx.ModelProto:
    """``task_scores`` [B, k, 3] = ``candidates`` + 1, with ``context`` beside it."""
    inputs = {"context": ["B", context, WIDTH], "candidates": ["B", candidates, WIDTH]}
    nodes = [
        helper.make_node("Cast", ["candidates"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["one"], value_float=1.0),
        helper.make_node("Add", ["x", "one"], ["task_scores"]),
    ]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info("task_scores", TensorProto.FLOAT, inputs["candidates"])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


TRIES = [["dynamic", "two profiles"], ["dynamic", "one profile"], ["fixed", "two profiles"]]


def entry(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "preset": name, "kind": "rank", "family": name, "tries": TRIES, "graphs": {},
        "cases": "cases.npz",
        "precision": "fp32", "shapes": ["b1", "b9", "long"], "timed": ["b1"], "wanted": ["task_scores"],
        "native_error": 0.0, "first_id": 2, "temperature": 1.0, **changes,
    }  # fmt: skip


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Three plans: one of dynamic lengths, one of one bucket alone, and one whose answers are wrong."""
    generator = np.random.default_rng(0)
    cases = {}
    for name, (batch, n, k) in {"b1": (1, 5, 4), "b9": (9, 5, 4), "long": (1, 5, 9)}.items():
        cases[f"{name}/context"] = generator.integers(0, 9, (batch, n, WIDTH)).astype(np.int32)
        cases[f"{name}/candidates"] = generator.integers(0, 9, (batch, k, WIDTH)).astype(np.int32)
        cases[f"{name}/task_scores"] = cases[f"{name}/candidates"] + np.float32(1)
    np.savez(tmp_path / "cases.npz", **cases)
    cases["b9/task_scores"][8, 0, 0] += 0.5
    np.savez(tmp_path / "other.npz", **cases)
    for name, lengths, shape in (("good", "dynamic", ("n", "k")), ("fixed", "fixed", (6, 8))):
        path = graph_of(tmp_path, f"{name}-rank-fp32", lengths)
        path.parent.mkdir(parents=True)
        onnx.save(graph(*shape), path)
    entries = [entry("good"), entry("fixed"), entry("bad", preset="good", cases="other.npz"), entry("none")]
    (tmp_path / "graphs.json").write_text(json.dumps(entries))
    return tmp_path


def test_plans_are_built_and_measured_and_a_failure_costs_no_other(work: Path) -> None:
    arguments = ["--work", str(work), "--dry-run"]
    assert main(["build", *arguments, "--jobs", "2"]) == 1  # there is no graph of the last
    built = {plan["name"]: plan for plan in results(work)}
    assert [built[name].get("lengths") for name in built] == ["dynamic", "fixed", "dynamic", None]
    assert set(built["fixed"]["refused"]) == {"dynamic, two profiles", "dynamic, one profile"}
    assert "there is no graph" in built["none"]["refused"]["fixed, two profiles"]
    assert built["good"]["way"] == "two profiles"
    assert (built["good"]["build"]["largest"], built["fixed"]["build"]["largest"]) == (32, 8)
    assert main(["measure", *arguments]) == 1
    found = {plan["name"]: plan for plan in results(work)}
    assert [found[name].get("holds") for name in found] == [True, True, False, None]
    assert set(found["good"]["errors"]) == {"b1", "b9", "long"}
    assert set(found["fixed"]["errors"]) == {"b1"}  # the others are longer, or a larger batch
    assert found["bad"]["max_error"] == 0.5
    assert len(found["good"]["milliseconds"]["b1"]) == 3
    assert found["good"]["cuda_graphs"]["holds"]
    # A later call builds what is missing and nothing else.
    late = graph_of(work, "none-rank-fp32", "fixed")
    late.parent.mkdir(parents=True)
    onnx.save(graph(6, 8), late)
    graph_of(work, "good-rank-fp32", "dynamic").unlink()
    assert main(["build", *arguments]) == 0
    assert [plan["lengths"] for plan in results(work)] == ["dynamic", "fixed", "dynamic", "fixed"]


def test_what_runs_too_long_is_named(work: Path) -> None:
    assert main(["build", "--work", str(work), "--dry-run", "--until", "0"]) == 1
    assert [plan["build_failed"] for plan in results(work)] == ["the time was over"] * 4
    assert kept(work)[1:] == ({}, {})


def test_errors_see_what_is_wrong() -> None:
    plan = entry("x", temperature=0.1)
    wanted = {"logits": np.array([[3.0, 2.0, 1.0]]), "scores": np.array([[3.0, 2.0]])}

    def error(items: list[int], scores: list[float]) -> float:
        answer = {"items": np.array([items], np.int32), "scores": np.array([scores], np.float32)}
        return error_of(answer, wanted, plan)

    assert error([2, 3], [3.0, 2.0]) == 0
    assert error([2, 4], [3.0, 2.0]) == pytest.approx(0.1)  # the third item stands in the second place
    assert error([2, 3], [3.0, 1.5]) == pytest.approx(0.05)
    for items in ([2, 2], [2, 9], [0, 2]):
        assert error(items, [3.0, 2.0]) == np.inf
    assert error_of({"task_scores": np.full((1, 2, 1), np.nan)}, {"task_scores": np.zeros((1, 2, 1))}, plan) == np.inf
    assert (bound_of(entry("x")), bound_of(entry("x", native_error=0.25))) == (1e-5, 0.5)
    assert finite({"a": [np.inf, 1.0]}) == {"a": [None, 1.0]}


def test_rows_are_padded_to_the_one_bucket_or_left_out() -> None:
    rows = {"context": np.ones((2, 3, WIDTH), np.int32)}
    padded = padded_to(rows, {"context": (None, (-1, 5))})
    assert padded is not None
    assert padded["context"].sum(axis=(0, 2)).tolist() == [6, 6, 6, 0, 0]
    assert padded_to(rows, {"context": (None, (-1, 2))}) is None
    assert padded_to(rows, {"context": (None, (-1, -1))})["context"].shape == (2, 3, WIDTH)  # type: ignore[index]


def test_slow_calls_are_made_fewer_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perf.tensorrt_measure.SHAPE_S", 0.0)
    calls: list[int] = []
    assert len(sample(lambda: calls.append(1), 100, 2)) == 30
    assert len(calls) == 32


def test_a_build_goes_on_behind_the_way_at_which_its_process_ended(work: Path) -> None:
    state = work / "good" / "build.json"
    state.parent.mkdir()
    state.write_text(json.dumps({"refused": {}, "begun": "dynamic, two profiles"}))
    arguments = ["build", "--work", str(work), "--dry-run", "--only", "good"]
    assert main([*arguments, "--resume"]) == 0
    built = json.loads(state.read_text())
    assert built["refused"] == {"dynamic, two profiles": "its process ended"}
    assert (built["way"], "begun" in built) == ("one profile", False)
    assert main(arguments) == 0
    assert json.loads(state.read_text())["refused"] == {}


def test_a_way_that_takes_too_long_is_left_for_the_next(work: Path) -> None:
    (work / "graphs.json").write_text(json.dumps([entry("good")]))
    arguments = ["build", "--work", str(work), "--dry-run"]
    assert main([*arguments, "--way-seconds", "0.05"]) == 1  # no process writes anything so soon
    (built,) = results(work)
    assert built["build_failed"].startswith("it was ended")
    state = work / "good" / "build.json"
    state.write_text(json.dumps({"refused": {}, "begun": "dynamic, two profiles"}))
    assert main([*arguments, "--way-seconds", "0.05"]) == 0  # as if it had begun
    (built,) = results(work)
    assert built["refused"]["dynamic, two profiles"] == "its process ended"


def test_a_build_that_crashes_goes_on_with_the_next_way(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "graphs.json").write_text(json.dumps([entry("good")]))
    (work / "good").mkdir()
    (work / "good" / "build.json").write_text(json.dumps({"refused": {}, "begun": "dynamic, two profiles"}))
    run, commands = subprocess.run, []

    def crash_first(command: list[str], **options: Any) -> Any:
        commands.append(list(command))
        if len(commands) == 1:
            return subprocess.CompletedProcess(command, -11)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", crash_first)
    assert main(["build", "--work", str(work), "--dry-run"]) == 0
    assert ["--resume" in command for command in commands] == [False, True]
    (built,) = results(work)
    assert built["way"] == "one profile"


def test_a_batch_is_run_in_the_parts_that_a_plan_takes() -> None:
    seen = []

    def run(part: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(part["context"]))
        return {"y": part["context"] * 2}

    rows = {"context": np.arange(10).reshape(5, 2)}
    np.testing.assert_array_equal(in_parts(run, rows, 2)["y"], rows["context"] * 2)
    assert in_parts(run, rows, 5)["y"].shape == (5, 2)
    assert seen == [2, 2, 1, 5]


def test_plans_have_names_and_graphs_of_their_own() -> None:
    assert len({plan.name for plan in PLANS}) == len(PLANS)
    names = {plan.name: plan for plan in PLANS}
    assert list(names["large-rank-fp16-b8"].graphs()) == [("large-rank-fp32", "b8", "products")]  # nothing is pinned
    assert set(names["large-rank-fp16-typed"].graphs()) == {("large-rank-fp16", "dynamic", "products")}
    assert {last for *_, last in names["small-retrieve-fp32"].graphs()} == {"company"}
    assert {plan.family for plan in PLANS} >= {
        f"{preset}-{kind}-{precision}"
        for preset in ("small", "large")
        for kind in ("rank", "retrieve")
        for precision in ("fp32", "fp16", "int8")
    }
    assert all(WAYS[way.name] is way for plan in (*PLANS, *TINY_PLANS) for _, way in plan.tries)


def test_what_goes_wrong_in_one_way_is_kept_and_the_next_is_tried(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def build(options: Any, plan: Any, lengths: str, way: Any) -> dict[str, Any]:
        tried.append((lengths, way.name))
        if len(tried) == 1:
            raise TypeError("no such attribute")
        return {"largest": 32}

    monkeypatch.setattr("perf.tensorrt_plans._build", build)
    assert main(["build", "--work", str(work), "--only", "good"]) == 0
    assert [list(key) for key in tried] == TRIES[:2]
    built = json.loads((work / "good" / "build.json").read_text())
    assert (built["way"], built["refused"]["dynamic, two profiles"]) == (
        "one profile",
        "TypeError('no such attribute')",
    )


def test_of_a_family_the_quickest_plan_that_agrees_is_served() -> None:
    def plan(name: str, family: str, holds: bool | None, b8: float | None, lengths: str = "dynamic") -> dict[str, Any]:
        times = {} if b8 is None else {"p50": {"b1": 0.5, "b8": b8}}
        return entry(name, family=family, lengths=lengths, holds=holds, **times)

    plans = [
        plan("wrong", "a", False, 1.0),
        plan("slow", "a", True, 3.0),
        plan("quick", "a", True, 2.0),
        plan("of one batch", "a", True, 1.0, "b8"),
        plan("unknown", "b", None, None),
        entry("not built", family="c"),
    ]
    assert [found["name"] for found in best_of(plans)] == ["quick", "of one batch", "unknown"]


def test_a_graph_of_one_batch_takes_no_other() -> None:
    rows = {"context": np.ones((2, 3, WIDTH), np.int32)}
    assert padded_to(rows, {"context": (None, (8, 5))}) is None
    padded = padded_to(rows, {"context": (None, (2, 5))})
    assert padded is not None
    assert padded["context"].shape == (2, 5, WIDTH)


def test_some_plans_may_be_left_out() -> None:
    assert chosen(PLANS, None) == list(PLANS)
    assert [plan.name for plan in chosen(PLANS, ["large-rank-fp16", "large-retrieve-int8"])] == [
        "large-rank-fp16",
        "large-retrieve-int8",
    ]
    with pytest.raises(ConfigurationError, match="large-rank-fp17: there is no such plan; there are large-rank-fp16"):
        chosen(PLANS, ["large-rank-fp17"])
