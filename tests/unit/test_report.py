"""The last line of the table of strategies follows the policy's order."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtgr.routing.policy import POLICY_VARIABLE
from mtgr.serving.report import StrategyReport, format_reports


def report(name: str, ready: bool) -> StrategyReport:
    return StrategyReport(name, ready, f"mtgr_{name} 1", "fp32", "", "", "ready" if ready else "failed")


REPORTS = [report("baseline", True), report("onnx", True), report("tensorrt", False)]


def last_line(*reports: StrategyReport, order: tuple[str, ...] | None = None) -> str:
    return format_reports(reports, order).splitlines()[-1]


def test_the_first_ready_one_of_the_order_serves_first() -> None:
    assert last_line(*REPORTS, order=("tensorrt", "onnx", "baseline")) == "auto: onnx serves first"
    assert last_line(*REPORTS, order=("baseline", "onnx")) == "auto: baseline serves first"


def test_an_engine_outside_the_order_serves_nobody() -> None:
    assert last_line(*REPORTS, order=("tensorrt", "vllm")) == "auto: no engine is ready; run `make vllm export`"


def test_the_order_is_the_policys_of_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert last_line(*REPORTS) == "auto: onnx serves first"
    policy = tmp_path / "policy.yaml"
    policy.write_text("auto: { order: [baseline, onnx] }", encoding="utf-8")
    monkeypatch.setenv(POLICY_VARIABLE, str(policy))
    assert last_line(*REPORTS) == "auto: baseline serves first"
