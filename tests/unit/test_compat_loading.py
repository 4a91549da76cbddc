"""The loader: formats are recognised, every tensor is accounted for, nothing is run, and what is used is said."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mtgr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mtgr.compat import hub
from mtgr.compat.tensors import read_tensors
from mtgr.config import ModelConfig
from mtgr.errors import ConfigurationError, InvalidRequestError
from mtgr.features.request import parse_request
from mtgr.loading import create_mtgr_model, load_model, save_converted
from mtgr.schema import Schema
from tests.unit.foreign import (
    Case,
    nvidia_case,
    random_visitor,
    research_case,
    rows_of,
    stu_case,
    write_native,
    write_safetensors,
)
from tests.unit.models import small_catalog, small_config, small_schema, spread_model

CASES: dict[str, Callable[[], Case]] = {
    "research": lambda: research_case(layers=1),
    "dlrmv3": lambda: stu_case(layers=1),
    "easy_rec": lambda: stu_case(layers=1, easy_rec=True),
    "nvidia": lambda: nvidia_case(layers=1),
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the project."""
    directory = tmp_path_factory.mktemp("own") / "checkpoint"
    directory.mkdir()
    config, schema, catalog = small_config(), small_schema(), small_catalog()
    save_checkpoint(Checkpoint(spread_model(config, schema, catalog), config, schema, catalog), directory)
    return directory


def with_state(case: Case, state: dict[str, Any], **options: Any) -> Case:
    import dataclasses

    return dataclasses.replace(case, state=state, options=case.options | options)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_used_or_named(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    loaded = load_model(write_native(case, tmp_path / "source"))
    report = loaded.report
    assert report is not None
    assert sum(group.tensors for group in report.groups) + len(report.unused) == len(case.state)
    assert sum(group.numbers for group in report.groups) == sum(
        value.size for entry, value in case.state.items() if entry not in report.unused
    )
    for group in report.groups:
        assert group.name in report.table()
    assert loaded.used == f"using the public checkpoint {tmp_path / 'source'} ({case.format})."


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_that_is_missing_unexpected_or_of_a_wrong_shape_is_named(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    norm = next(entry for entry in case.state if entry.endswith(("_o.bias", "_input_norm_bias", "layernorm_bias")))
    wrong = {
        "missing": ({entry: value for entry, value in case.state.items() if entry != norm}, f"{norm} is missing"),
        "unexpected": (case.state | {"_similarity.weight": np.zeros(3, np.float32)}, "_similarity.weight is not known"),
        "shape": (case.state | {norm: np.zeros(3, np.float32)}, rf"{norm} has shape \[3\]"),
        "finite": (case.state | {norm: case.state[norm] * np.float32("nan")}, f"{norm} is not finite"),
    }
    for kind, (state, message) in wrong.items():
        source = write_safetensors(with_state(case, state), tmp_path / kind)
        with pytest.raises(ConfigurationError, match=f"looks like {case.format}, but does not fit: .*{message}"):
            load_model(source)


@pytest.mark.parametrize("name", CASES)
def test_what_no_tensor_shows_must_be_given(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    source = write_safetensors(case, tmp_path / "source")
    left = {key: value for key, value in case.options.items() if key != "num_heads"}
    (source / "mtgr.json").write_text(json.dumps(left))
    with pytest.raises(ConfigurationError, match=r"give num_heads: .*mtgr.json beside the checkpoint, or use --option"):
        load_model(source)
    assert load_model(source, options={"num_heads": case.options["num_heads"]}).model.config.num_heads > 1
    with pytest.raises(ConfigurationError, match="num_heads is 7, which does not divide"):
        load_model(source, options={"num_heads": 7})
    with pytest.raises(ConfigurationError, match=f"{case.format} checkpoints have no option 'heads'"):
        load_model(source, options={"num_heads": case.options["num_heads"], "heads": 2})


def test_heads_are_read_off_the_name_that_metas_trainer_gives(tmp_path: Path) -> None:
    case = research_case()
    source = write_native(case, tmp_path / "source")
    (source / "mtgr.json").unlink()
    path = source / "HSTU-b2-h2-dqk5-dv4-lsilud0.2-ad0.0_DotProduct_local_ssl-t0.05-n128-b128-lr0.001_ep100"
    (source / "model.pt").rename(path)
    config = load_model(path).model.config
    assert (config.num_heads, config.dqk, config.dv) == (2, 5, 4)
    assert config.max_history == 60 - 11  # the trainer keeps positions for ten items to come, and one


def test_a_format_nobody_knows_is_refused(tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(2)}, tmp_path / "bert.pt")
    with pytest.raises(
        ConfigurationError, match=r"its tensors are called encoder.weight, ...; known are meta-research,"
    ):
        load_model(tmp_path / "bert.pt")


class _Payload:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_checkpoint_that_carries_code_is_refused_and_does_not_run(writer: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    state = {name: torch.from_numpy(value) for name, value in research_case().state.items()}
    held = {"model_state_dict": state, "optimizer_state_dict": _Payload(ran)}
    path = tmp_path / "model.pt"
    if writer == "torch":
        torch.save(held, path)
    else:
        path.write_bytes(pickle.dumps(held))
    with pytest.raises(ConfigurationError, match="cannot be read without running code in it"):
        load_model(path)
    assert not ran.exists()
    # It is the loader that protects, not the payload that fails.
    with path.open("rb") as file:
        (torch.load(file, weights_only=False) if writer == "torch" else pickle.load(file))  # noqa: S301
    assert ran.exists()


@pytest.mark.parametrize("damage", [b"", b"not a file", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_damaged_files_are_one_sentence(damage: bytes, tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.pt"):
        (tmp_path / name).write_bytes(damage)
        with pytest.raises(ConfigurationError):
            load_model(tmp_path / name)


def test_a_distributed_checkpoint_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "__0_0.distcp").write_bytes(b"x")
    (tmp_path / "model" / ".metadata").write_bytes(b"x")
    with pytest.raises(ConfigurationError, match="dcp_to_torch_save"):
        load_model(tmp_path / "model")


def test_several_files_are_not_guessed_at(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ConfigurationError, match=r"holds a\.pt, b\.pt; name one of them"):
        load_model(tmp_path)


def test_interleaved_actions_are_a_variant_that_is_named(tmp_path: Path) -> None:
    """Their tensors have the same names; only the shape of one tells."""
    case = stu_case(easy_rec=True)
    name = "_hstu_transducer._input_preprocessor._batched_contextual_linear_bias"
    state = case.state | {name: case.state[name][:, None]}
    with pytest.raises(ConfigurationError, match="this checkpoint interleaves items and actions"):
        load_model(write_safetensors(with_state(case, state), tmp_path / "source"))


def test_ratings_are_a_variant_that_is_named(tmp_path: Path) -> None:
    case = research_case()
    state = case.state | {"_input_features_preproc._rating_emb.weight": np.zeros((5, 4), np.float32)}
    with pytest.raises(ConfigurationError, match="this checkpoint reads ratings"):
        load_model(write_safetensors(with_state(case, state), tmp_path / "source"))


def test_dynamic_tables_are_read_and_missing_ids_are_zeros(tmp_path: Path) -> None:
    """NVIDIA's items usually lie in ``dynamicemb_module``: keys and rows, a pair of files for each rank."""
    case = nvidia_case(contextual=(), actions=0)
    items = "_embedding_collection._model_parallel_embedding_collection.embeddings.item.weight"
    table = case.state[items]
    source = write_native(with_state(case, {k: v for k, v in case.state.items() if k != items}), tmp_path / "source")
    folder = source / "dynamicemb_module" / "model"
    folder.mkdir(parents=True)
    order = np.random.default_rng(0).permutation(len(table))
    for rank, keys in enumerate((order[:20], order[20:])):
        keys.astype("<i8").tofile(folder / f"item_emb_keys.rank_{rank}.world_size_2")
        table[keys].astype("<f4").tofile(folder / f"item_emb_values.rank_{rank}.world_size_2")
    loaded = load_model(source)
    weights = loaded.model.state_dict()["items.weight"].numpy()
    np.testing.assert_array_equal(weights[2:], table)

    keys = np.arange(0, 20, 2)
    keys.astype("<i8").tofile(folder / "item_emb_keys.rank_0.world_size_2")
    table[keys].tofile(folder / "item_emb_values.rank_0.world_size_2")
    (folder / "item_emb_keys.rank_1.world_size_2").unlink()
    thin = read_tensors(source).values["_embedding_collection.embeddings.item.weight"].numpy()
    assert thin.shape == (19, table.shape[1])
    assert not thin[1].any()
    np.testing.assert_array_equal(thin[18], table[18])


def test_packed_tables_are_told_apart_by_their_rows(tmp_path: Path) -> None:
    """NVIDIA's data-parallel tables lie in one tensor that is named after all of them."""
    case = nvidia_case()
    pre = "_embedding_collection._model_parallel_embedding_collection.embeddings."
    names = ["user_id", "age", "action"]
    packed = np.concatenate([case.state[f"{pre}{name}.weight"] for name in names])
    state = {name: value for name, value in case.state.items() if name.removeprefix(pre)[:-7] not in names}
    state["_embedding_collection._data_parallel_embedding_collection.embeddings.user_id/age/action_weights"] = (
        packed.ravel()
    )
    source = write_safetensors(with_state(case, state), tmp_path / "source")
    with pytest.raises(ConfigurationError, match="packs 3 tables into 18 rows; give packed_rows"):
        load_model(source)
    first = load_model(write_safetensors(case, tmp_path / "plain")).model.state_dict()
    second = load_model(source, options={"packed_rows": [9, 4, 5]}).model.state_dict()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0)


def test_fewer_items_can_be_served(tmp_path: Path) -> None:
    """Public tables are hashed into millions of rows, of which a catalogue fills a few."""
    for case in (stu_case(layers=1), research_case(layers=1)):
        loaded = load_model(write_safetensors(case, tmp_path / case.name), options={"num_items": 10})
        assert len(loaded.checkpoint.catalog.raw_ids) == 10
        assert loaded.checkpoint.catalog.raw_ids[0] == case.items[0]
        with pytest.raises(ConfigurationError, match="num_items is 31; the checkpoint has 30 items"):
            load_model(tmp_path / case.name, options={"num_items": 31})


def test_a_converted_checkpoint_is_the_projects_own(tmp_path: Path) -> None:
    case = research_case()
    first = save_converted(load_model(write_safetensors(case, tmp_path / "source")), tmp_path / "converted")
    second = load_model(tmp_path / "converted")
    assert second.origin == "own"
    assert second.checkpoint.record["converted"]["format"] == "meta-research"
    assert second.checkpoint.hash == first.checkpoint.hash != ""
    assert second.checkpoint.config == first.checkpoint.config
    visitor = random_visitor(case, np.random.default_rng(0), 9, 4)
    context, candidates = (torch.from_numpy(rows[None]) for rows in rows_of(second.checkpoint, visitor))
    np.testing.assert_allclose(second.model(context, candidates)[0].detach(), case.scores(visitor), atol=1e-5)
    assert set(load_file(tmp_path / "converted" / "model.safetensors")) == set(first.model.state_dict())


def test_a_ranker_says_that_it_cannot_retrieve(tmp_path: Path) -> None:
    loaded = load_model(write_safetensors(stu_case(layers=1), tmp_path / "source"))
    with pytest.raises(InvalidRequestError, match=r"\(stu\) ranks candidates and cannot retrieve items; send cand"):
        loaded.model.retrieve(torch.zeros(1, 3, 8, dtype=torch.int32))
    schema = loaded.checkpoint.schema
    assert schema.operations == ("rank",)
    assert Schema.from_dict(schema.to_dict()) == schema
    request = {"user_id": np.array([[b"a"]], dtype=object)}
    with pytest.raises(InvalidRequestError, match="candidates is missing; the installed model ranks items and cannot"):
        parse_request(request, schema, 1_700_000_000)
    retriever = load_model(write_safetensors(research_case(layers=1), tmp_path / "retriever")).checkpoint.schema
    assert "operations" not in retriever.to_dict()  # hashes of schemas stay as they were
    assert parse_request(request, retriever, 1_700_000_000).candidates is None


def test_create_uses_the_public_one_and_says_so(tmp_path: Path, own: Path) -> None:
    said: list[str] = []
    source = write_safetensors(research_case(), tmp_path / "source")
    loaded = create_mtgr_model(use_open_source=True, source=source, checkpoint=own, log=said.append)
    assert loaded.origin == "public"
    assert said == [loaded.report.table(), f"using the public checkpoint {source} (meta-research)."]  # type: ignore[union-attr]


def test_create_takes_heads_and_norm_from_a_model_config(tmp_path: Path, own: Path) -> None:
    source = write_safetensors(with_state(nvidia_case(), nvidia_case().state), tmp_path / "source")
    options = {
        key: value for key, value in nvidia_case().options.items() if key not in ("num_heads", "attention_norm_length")
    }
    (source / "mtgr.json").write_text(json.dumps(options))
    config = ModelConfig(d_model=12, num_heads=3, attention_norm_length=77)
    loaded = create_mtgr_model(True, config, source=source, checkpoint=own, log=lambda _: None)
    assert loaded.origin == "public"
    assert (loaded.model.config.num_heads, loaded.model.config.attention_norm_length) == (3, 77)  # type: ignore[union-attr]


def test_the_norm_of_a_research_checkpoint_is_its_own(tmp_path: Path, own: Path) -> None:
    """A model config always has one, and this format's is the size of its position table."""
    source = write_safetensors(research_case(), tmp_path / "source")
    config = ModelConfig(d_model=12, num_heads=2, attention_norm_length=77)
    loaded = create_mtgr_model(True, config, source=source, checkpoint=own, log=lambda _: None)
    assert loaded.report is not None
    assert loaded.model.config.attention_norm_length == 60
    assert loaded.report.notes[0].endswith("60, the size of the position table, and not by 77 (attention_norm_length)")


def test_the_projects_own_takes_no_options(own: Path) -> None:
    with pytest.raises(ConfigurationError, match="takes no options; leave them out"):
        load_model(own, options={"num_heads": 2})


@pytest.mark.parametrize("wrong", ["none", "absent", "unfit"])
def test_create_falls_back_to_the_projects_own_and_says_why(wrong: str, tmp_path: Path, own: Path) -> None:
    case = research_case()
    unfit = write_safetensors(with_state(case, case.state | {"x": np.zeros(1, np.float32)}), tmp_path / "source")
    source = {"none": None, "absent": tmp_path / "nothing", "unfit": unfit}[wrong]
    reason = {"none": "no public checkpoint was named", "absent": "does not exist", "unfit": "x is not known"}[wrong]
    said: list[str] = []
    loaded = create_mtgr_model(True, source=source, checkpoint=own, log=said.append)
    assert loaded.origin == "own"
    assert loaded.checkpoint.hash == load_checkpoint(own).hash
    assert said == [loaded.used]
    assert said[0].startswith(f"using the project's own checkpoint {own}, because ")
    assert reason in said[0]


def test_create_without_open_source_asks_nobody(tmp_path: Path, own: Path) -> None:
    loaded = create_mtgr_model(use_open_source=False, source="someone/something", checkpoint=own, log=lambda _: None)
    assert loaded.used == f"using the project's own checkpoint {own}."


def test_if_neither_can_be_loaded_both_reasons_are_given(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"a does not exist.*; and the fallback failed: there is no checkpoint in"
    ):
        create_mtgr_model(source=tmp_path / "a", checkpoint=tmp_path / "b", log=lambda _: None)


# The hub, without a network: what was downloaded before lies in a folder of the hub's layout.

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    pytest.importorskip("huggingface_hub", reason="the hub's client is an extra; without it the loader says so")
    folder = tmp_path / "hub" / "models--someone--hstu-ml-1m"
    write_safetensors(research_case(), folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hub"


def test_a_repository_that_was_downloaded_before_is_loaded_without_a_network(cache: Path) -> None:
    loaded = load_model("someone/hstu-ml-1m", cache=cache)
    assert loaded.origin == "public"
    assert loaded.used == "using the public checkpoint someone/hstu-ml-1m (meta-research)."
    assert load_model("someone/hstu-ml-1m", revision=COMMIT, cache=cache).path == loaded.path


def test_without_a_network_one_sentence_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigurationError,
        match=r"someone/else was not downloaded before, .*; go online, check its name, or give a path",
    ):
        load_model("someone/else", cache=cache)


def test_without_the_client_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(hub, "import_module", absent)
    with pytest.raises(ConfigurationError, match="huggingface_hub is not installed; run `pip install"):
        load_model("someone/else")


@pytest.mark.parametrize("text", ["build/checkpoint", "a", "a/b/c", "/a/b", "./a/b", "../x", "a b/c", "https://x/y"])
def test_paths_are_not_asked_for_on_the_hub(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    monkeypatch.setattr("mtgr.loading.download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ConfigurationError, match="does not exist; run `make train`"):
        load_model(text)
