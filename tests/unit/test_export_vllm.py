"""Export of the vllm strategy without an engine: settings, files, what is left out, removed, or refused, and the table.

vLLM counts as installed unless a test says otherwise; tests/engine runs the check in a real engine.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export import vllm_check
from export.__main__ import available, export, is_installed, main
from export.engines import EXPORTERS, Job
from export.fp8 import fp8_in_pytorch
from export.report import Exported, table
from export.rows import random_rows
from export.vllm import export_vllm, parse_settings, vllm_problem, vllm_settings
from mtgr.bundle import STORE_FILE
from mtgr.checkpoint import load_checkpoint
from mtgr.config import ModelConfig
from mtgr.engines.vllm_settings import VLLMSettings, default_settings
from mtgr.errors import ConfigurationError
from mtgr.manifest import MANIFEST_FILE, Manifest
from mtgr.schema import FIRST_ID, Schema
from mtgr.vllm_plugin import versions
from tests.unit.test_export import SCHEMA, fingerprint, make_checkpoint, one_thread

__all__ = ["one_thread"]

LONGEST = SCHEMA.max_context
VERSION = "0.28.0"


@pytest.fixture(autouse=True)
def installed_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda: VERSION)


@pytest.fixture
def no_vllm(installed_vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("vllm") / "checkpoint")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("vllm") / "other", seed=1)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that the plugin cannot serve."""
    return make_checkpoint(tmp_path_factory.mktemp("vllm") / "uneven", dqk=8, dv=12)


def command(checkpoint: Path, repository: Path, *options: str) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--model-repository", str(repository), *options]


def make_job(checkpoint: Path, repository: Path, check: bool = False, **changes: Any) -> Job:
    return Job(load_checkpoint(checkpoint), checkpoint, repository, changes, check)


def installed(checkpoint: Path, repository: Path, check: bool = False, **changes: Any) -> bool:
    engines = [EXPORTERS["baseline"], EXPORTERS["vllm"]]
    return is_installed(make_job(checkpoint, repository, check, **changes), checkpoint / STORE_FILE, engines)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with baseline and vllm; tests that change it take a copy."""
    repository = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "installed_version", lambda: VERSION)
        export(make_job(checkpoint, repository, block_size=32), strategies=["baseline", "vllm"])
    return repository


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "repository"))


# --- what is written ---------------------------------------------------------------------------------------------


def test_the_folder_holds_the_checkpoint_in_the_form_vllm_reads(exported: Path, checkpoint: Path) -> None:
    expected = load_checkpoint(checkpoint)
    folder = exported / "mtgr_vllm" / "1" / "checkpoint"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    values = json.loads((folder / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == ("mtgr", ["MTGRForRecommendation"])
    assert ModelConfig.from_dict(values["mtgr"]["model"]) == expected.config
    assert Schema.from_dict(values["mtgr"]["schema"]) == SCHEMA
    assert values["mtgr"]["num_features"] == expected.catalog.features.shape[1]
    assert values["mtgr"]["model_version"] == expected.hash
    weights = load_file(folder / "model.safetensors")
    state = expected.model.state_dict()
    assert set(weights) == set(state)
    assert all(torch.equal(weights[name], state[name]) for name in state)
    assert (folder / "model.safetensors").stat().st_mode & 0o444 == 0o444  # a server may run as someone else


def test_directory_is_complete_and_holds_nothing_else(exported: Path) -> None:
    model = exported / "mtgr_vllm"
    assert sorted(path.name for path in model.iterdir()) == ["1", "config.pbtxt"]
    assert sorted(path.name for path in (model / "1").iterdir()) == [
        "checkpoint",
        "manifest.json",
        "model.json",
        "model.py",
    ]
    assert 'name: "mtgr_vllm"' in (model / "config.pbtxt").read_text()


def test_settings_are_the_defaults_but_for_what_was_changed(exported: Path) -> None:
    settings = VLLMSettings.load(exported / "mtgr_vllm" / "1" / "model.json")
    assert settings == dataclasses.replace(default_settings(SCHEMA), block_size=32)
    assert settings.max_model_len == LONGEST + 1024


def test_the_manifest_says_that_the_engine_was_not_checked(exported: Path, checkpoint: Path) -> None:
    manifest = Manifest.load(exported / "mtgr_vllm" / "1")
    assert (manifest.checkpoint, manifest.schema) == (load_checkpoint(checkpoint).hash, SCHEMA.hash)
    assert manifest.versions == {"torch": torch.__version__, "vllm": VERSION}
    assert manifest.parity == {"checked": False}
    assert manifest.details["settings"]["block_size"] == 32
    assert manifest.details["retrieve_count"] == 16


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16")])
def test_the_manifest_says_the_precision(checkpoint: Path, tmp_path: Path, dtype: str, precision: str) -> None:
    with ExitStack() as stack:
        manifest = export_vllm(load_checkpoint(checkpoint), tmp_path, stack, {"dtype": dtype}, check=False)
    assert manifest.precision == precision


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("block_size", "--vllm block_size: write it as KEY=VALUE"),
        ("=32", "--vllm =32: write it as KEY=VALUE"),
        ("block_sise=32", "'block_sise' is not a key of it; choose out of block_size, "),
        ("block_size=24", "block_size is 24; it must be one of 16, 32"),
        ("block_size=16.0", "block_size is 16.0; it must be one of"),
        ("dtype=float8", "dtype is 'float8'; it must be one of auto"),
        ("enforce_eager=False", "enforce_eager is 'False'; it must be true or false"),
        ("gpu_memory_utilization=1.5", "gpu_memory_utilization is 1.5; it must be above 0"),
        ("gpu_memory_utilization=NaN", "gpu_memory_utilization is nan"),
        ("max_num_seqs=0", "max_num_seqs is 0; it must be a positive integer"),
        ("max_num_seqs=true", "max_num_seqs is True; it must be a positive integer"),
        ("max_num_seqs=9000", "max_num_batched_tokens is 8192, less than max_num_seqs 9000"),
        ("max_num_batched_tokens=1000", "max_num_batched_tokens is 1000, less than max_model_len"),
        ("max_model_len=70000", "max_model_len is 70000; it must be at most 65535"),
        (f"max_model_len={LONGEST}", f"it must be above the longest context, {LONGEST}"),
        ("tensor_parallel_size=3", "tensor_parallel_size is 3, which does not divide the network's 2 heads"),
        ("tensor_parallel_size=true", "tensor_parallel_size is True; it must be a positive integer"),
        ("quantization=awq", "quantization is 'awq'; it must be null or \"fp8\""),
        ("kv_offload_gib=-1", "kv_offload_gib is -1; it must be 0 or a number of GiB"),
        ("kv_offload_gib=true", "kv_offload_gib is True; it must be 0 or a number of GiB"),
        ("in_process=1", "in_process is 1; it must be true or false"),
        ("model=../elsewhere", "--vllm model: the export writes this folder itself"),
        ("kv_cache_memory_bytes=1000", "kv_cache_memory_bytes is 1000; a request of max_model_len 1726 takes"),
        ("num_gpu_blocks_override=108", "num_gpu_blocks_override is 108; .* takes 109 pages"),
    ],
)
@pytest.mark.parametrize("engines", [[], ["--engine", "vllm"]], ids=["default", "asked"])
def test_a_wrong_setting_is_one_sentence_before_anything_is_made(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    message: str,
    engines: list[str],
) -> None:
    repository = tmp_path / "repository"
    assert main(command(checkpoint, repository, "--vllm", option, *engines)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    with pytest.raises(ConfigurationError, match=message):
        raise ConfigurationError(captured.err)
    assert captured.err.startswith("export: ")
    assert captured.err.count("\n") == 1
    assert "of no use" not in captured.err
    assert not repository.exists()


def test_settings_that_just_fit_are_taken(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    options = ["num_gpu_blocks_override=109", "block_size=16", "quantization=null", "dtype=float16", "max_num_seqs=7"]
    changes = parse_settings(options)
    assert changes == {
        "num_gpu_blocks_override": 109,
        "block_size": 16,
        "quantization": None,
        "dtype": "float16",
        "max_num_seqs": 7,
    }
    assert dataclasses.asdict(vllm_settings(loaded, changes)).items() >= changes.items()
    # 2 layers of keys and values, 24 wide, for 109 pages of 16 tokens
    needed = 2 * 2 * 24 * 109 * 16
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        vllm_settings(loaded, {"dtype": dtype, "kv_cache_memory_bytes": needed * width})
        with pytest.raises(ConfigurationError, match="kv_cache_memory_bytes"):
            vllm_settings(loaded, {"dtype": dtype, "kv_cache_memory_bytes": needed * width - 1})
    assert vllm_settings(loaded, {"max_model_len": LONGEST + 1}).max_model_len == LONGEST + 1


def test_a_context_beyond_the_plugin_is_refused(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    longer = dataclasses.replace(loaded, schema=dataclasses.replace(SCHEMA, max_history=65_500))
    assert "the longest context has 65602 tokens, but the plugin counts to 65535" in str(vllm_problem(longer, {}))
    fits = dataclasses.replace(loaded, schema=dataclasses.replace(SCHEMA, max_history=65_400))
    assert vllm_settings(fits, {}).max_model_len == 65_535


@pytest.mark.parametrize("version", [None, "0.25.1", "0.29.0"])
def test_a_vllm_that_is_missing_or_of_another_version_is_refused_if_asked_for(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str | None,
) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda: version)
    repository = tmp_path / "repository"
    assert main(command(checkpoint, repository, "--engine", "baseline", "--engine", "vllm")) == 2
    assert "make vllm" in capsys.readouterr().err
    assert not repository.exists()


def test_settings_for_an_engine_that_is_not_exported_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--engine", "baseline", "--vllm", "block_size=32"]
    assert main(command(checkpoint, tmp_path / "repository", *options)) == 2
    assert "--vllm is of no use" in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()


def test_a_network_of_uneven_heads_is_refused_if_asked_for(
    uneven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(uneven, tmp_path / "repository", "--engine", "vllm")) == 2
    assert "keys have 8 and values 12 columns per head" in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()


# --- what is left out --------------------------------------------------------------------------------------------


def strategies(engines: list[Any]) -> list[str]:
    return [exporter.strategy for exporter in engines]


def test_by_default_whatever_can_be_is_exported(checkpoint: Path, uneven: Path, tmp_path: Path) -> None:
    assert strategies(available(make_job(checkpoint, tmp_path))) == ["baseline", "onnx", "vllm"]
    assert strategies(available(make_job(uneven, tmp_path))) == ["baseline", "onnx"]


def test_without_vllm_the_others_are_exported_and_the_table_says_why(
    checkpoint: Path, tmp_path: Path, no_vllm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(checkpoint, tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (tmp_path / "mtgr_baseline").is_dir()
    assert not (tmp_path / "mtgr_vllm").exists()
    header, *rows = lines[next(number for number, line in enumerate(lines) if line.startswith("strategy ")) :]
    assert [row.split()[0] for row in rows if not row.startswith("tensorrt")] == ["baseline", "onnx", "onnx", "vllm"]
    assert rows[-1][header.index("state") :].startswith("skipped (vLLM is not installed; run `make vllm`")
    # And nothing is missing then.
    assert main(command(checkpoint, tmp_path, "--if-stale")) == 0
    assert "holds the engines" in capsys.readouterr().out


def test_an_engine_of_this_checkpoint_that_is_not_exported_is_kept(
    copy: Path, checkpoint: Path, no_vllm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = fingerprint(copy / "mtgr_vllm")
    export(make_job(checkpoint, copy), strategies=["baseline"])
    assert fingerprint(copy / "mtgr_vllm") == before
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[:3] == ["vllm", "mtgr_vllm", "fp32"]
    assert "not checked" in last
    assert "kept (vLLM is not installed" in last


def test_an_engine_of_another_checkpoint_that_is_not_exported_is_removed(
    copy: Path, other: Path, no_vllm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    export(make_job(other, copy), strategies=["baseline"])
    assert sorted(path.name for path in copy.iterdir()) == ["mtgr_baseline", "mtgr_features"]
    assert [path.name for path in (copy / "mtgr_features").iterdir()] == ["bundle"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert "mtgr_vllm of another checkpoint removed (vLLM is not installed" in last


def test_nothing_is_removed_by_an_export_that_fails(
    copy: Path, other: Path, no_vllm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(job: Job, stack: ExitStack) -> list[Manifest]:
        raise ConfigurationError("no.")

    monkeypatch.setitem(EXPORTERS, "onnx", dataclasses.replace(EXPORTERS["onnx"], stage=fail))
    before = fingerprint(copy)
    with pytest.raises(ConfigurationError, match="no"):
        export(make_job(other, copy))
    assert fingerprint(copy) == before


def test_a_model_without_a_usable_manifest_is_left_alone(copy: Path, other: Path, no_vllm: None) -> None:
    (copy / "mtgr_vllm" / "1" / MANIFEST_FILE).write_text("{}")
    export(make_job(other, copy), strategies=["baseline"])
    assert (copy / "mtgr_vllm" / "1" / "model.json").is_file()  # it is never served


# --- what is stale -----------------------------------------------------------------------------------------------


def test_only_the_same_settings_are_installed(exported: Path, checkpoint: Path) -> None:
    assert installed(checkpoint, exported, block_size=32)
    assert not installed(checkpoint, exported)
    assert not installed(checkpoint, exported, block_size=64)
    assert not installed(checkpoint, exported, block_size=32, max_num_seqs=8)


def test_an_engine_that_was_not_checked_is_stale_if_a_check_is_asked_for(copy: Path, checkpoint: Path) -> None:
    assert not installed(checkpoint, copy, check=True, block_size=32)
    path = copy / "mtgr_vllm" / "1" / MANIFEST_FILE
    parity = {"checked": True, "max_abs_error": 1e-7}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parity": parity}))
    assert installed(checkpoint, copy, check=True, block_size=32)
    assert installed(checkpoint, copy, check=False, block_size=32)


def test_another_version_of_vllm_is_stale(exported: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda: "0.27.1")
    assert not installed(checkpoint, exported, block_size=32)


def test_another_checkpoint_among_the_engines_not_asked_for_is_stale(copy: Path, checkpoint: Path) -> None:
    job = make_job(checkpoint, copy)
    baseline = [EXPORTERS["baseline"]]
    assert is_installed(job, checkpoint / STORE_FILE, baseline)
    path = copy / "mtgr_vllm" / "1" / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoint": "another"}))
    assert not is_installed(job, checkpoint / STORE_FILE, baseline)
    assert main(command(checkpoint, copy, "--engine", "baseline", "--if-stale")) == 0
    assert not (copy / "mtgr_vllm").exists()
    assert is_installed(job, checkpoint / STORE_FILE, baseline)


def test_command_line_exports_anew_for_other_settings(
    copy: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> str:
        engines = ["--engine", "baseline", "--engine", "vllm", "--skip-vllm-check", "--if-stale"]
        assert main(command(checkpoint, copy, *engines, *options)) == 0
        return capsys.readouterr().out

    assert "holds the engines" in run("--vllm", "block_size=32")
    assert "exporting mtgr_vllm ... done" in run("--vllm", "block_size=64", "--vllm", "max_num_seqs=16")
    settings = VLLMSettings.load(copy / "mtgr_vllm" / "1" / "model.json")
    assert (settings.block_size, settings.max_num_seqs) == (64, 16)
    assert "exporting mtgr_vllm" in run("--vllm", "block_size=64")  # max_num_seqs is the default again
    assert "holds the engines" in run("--vllm", "block_size=64")


# --- the comparison ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right(checkpoint: Path) -> tuple[Any, Any, Any]:
    """Checkpoint, request, and the answer of an engine that is right."""
    loaded = load_checkpoint(checkpoint)
    context, candidates = random_rows(SCHEMA, loaded.catalog, 1, 40, 9, np.random.default_rng(3))
    with torch.inference_mode():
        scores = loaded.model(context, candidates)[0].numpy()
        items, logits = (tensor[0].numpy() for tensor in loaded.model.retrieve(context))
    answer = vllm_check._Answer(scores, scores, items, logits, np.array([32]))
    return loaded, (context[0].numpy(), candidates[0].numpy()), answer


def test_a_right_answer_passes(right: tuple[Any, Any, Any]) -> None:
    assert right[2].first.std() >= 0.05
    assert 0 <= vllm_check._error(*right, 16, vllm_check.TOLERANCE) <= 1e-6


def _spoil(answer: Any, name: str, place: Any, value: Any) -> Any:
    array = getattr(answer, name).copy()
    array[place] = value(array[place]) if callable(value) else value
    return dataclasses.replace(answer, **{name: array})


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("first", (4, 1), lambda score: score + 3e-5, r"3\.0e-05 at 40 x 9 tokens \(cold\)"),
        ("again", (8, 2), lambda score: score - 3e-5, r"3\.0e-05 at 40 x 9 tokens \(cached\)"),
        ("again", (0, 0), np.nan, r"by inf .* \(cached\)"),
        ("logits", 15, lambda logit: logit + 1e-3, r"\(retrieved\)"),
        ("items", slice(None), lambda items: items[::-1], r"\(retrieved\)"),
        ("items", 1, lambda item: item + 1000, r"by inf .* \(retrieved\)"),
        ("items", 0, FIRST_ID - 1, r"by inf .* \(retrieved\)"),
        ("items", slice(None), lambda items: items[0], r"by inf .* \(retrieved\)"),
        ("cached", 0, 31, "found 31 of 40 context tokens in its cache"),
    ],
)
def test_a_wrong_answer_does_not_pass(
    right: tuple[Any, Any, Any], name: str, place: Any, value: Any, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        vllm_check._error(*right[:2], _spoil(right[2], name, place, value), 16, vllm_check.TOLERANCE)


def test_what_is_quantised_may_miss_as_far_as_pytorch_does(right: tuple[Any, Any, Any]) -> None:
    checkpoint, request, answer = right
    allowed = 2 * vllm_check._rounding_error(checkpoint.model, [request])
    assert 1e-3 < allowed < 0.5
    twin = fp8_in_pytorch(checkpoint.model)
    with torch.inference_mode():
        rounded = twin(*(torch.from_numpy(part)[None] for part in request))[0].numpy()
    near = dataclasses.replace(answer, first=rounded)
    assert 0 < vllm_check._error(checkpoint, request, near, 16, allowed) <= allowed / 2
    with pytest.raises(ConfigurationError, match="differs from PyTorch"):
        vllm_check._error(checkpoint, request, _spoil(near, "first", 0, lambda score: score + 2 * allowed), 16, allowed)


def test_an_answer_of_another_shape_does_not_pass(right: tuple[Any, Any, Any]) -> None:
    for name in ("first", "again", "items", "logits"):
        short = dataclasses.replace(right[2], **{name: getattr(right[2], name)[:1]})
        with pytest.raises(ConfigurationError, match="by inf"):
            vllm_check._error(*right[:2], short, 16, vllm_check.TOLERANCE)


# --- the table ---------------------------------------------------------------------------------------------------


def test_the_table_is_aligned(exported: Path) -> None:
    lines = [
        Exported("baseline", "installed", Manifest.load(exported / "mtgr_baseline" / "1"), 0.04),
        Exported("vllm", "installed", Manifest.load(exported / "mtgr_vllm" / "1"), 123.45),
        Exported("tensorrt", "skipped (there is no GPU)"),
    ]
    header, *rows = table(lines, exported).splitlines()
    names = re.split(" {2,}", header)
    assert names == ["strategy", "model", "precision", "size", "max error", "seconds", "state"]
    for start in map(header.index, names):
        assert all(row[start] != " " and (start == 0 or row[start - 2 : start] == "  ") for row in rows)
    assert [row[header.index("max error") :].split("  ")[0] for row in rows] == ["reference", "not checked", "-"]
    assert [row[header.index("seconds") :].split()[0] for row in rows] == ["0.0", "123.5", "-"]
    size = sum(path.stat().st_size for path in (exported / "mtgr_vllm").rglob("*") if path.is_file())
    assert f"{size / 1000:.3g} kB" in rows[1]
    assert rows[2].endswith("skipped (there is no GPU)")
