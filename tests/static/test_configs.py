"""Every ``config.pbtxt``: it parses, its tensors fit those of its neighbours, and its adapter reads what it names."""

from __future__ import annotations

import ast
import re
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from mtgr.client.wire import STRATEGY_OUTPUT
from mtgr.features.request import MAX_CANDIDATES
from mtgr.routing.buckets import CANDIDATE_BUCKETS, CONTEXT_BUCKETS
from mtgr.routing.policy import DEFAULT_PROFILE, load_profile, policy_file, profile_path
from mtgr.routing.strategies import STRATEGIES
from tests.conftest import DOOR_MODELS, ROOT

REPOSITORY = ROOT / "model_repository"
TEMPLATES = ROOT / "export" / "templates"
DIMENSIONS = {"width": 12, "tasks": 3, "retrieved": 1024}
ENGINE_MODELS = tuple(sorted(path.parent.name for path in TEMPLATES.glob("*/config.pbtxt")))
ALL_MODELS = (*DOOR_MODELS, *ENGINE_MODELS)
ADAPTERS = tuple(name for name in ALL_MODELS if name != "mtgr")


def directory(name: str) -> Path:
    return (REPOSITORY if name in DOOR_MODELS else TEMPLATES) / name


def config_text(name: str) -> str:
    text = (directory(name) / "config.pbtxt").read_text(encoding="utf-8")
    # `substitute` refuses a placeholder that export does not fill in.
    return text if name in DOOR_MODELS else string.Template(text).substitute(DIMENSIONS)


def config(name: str) -> Any:
    return text_format.Parse(config_text(name), pb.ModelConfig())


def tensors(entries: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Data type and dimensions by name."""
    return {entry.name: (pb.DataType.Name(entry.data_type), tuple(entry.dims)) for entry in entries}


def optional_inputs(model: Any) -> set[str]:
    return {entry.name for entry in model.input if entry.optional}


def fits(declared: tuple[int, ...], actual: tuple[int, ...]) -> bool:
    return len(declared) == len(actual) and all(
        left == right or -1 in (left, right) for left, right in zip(declared, actual, strict=True)
    )


def test_git_holds_the_door_and_no_engine() -> None:
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "model_repository"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    files = done.stdout.split()
    assert {Path(file).parts[1] for file in files} == set(DOOR_MODELS)
    assert not [file for file in files if Path(file).suffix in (".onnx", ".safetensors", ".sqlite", ".plan")]
    assert all((directory(name) / "1").is_dir() for name in ADAPTERS if config(name).backend == "python")


@pytest.mark.parametrize("name", ALL_MODELS)
def test_names_inputs_outputs_and_versions_are_explicit(name: str) -> None:
    model = config(name)
    assert model.name == name
    assert model.input
    assert model.output
    for entry in (*model.input, *model.output):
        assert entry.data_type != pb.TYPE_INVALID, entry.name
        assert entry.dims, entry.name
    for entries in (model.input, model.output):
        names = [entry.name for entry in entries]
        assert len(set(names)) == len(names)
    assert model.version_policy.WhichOneof("policy_choice") == "latest"
    assert model.version_policy.latest.num_versions >= 1
    assert model.max_batch_size > 1
    assert bool(model.platform) != bool(model.backend)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_no_absolute_paths(name: str) -> None:
    for value in re.findall(r'"([^"]*)"', config_text(name)):
        assert not value.startswith(("/", "~", "file:")), value


@pytest.mark.parametrize("name", ADAPTERS)
def test_nothing_waits_in_the_batcher_of_triton(name: str) -> None:
    """It sleeps between requests of different shapes (2.51); the router merges requests, vLLM does so itself."""
    model = config(name)
    if name == "mtgr_router":
        # What has come already comes together: one ragged input, of which no shape differs from another's.
        assert model.dynamic_batching.max_queue_delay_microseconds == 0
        assert [tensor.allow_ragged_batch and not tensor.optional for tensor in model.input] == [True]
    else:
        assert not model.HasField("dynamic_batching")
    assert model.max_batch_size >= 8  # what the router may merge
    if name == "mtgr_vllm":
        assert 1 <= int(model.parameters["max_pending"].string_value) <= 10_000


@pytest.mark.parametrize("name", ADAPTERS)
def test_models_name_their_instances(name: str) -> None:
    model = config(name)
    assert len(model.instance_group) == 1
    group = model.instance_group[0]
    assert group.count >= 1
    assert not group.gpus, "which GPUs there are is for the host to say"
    assert group.kind in ((pb.ModelInstanceGroup.KIND_CPU,) if name in DOOR_MODELS else (0, 1, 2))


def test_what_must_be_one_per_process_has_one_instance() -> None:
    assert config("mtgr_router").instance_group[0].count == 1


@pytest.mark.parametrize("name", ["mtgr_features", "mtgr_router"])
def test_users_of_different_lengths_may_share_a_batch_at_the_door(name: str) -> None:
    for entry in config(name).input:
        assert entry.allow_ragged_batch == (-1 in entry.dims), entry.name


# Rows of zeros are no request to vLLM: its adapter warms up with real ones (tests/engine).
@pytest.mark.parametrize("name", [name for name in ENGINE_MODELS if name != "mtgr_vllm"])
def test_engines_warm_up_what_they_serve(name: str) -> None:
    model = config(name)
    declared = tensors(model.input)
    optional = optional_inputs(model)
    seen = set()
    for sample in model.model_warmup:
        given = {key: (pb.DataType.Name(value.data_type), tuple(value.dims)) for key, value in sample.inputs.items()}
        assert set(declared) - optional <= set(given) <= set(declared)
        seen.add(frozenset(given))
        assert 1 <= sample.batch_size <= model.max_batch_size
        for key, (data_type, dims) in given.items():
            assert data_type == declared[key][0]
            assert fits(declared[key][1], dims)
            assert -1 not in dims
            assert dims[1] == DIMENSIONS["width"]
            assert dims[0] in (CONTEXT_BUCKETS if key == "context" else CANDIDATE_BUCKETS), "no request has this shape"
    # With and without candidates an engine computes different things: both must be warm.
    assert len(seen) == 1 + len(optional)


def ensemble_tensors() -> Iterator[tuple[str, str, str, str, str]]:
    """(``input`` or ``output``, step, tensor of the step, tensor of the ensemble, error label) of every edge."""
    for step in config("mtgr").ensemble_scheduling.step:
        for kind, edges in (("input", step.input_map), ("output", step.output_map)):
            for inner, outer in edges.items():
                yield kind, step.model_name, inner, outer, f"{step.model_name}.{inner} = {outer}"


def test_ensemble_edges_join_tensors_of_one_type_and_shape() -> None:
    door = config("mtgr")
    known = tensors(door.input)
    for kind, step, inner, outer, label in ensemble_tensors():
        model = config(step)
        declared = tensors(model.input if kind == "input" else model.output)
        assert inner in declared, label
        if kind == "output":
            assert outer not in known, f"{label}: this tensor exists already"
            known[outer] = declared[inner]
        else:
            assert outer in known, f"{label}: nothing produces this tensor"
            assert declared[inner] == known[outer], label
    for name, declared_output in tensors(door.output).items():
        assert known[name] == declared_output, name


def test_no_step_produces_a_tensor_named_like_an_input_of_the_door() -> None:
    """Triton 2.51 then returns the request's tensor as the answer, without a word."""
    produced = [outer for kind, _, _, outer, _ in ensemble_tensors() if kind == "output"]
    assert not set(produced) & set(tensors(config("mtgr").input))
    assert len(set(produced)) == len(produced)
    outputs = {entry.name for entry in config("mtgr").output}
    assert outputs <= set(produced)
    assert not outputs & set(tensors(config("mtgr").input))


def test_every_input_of_a_step_is_mapped_and_optional_exactly_where_the_door_is() -> None:
    door = config("mtgr")
    optional = optional_inputs(door)
    mapped: set[str] = set()
    for step in door.ensemble_scheduling.step:
        model = config(step.model_name)
        assert set(step.input_map) == {entry.name for entry in model.input}
        for entry in model.input:
            outer = step.input_map[entry.name]
            mapped.add(outer)
            assert entry.optional == (outer in optional), entry.name
    assert {entry.name for entry in door.input} <= mapped
    assert all(step.model_version == -1 for step in door.ensemble_scheduling.step)
    assert tuple(step.model_name for step in door.ensemble_scheduling.step) == DOOR_MODELS[1:]


def test_the_door_has_the_tensors_of_its_contract() -> None:
    door = config("mtgr")
    assert tensors(door.input) == {
        "user_id": ("TYPE_STRING", (1,)),
        "history_items": ("TYPE_INT64", (-1,)),
        "history_actions": ("TYPE_INT32", (-1,)),
        "history_times": ("TYPE_INT64", (-1,)),
        "candidates": ("TYPE_INT64", (-1,)),
        "request_time": ("TYPE_INT64", (1,)),
        "profile": ("TYPE_STRING", (1,)),
        "strategy": ("TYPE_STRING", (1,)),
        "top_k": ("TYPE_INT32", (1,)),
    }
    assert optional_inputs(door) >= set(tensors(door.input)) - {"user_id"}
    assert tensors(door.output) == {
        "items": ("TYPE_INT64", (-1,)),
        "scores": ("TYPE_FP32", (-1,)),
        "task_scores": ("TYPE_FP32", (-1, -1)),
        STRATEGY_OUTPUT: ("TYPE_STRING", (1,)),
        "arm": ("TYPE_STRING", (1,)),
        "labels": ("TYPE_STRING", (1,)),
        "explanation": ("TYPE_STRING", (1,)),
    }


RANKS = {"task_scores": "TYPE_FP32"}
RETRIEVES = {"items": "TYPE_INT32", "scores": "TYPE_FP32"}


@pytest.mark.parametrize("name", ENGINE_MODELS)
def test_engines_have_the_signature_of_their_strategy(name: str) -> None:
    strategy = next(entry for entry in STRATEGIES.values() if name in entry.models)
    model = config(name)
    does_both = strategy.rank_model == strategy.retrieve_model
    ranks, retrieves = name == strategy.rank_model, name == strategy.retrieve_model
    expected = {"context"} | ({"candidates"} if ranks else set())
    assert {entry.name for entry in model.input} == expected
    assert optional_inputs(model) == ({"candidates"} if does_both else set())
    for data_type, dims in tensors(model.input).values():
        assert data_type == "TYPE_INT32"
        assert dims[0] == -1
        assert dims[1:] in ((-1,), (DIMENSIONS["width"],))
    outputs = tensors(model.output)
    wanted = (RANKS if ranks else {}) | (RETRIEVES if retrieves else {})
    assert {key: data_type for key, (data_type, _) in outputs.items()} == wanted
    if ranks:
        assert fits(outputs["task_scores"][1], (-1, DIMENSIONS["tasks"]))
    if retrieves:
        assert outputs["items"][1] == outputs["scores"][1]
        assert fits(outputs["items"][1], (DIMENSIONS["retrieved"],))


def test_every_engine_belongs_to_a_strategy() -> None:
    models = {model for strategy in STRATEGIES.values() for model in strategy.models}
    assert set(ENGINE_MODELS) <= models
    for strategy in STRATEGIES.values():
        present = [model in ENGINE_MODELS for model in strategy.models]
        assert all(present) or not any(present), f"{strategy.name} is there by half"


DOOR_ADAPTERS = ("mtgr_features", "mtgr_router")


def test_router_parameters_are_understood_and_fit_the_engines() -> None:
    parameters = {name: value.string_value for name, value in config("mtgr_router").parameters.items()}
    # In process and in the server the same defaults hold.
    assert policy_file(parameters, {}) == profile_path(DEFAULT_PROFILE)
    assert {name for name in DOOR_ADAPTERS if "profile" in config(name).parameters} == set(DOOR_ADAPTERS)
    settings = load_profile(DEFAULT_PROFILE).routing
    for name in ENGINE_MODELS:
        strategy = next(entry for entry in STRATEGIES.values() if name in entry.models)
        if strategy.padded:
            assert settings.max_batch <= config(name).max_batch_size
    assert settings.rank_limit <= MAX_CANDIDATES


def source(name: str) -> ast.Module:
    return ast.parse((directory(name) / "1" / "model.py").read_text(encoding="utf-8"))


def calls(tree: ast.Module, function: str) -> set[str]:
    """First string arguments of every call of ``function``, a name or an attribute's name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called == function and isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    return found


def constant(tree: ast.Module, name: str) -> tuple[str, ...]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return tuple(ast.literal_eval(node.value))
    raise AssertionError(f"there is no {name}")


@pytest.mark.parametrize("name", ["mtgr_features", "mtgr_baseline"])
def test_adapters_read_all_inputs_of_their_config(name: str) -> None:
    assert constant(source(name), "INPUTS") == tuple(entry.name for entry in config(name).input)


def test_the_router_reads_the_one_output_of_feature_extraction() -> None:
    (packed,) = config("mtgr_features").output
    (read,) = config("mtgr_router").input
    assert (packed.name, packed.data_type, list(packed.dims)) == (read.name, read.data_type, list(read.dims))


@pytest.mark.parametrize("name", ["mtgr_features", "mtgr_router"])
def test_adapters_write_all_outputs_of_their_config(name: str) -> None:
    made = calls(source(name), "Tensor") | calls(source(name), "_text")  # the router's short way to a tensor of text
    assert made == {entry.name for entry in config(name).output}


@pytest.mark.parametrize("name", [name for name in ADAPTERS if (directory(name) / "1" / "model.py").is_file()])
def test_adapters_name_no_device_and_assert_nothing(name: str) -> None:
    text = (directory(name) / "1" / "model.py").read_text(encoding="utf-8")
    assert not re.search(r"cuda:\d", text)
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, ast.Assert)
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None)
    for path in re.findall(r'"(/[^"\s]*)"', text):
        raise AssertionError(f"absolute path {path}")


def test_the_door_runs_without_torch() -> None:
    """Its two stubs would spend seconds and hundreds of megabytes on PyTorch, and have no use for it."""
    modules = set()
    for name in DOOR_MODELS[1:]:
        for node in ast.walk(source(name)):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module or "")
    ours = sorted(module for module in modules if module.split(".")[0] == "mtgr")
    assert ours
    assert not {module.split(".")[0] for module in modules} & {"torch", "onnxruntime"}
    code = f"import sys, {', '.join(ours)}; sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or f"one of {ours} imports torch"
