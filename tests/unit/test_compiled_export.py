"""``python -m export --compiled``: what it refuses, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import export.compiled
from export.__main__ import is_installed, main
from export.compiled import compiled_problem
from export.engines import EXPORTERS, Job
from mtgr.bundle import STORE_FILE
from mtgr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mtgr.engines.compiled_network import CompiledNetwork
from mtgr.errors import ConfigurationError
from mtgr.features.sqlite import write_store
from mtgr.loading import load_model
from mtgr.manifest import Manifest
from tests.unit.foreign import research_case, write_native
from tests.unit.models import small_catalog, small_config, small_schema, spread_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    config, schema, catalog = small_config(max_positions=1024), small_schema(max_history=600), small_catalog()
    save_checkpoint(Checkpoint(spread_model(config, schema, catalog), config, schema, catalog), folder)
    write_store(folder / STORE_FILE, [])
    return folder


@pytest.fixture
def arguments(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(export.compiled, "DEVICE", "cpu")
    return ["--checkpoint", str(source), "--model-repository", str(tmp_path)]


def installed(repository: Path) -> Manifest:
    return Manifest.load(repository / "mtgr_baseline" / "1")


def config_text(repository: Path) -> str:
    return (repository / "mtgr_baseline" / "config.pbtxt").read_text(encoding="utf-8")


def test_the_variant_is_installed_and_goes_again(arguments: list[str], source: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(source)
    jobs = {name: Job(checkpoint, source, tmp_path, compiled=name) for name in (None, "fp32", "fp16")}

    def current() -> list[Any]:
        engines = [EXPORTERS["baseline"]]
        return [name for name, job in jobs.items() if is_installed(job, source / STORE_FILE, engines)]

    assert main([*arguments, "--engine", "baseline", "--compiled", "fp32"]) == 0
    manifest = installed(tmp_path)
    assert (manifest.precision, manifest.details["engine"], manifest.details["device"]) == ("fp32", "compiled", "cpu")
    assert 0 < manifest.parity["max_abs_error"] <= 1e-5
    assert 'key: "engine" value: { string_value: "compiled" }' in config_text(tmp_path)
    assert 'key: "precision" value: { string_value: "fp32" }' in config_text(tmp_path)
    assert current() == ["fp32"]
    assert main([*arguments, "--engine", "baseline"]) == 0
    assert (installed(tmp_path).details["engine"], installed(tmp_path).parity) == ("eager", {})
    assert 'key: "engine" value: { string_value: "eager" }' in config_text(tmp_path)
    assert current() == [None]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_low_precision_wants_a_gpu(
    precision: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--compiled", precision]) == 2
    error = capsys.readouterr().err
    assert f"computes in {precision} on a GPU only and this host has none; export --compiled fp32." in error
    assert error.count("\n") == 1
    assert not (tmp_path / "mtgr_baseline").exists()


def test_another_engine_alone_has_no_use_for_it(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--engine", "onnx", "--compiled", "fp32"]) == 2
    assert "needs --engine baseline" in capsys.readouterr().err


def test_foreign_networks_are_refused(tmp_path: Path) -> None:
    native = write_native(research_case(layers=1), tmp_path / "source")
    assert "runs MTGR alone" in str(compiled_problem(load_model(str(native)).checkpoint, "fp32"))


@pytest.mark.parametrize("operation", ["rank", "retrieve"])
def test_an_engine_that_is_not_close_is_not_installed(
    operation: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert main([*arguments, "--engine", "baseline"]) == 0
    before = config_text(tmp_path)
    exact = getattr(CompiledNetwork, operation)

    def wrong(self: CompiledNetwork, *rows: torch.Tensor) -> Any:
        answer = exact(self, *rows)
        return answer + 2e-5 if operation == "rank" else (answer[0], answer[1] + 1e-3)

    monkeypatch.setattr(CompiledNetwork, operation, wrong)
    assert main([*arguments, "--engine", "baseline", "--compiled", "fp32"]) == 2
    assert "was not installed: it differs from PyTorch" in capsys.readouterr().err
    assert config_text(tmp_path) == before


def test_low_precision_is_measured_against_pytorch_in_it(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the engine itself computes in any precision: the rule is tried where no GPU is."""
    monkeypatch.setattr(export.compiled, "DEVICE", "cpu")
    for precision in ("fp16", "bf16", "fp8"):
        agreement, described = export.compiled.check_compiled(load_checkpoint(source), source, precision)
        assert agreement.native_error is not None
        assert agreement.error > 1e-5
        assert agreement.problem(precision) is None, precision
        assert agreement.problem("fp32") is not None
        assert json.dumps(agreement.to_dict() | described)


def test_serving_low_precision_without_a_gpu_is_refused() -> None:
    from mtgr.engines.compiled import require_gpu

    require_gpu("fp32", "cpu")
    require_gpu("fp8", "cuda:0")
    with pytest.raises(ConfigurationError, match="on a GPU only"):
        require_gpu("bf16", "cpu")
