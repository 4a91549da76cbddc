"""The GPU benchmark where there is no GPU: every section runs on tiny shapes, and nothing measured is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtgr.kernels.dense_configs import DenseConfig, DenseKey
from perf import gpu
from perf.gpu_attention import Problem
from perf.gpu_measure import Ceilings, Figure, interleaved, largest_difference


def section(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_every_section(tmp_path: Path) -> None:
    """Times, floors and errors by the rule, of all that the table is to have."""
    arguments = ["--out", str(tmp_path), "--here", "--quick", *(f"--section={name}" for name in gpu.SECTIONS)]
    assert gpu.main(arguments) == 0
    names: dict[str, list[str]] = {}
    for name in gpu.SECTIONS:
        found = section(tmp_path, name)
        assert "error" not in found
        assert not [one["name"] for one in found["figures"] if one["holds"] is False]
        names[name] = [one["name"] for one in found["figures"]]
        for one in found["figures"]:
            if one["samples_ms"]:
                assert one["p50_ms"] > 0
                assert one["floor_ms"] is None or one["ratio_to_floor"] > 0
    kernels = {f"silu {mask} {precision}" for mask in ("causal", "mtgr") for precision in ("bf16", "fp8")}
    kernels |= {"silu mtgr bias bf16", "silu mtgr paged bf16"}
    assert {*kernels, "softmax causal flash", "softmax causal cudnn"} == set(names["attention"])
    assert {"HSTU", "Transformer eager, flash", "  of a block: attention"} <= set(names["stack"])
    assert {"compiled bf16", "compiled fp8"} <= set(names["model"])


def test_a_section_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path), "--quick", "--section", "memory", "--seed", "3"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["origin"]["seed"] == 3
    assert found["origin"]["versions"]["torch"] == torch.__version__
    assert found["sections"]["memory"]["status"] == "ok"
    assert len(found["sections"]["memory"]["figures"]) == 3
    assert found["ceilings"]["bandwidth"] > 0


def test_choices_can_be_pasted_into_the_table(tmp_path: Path) -> None:
    """Of causal attention and MTGR's mask, the latter's."""
    key, first, last = DenseKey(64, torch.bfloat16, 90, 4096), *(DenseConfig("pointers", n, 64, 4, 2) for n in (32, 64))
    figures = [Figure("attention", "", "", chosen=(key, config)).to_dict() for config in (first, last)]
    gpu._write_defaults([*figures, Figure("attention", "", "").to_dict()], tmp_path / gpu.DEFAULTS)
    assert (tmp_path / gpu.DEFAULTS).read_text(encoding="utf-8") == f"    {key!r}: {last!r},\n"


def test_what_fails_later_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(ceilings: Ceilings, is_small: bool, seed: int) -> Iterator[Figure]:
        yield Figure("memory", "first", "", samples_ms=[2.0], floor_ms=1.0, flops=4e9, peak=4e12)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "section_of", lambda name: failing)
    assert gpu.main(["--out", str(tmp_path), "--here", "--quick", "--section", "memory"]) == 1
    found = section(tmp_path, "memory")
    assert found["error"] == "RuntimeError: out of memory"
    (figure,) = found["figures"]
    assert (figure["p50_ms"], figure["ratio_to_floor"], figure["tflops"]) == (2.0, 2.0, 2.0)
    assert figure["share_of_peak"] == pytest.approx(0.5)


def test_an_error_beyond_the_rule_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(ceilings: Ceilings, is_small: bool, seed: int) -> Iterator[Figure]:
        yield Figure("check", "kernel", "", error=2.0, allowed=1.0)

    monkeypatch.setattr(gpu, "section_of", lambda name: wrong)
    assert gpu.main(["--out", str(tmp_path), "--here", "--quick", "--section", "check"]) == 1
    assert section(tmp_path, "check")["figures"][0]["holds"] is False
    assert largest_difference(torch.tensor([float("nan")]), torch.zeros(1)) == float("inf")


def test_work_is_that_of_visible_pairs() -> None:
    sequences = [(5, 9, 3), (20, 7, 0), (0, 4, 1)]
    pairs = 0
    for static, context, candidates in sequences:
        pairs += sum(max(token + 1, min(static, context)) for token in range(context)) + candidates * (context + 1)
    problem = Problem(sequences, 2, 32, torch.float32)
    assert problem.pairs == pairs
    assert problem.flops == 4 * pairs * 2 * 32
    assert problem.moved("fp32") == 4 * 4 * problem.tokens * 64


def test_rivals_are_timed_in_turn() -> None:
    order: list[str] = []
    found = interleaved({name: lambda name=name: order.append(name) for name in "ab"})
    assert sorted(found) == order == ["a", "b"]
    assert all(len(samples) == 1 for samples in found.values())
