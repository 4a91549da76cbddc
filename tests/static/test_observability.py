"""Rules, dashboard and runbook: checked by promtool, and every metric that they name is one that something exports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "mtgr.json"
RUNBOOK = ROOT / "docs" / "runbook"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))

# Labels have such names too.
METRIC = re.compile(r'\b(?:mtgr|nv|envoy|node)_[A-Za-z0-9_]+\b(?!=~?"|!=")')
# As Triton documents them (docs/user_guide/metrics.md of triton-inference-server/server): a host
# without a GPU has none of them.
GPU_SERIES = {
    "nv_gpu_utilization": 0.93,
    "nv_gpu_memory_total_bytes": 150754820096,
    "nv_gpu_memory_used_bytes": 135679338086,
    "nv_gpu_power_usage": 512.5,
    "nv_gpu_power_limit": 700,
    "nv_energy_consumption": 1000,
}
GPU_METRICS = frozenset(GPU_SERIES)

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed; `make test` installs it where it may"
)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)


def rules() -> list[dict[str, Any]]:
    return [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]


ALERTS = [rule for rule in rules() if "alert" in rule]


def dashboard_queries() -> list[tuple[str, str]]:
    """Panel and expression of every query."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", ())]


@promtool
def test_rules_and_configuration_are_valid(tmp_path: Path) -> None:
    done = run("check", "rules", *RULES)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run("check", "config", PROMETHEUS / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(RULES[0].read_text(encoding="utf-8").replace("expr: ", "expr: ) ", 1), encoding="utf-8")
    assert run("check", "rules", wrong).returncode != 0


@promtool
@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_else_do_not(path: Path) -> None:
    done = run("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_and_a_page() -> None:
    names = [alert["alert"] for alert in ALERTS]
    assert len(set(names)) == len(names) >= 20
    tested = {name for path in TESTS for name in re.findall(r'alertname="(\w+)"', path.read_text(encoding="utf-8"))}
    assert tested == set(names)
    assert {page.stem for page in RUNBOOK.glob("MTGR*.md")} == set(names)
    for alert in ALERTS:
        assert alert["annotations"]["runbook"] == f"docs/runbook/{alert['alert']}.md"
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"]["summary"].endswith(".")
        page = (RUNBOOK / f"{alert['alert']}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {alert['alert']}\n")
        for heading in ("## What it means", "## Look at", "## Do"):
            assert heading in page, (alert["alert"], heading)


def exported_names() -> set[str]:
    """Names in the sources, each as the series that Prometheus makes of it."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "mtgr").rglob("*.py"))
    names = set(re.findall(r'"(mtgr_[a-z_]+)"', text))
    return names | {f"{name}_{part}" for name in names for part in ("bucket", "sum", "count")}


@pytest.mark.parametrize(
    "text",
    [
        *(pytest.param(rule["expr"], id=rule.get("alert") or rule["record"]) for rule in rules()),
        pytest.param(" ".join(expression for _, expression in dashboard_queries()), id="dashboard"),
        *(pytest.param(path.read_text(encoding="utf-8"), id=path.stem) for path in sorted(RUNBOOK.glob("*.md"))),
    ],
)
def test_our_metrics_exist_in_the_sources(text: str) -> None:
    """Those of Triton, Envoy and the machine are checked on running ones (tests/server/test_fleet.py)."""
    asked = {name for name in METRIC.findall(text) if name.startswith("mtgr_")}
    models = {"mtgr_baseline", "mtgr_features", "mtgr_router", "mtgr_vllm", "mtgr_onnx_rank", "mtgr_onnx_retrieve"}
    assert asked - models <= exported_names()


def test_recorded_names_that_are_used_are_recorded() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    texts = [rule["expr"] for rule in rules()] + [expression for _, expression in dashboard_queries()]
    used = set(re.findall(r"\bmtgr:[a-z_]+:[a-z0-9_]+\b", " ".join(texts)))
    assert used == recorded


def test_the_dashboard_is_well_formed() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (column, line)
            for column in range(place["x"], place["x"] + place["w"])
            for line in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert panel["datasource"]["uid"] == "${datasource}"
    named = {name for panel in panels for name in re.findall(r"\bMTGR[A-Z]\w+", panel.get("description", ""))}
    assert named <= {alert["alert"] for alert in ALERTS}


@promtool
def test_gpu_panels_and_alerts_have_values_where_triton_has_a_gpu(tmp_path: Path) -> None:
    """A machine without a GPU cannot show them, so promtool evaluates their queries on series as Triton names them."""
    expressions = [expression for _, expression in dashboard_queries() if GPU_METRICS & set(METRIC.findall(expression))]
    assert len(expressions) >= 4
    named = {name for expression in expressions for name in METRIC.findall(expression)}
    assert named <= GPU_METRICS
    series = [
        {
            "series": f'{name}{{instance="a", gpu_uuid="GPU-{index}"}}',
            "values": f"{value}+{value}x10" if name == "nv_energy_consumption" else f"{value}x10",
        }
        for name, value in GPU_SERIES.items()
        for index in range(2)
    ]
    checks = [
        {
            "expr": f"count({expression.replace('$__rate_interval', '2m')} > 0)",
            "eval_time": "5m",
            "exp_samples": [{"labels": "{}", "value": 2}],
        }
        for expression in expressions
    ]
    test = {
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": checks}],
    }
    path = tmp_path / "gpu.yml"
    path.write_text(yaml.safe_dump(test), encoding="utf-8")
    done = run("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_provisioning_names_what_is_there() -> None:
    folder = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text(encoding="utf-8"))["datasources"]
    assert source["type"] == "prometheus"
    (provider,) = yaml.safe_load((folder / "dashboards" / "mtgr.yml").read_text(encoding="utf-8"))["providers"]
    assert provider["options"]["path"]
