"""The report says what was measured, what was not, and nothing else."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from perf.report.__main__ import charts, main, write
from perf.report.bars import Price
from perf.report.chart import few, number
from perf.report.kpi import Verdict, key_figures, load_sentence, strategy_targets
from perf.report.page import page
from perf.report.style import PALETTE, drawn_png, drawn_svg
from perf.report.summary import DIRECT, STAGES, batch_shares, compared, ratios, saturation_level, stage_shares
from perf.report.throughput import spread
from perf.results_format import CacheRatios, Gpu, Kpi, PerfResult, Point
from tests.perf_runs import DATA, two_cores, with_gpu

ALL = ["throughput", "ratios", "stages", "batches", "caches", "memory", "cost", "energy"]


def at_kpi(result: PerfResult, **values: Any) -> PerfResult:
    """The run with another point of the key figures."""
    assert result.kpi is not None
    points = list(result.points)
    points[result.kpi.point] = dataclasses.replace(points[result.kpi.point], **values)
    return dataclasses.replace(result, points=points)


def kpis(result: PerfResult) -> dict[str, Verdict]:
    return {row.name: row.verdict for row in key_figures(result)}


def test_the_key_figures_of_the_real_run() -> None:
    rows = {row.name: (row.measured, row.verdict.value) for row in key_figures(two_cores())}
    assert rows == {
        "latency p99": ("182.0 ms", "fail"),
        "throughput": ("171.5 requests/s", "pass"),
        "GPU utilization": ("not measured", "not measured"),
        "memory (host)": ("11.6%", "pass"),
        "feature cache hits": ("73.8%", "fail"),
        "errors": ("0.00%", "pass"),
    }
    assert [row.note for row in key_figures(two_cores())] == [
        "p50 27.1 ms",
        "",
        "there is no GPU, or it reports nothing",
        "2.74 of 23.5 GiB",
        "",
        "0 of 686; 95% interval 0.00% to 0.56%",
    ]
    assert "70% of the 259.4 requests/s" in load_sentence(two_cores())


@pytest.mark.parametrize(
    ("name", "values", "verdict"),
    [
        ("latency p99", {"p99": 49.9}, Verdict.PASS),
        ("latency p99", {"p99": 50.0}, Verdict.FAIL),
        ("throughput", {"throughput": 20.0}, Verdict.FAIL),
        ("GPU utilization", {"gpu": Gpu(0.79, 1, 2, None, None)}, Verdict.FAIL),
        ("GPU utilization", {"gpu": Gpu(0.80, 1, 2, None, None)}, Verdict.PASS),
        ("GPU utilization", {"gpu": Gpu(0.96, 1, 2, None, None)}, Verdict.FAIL),
        ("memory (GPU)", {"gpu": Gpu(0.9, 81, 100, None, None)}, Verdict.FAIL),
        ("memory (GPU)", {"gpu": Gpu(0.9, 79, 100, None, None)}, Verdict.PASS),
        ("memory (GPU)", {"gpu": None}, Verdict.NOT_MEASURED),
        ("feature cache hits", {"cache": CacheRatios(0.9)}, Verdict.FAIL),
        ("feature cache hits", {"cache": CacheRatios(0.901)}, Verdict.PASS),
        ("feature cache hits", {"cache": CacheRatios(None)}, Verdict.NOT_MEASURED),
        ("errors", {"requests": 1000, "errors": {"INTERNAL": 10}}, Verdict.FAIL),
        ("errors", {"requests": 1000, "errors": {"INTERNAL": 9}}, Verdict.PASS),
    ],
)
def test_each_key_figure_at_its_bound(name: str, values: dict[str, Any], verdict: Verdict) -> None:
    result = with_gpu()
    assert result.kpi is not None
    if "p99" in values:
        latency = result.points[result.kpi.point].latency_ms
        values = {"latency_ms": dataclasses.replace(latency, p99=values["p99"])}
    assert kpis(at_kpi(result, **values))[name] is verdict


def test_nothing_passes_without_an_open_loop_at_seventy_percent() -> None:
    result = two_cores()
    assert result.kpi is not None
    for other in (
        dataclasses.replace(result, kpi=None),
        dataclasses.replace(result, kpi=Kpi(result.kpi.rate, 2 * result.kpi.saturation, result.kpi.point)),
        dataclasses.replace(result, kpi=dataclasses.replace(result.kpi, point=0)),
        at_kpi(result, requests=0, latency_samples_ms=[], errors={}),
    ):
        assert set(kpis(other).values()) == {Verdict.NOT_MEASURED}
        assert load_sentence(other).startswith("Not measured: ")


def test_an_open_loop_without_answers_has_no_latency_that_could_pass() -> None:
    silent = at_kpi(two_cores(), latency_samples_ms=[], requests=10, errors={"INTERNAL": 10}, throughput=0.0)
    found = kpis(silent)
    assert found["latency p99"] is Verdict.NOT_MEASURED
    assert found["throughput"] is found["errors"] is Verdict.FAIL


def test_targets_of_the_strategies_are_read_from_the_same_run() -> None:
    rows = {row.name: row for row in strategy_targets(with_gpu())}
    (door,) = (row for name, row in rows.items() if name.startswith("saturation of the door"))
    assert door.verdict is Verdict.FAIL
    assert "over 3 repeats" in door.note
    result = two_cores()
    assert [row.measured for row in strategy_targets(result)] == ["0.908", "1.144", "0.920", "0.694"]
    assert all("one repeat" in row.note for row in strategy_targets(result))
    alone = dataclasses.replace(result, points=[one for one in result.points if one.strategy == "baseline"], kpi=None)
    assert {row.verdict for row in strategy_targets(alone)} == {Verdict.NOT_MEASURED}


def test_ratios_are_of_the_same_number_of_callers() -> None:
    found = ratios(two_cores())
    assert found["onnx", 32.0, "throughput"].interval().estimate == pytest.approx(279.432 / 239.726)
    assert found["onnx", 1.0, "p50"].interval().estimate == pytest.approx(6.053 / 6.629, rel=1e-3)
    assert ("baseline", 1.0, "p50") not in found


def test_repeats_are_compared_by_their_number() -> None:
    result = with_gpu()
    onnx, baseline = result.of("onnx", "concurrency", 8.0), result.of("baseline", "concurrency", 8.0)
    whole = compared(onnx, baseline, "p50")
    shuffled = compared(onnx[::-1], baseline, "p50")
    assert whole is not None
    assert shuffled is not None
    assert shuffled.interval() == whole.interval()
    part = compared(onnx[1:], baseline[:2], "p50")
    assert part is not None
    assert part.repeats == 1
    assert compared(onnx[2:], baseline[:2], "p50") is None


def test_the_level_of_saturation_is_that_of_most_answers() -> None:
    result = two_cores()
    assert saturation_level(result, "auto") == 8.0
    assert saturation_level(result, "onnx") == 32.0
    assert saturation_level(result, "tensorrt") is None


@pytest.mark.parametrize("strategy", ["baseline", "onnx", "vllm", "auto", DIRECT])
@pytest.mark.parametrize("level", [1.0, 8.0, 32.0])
def test_stages_add_up_to_the_mean_latency(strategy: str, level: float) -> None:
    points = two_cores().of(strategy, "concurrency", level)
    stages = stage_shares(points)
    assert sum(stages.values()) == pytest.approx(points[0].latency_ms.mean)
    assert set(stages) == set(STAGES)
    assert all(value >= 0 for value in stages.values())
    # What vLLM answers is not divided; the engine called directly has no stages of the door.
    assert (stages["engine"] > 0) == ("vllm" in points[0].answered_by)
    assert (stages["features"] > 0) == (strategy != DIRECT)


def test_batch_sizes_count_requests_not_calls() -> None:
    (point,) = two_cores().of("baseline", "concurrency", 32.0)
    sizes = point.models["mtgr_baseline"].batch_sizes
    shares = batch_shares([point])
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[8] == pytest.approx(8 * sizes["8"] / sum(int(size) * count for size, count in sizes.items()))
    assert batch_shares(two_cores().of("vllm", "concurrency", 32.0)) == {}


def test_charts_without_data_say_why() -> None:
    missing = {chart.name: chart.missing for chart in charts(two_cores(), None) if chart.draw is None}
    assert list(missing) == ["cost", "energy"]
    assert "--price-per-hour" in missing["cost"]
    assert "no GPU" in missing["energy"]

    def bare(point: Point) -> Point:
        return dataclasses.replace(
            point, models={}, stages_ms={}, cache=CacheRatios(), server_memory_bytes=0, answered_by={}
        )

    result = with_gpu()
    empty = dataclasses.replace(
        result, points=[dataclasses.replace(bare(point), gpu=None) for point in result.points], memory={}
    )
    missing = {chart.name: chart.missing for chart in charts(empty, None) if chart.draw is None}
    assert list(missing) == ["stages", "batches", "caches", "memory", "cost", "energy"]
    assert "reported no power" in missing["energy"]
    nothing = dataclasses.replace(result, points=[], kpi=None)
    missing = {chart.name: chart.missing for chart in charts(nothing, Price(3.0, "USD")) if chart.draw is None}
    assert list(missing) == ALL
    assert all(text.endswith(".") for text in missing.values())
    assert page(nothing, charts(nothing, None), "run.json").count("Not drawn.") == len(ALL)


def test_memory_of_a_strategy_is_that_of_its_models() -> None:
    chart = next(chart for chart in charts(with_gpu(), None) if chart.name == "memory")
    assert "hold 0.75 GiB more" in chart.caption
    own = {(row[0], row[1].split()[0]): float(row[2]) for row in chart.table.rows if "of its models" in row[1]}
    host = {("baseline", "host"): 3.0, ("onnx", "host"): 1.5, ("vllm", "host"): 4.0}
    assert own == host | {("baseline", "GPU"): 2.0, ("onnx", "GPU"): 0.0, ("vllm", "GPU"): 64.0}
    older = dataclasses.replace(with_gpu(), memory={})
    chart = next(chart for chart in charts(older, None) if chart.name == "memory")
    assert "of its models" not in str(chart.table.rows) + chart.caption


def test_cost_and_energy_are_those_of_an_answer() -> None:
    result = with_gpu()
    tables = {chart.name: chart.table for chart in charts(result, Price(3.6, "USD"))}
    costs = {row[0]: float(row[2]) for row in tables["cost"].rows}
    rates = sorted(point.throughput for point in result.of("onnx", "concurrency", 32.0))
    assert costs["onnx"] == pytest.approx(1.0 / rates[1], rel=0.01)
    joules = {row[0]: float(row[2]) for row in tables["energy"].rows}
    point = result.of("onnx", "concurrency", 32.0)[0]
    assert joules["onnx"] == pytest.approx(410 * point.seconds / len(point.latency_samples_ms), rel=0.15)


class Outline(HTMLParser):
    """What a page refers to, its ids, and whether its tags close."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(markup)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "xlink:href"):
                self.references.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report with all charts."""
    folder = tmp_path_factory.mktemp("report")
    written = write(with_gpu(), folder, "run.json", Price(3.0, "USD"))
    assert [path.name for path in written] == ["index.html", *(f"{name}.png" for name in ALL)]
    return folder


def test_the_page_needs_nothing_but_itself(report: Path) -> None:
    outline = Outline(markup := (report / "index.html").read_text(encoding="utf-8"))
    assert not outline.open
    assert "script" not in outline.tags
    assert {reference[0] for reference in outline.references} == {"#", "d"}
    assert [reference for reference in outline.references if reference.startswith("d")] == ["data:,"]
    assert len(outline.ids) == len(set(outline.ids))
    assert {reference[1:] for reference in outline.references if reference[0] == "#"} <= set(outline.ids)
    assert set(re.findall(r"url\((.)", markup)) == {"#"}
    assert "@import" not in markup
    # Colors are variables, or the dark page would have light charts.
    drawings = re.findall(r"<svg.*?</svg>", markup, re.DOTALL)
    assert len(drawings) == 2 * len(ALL)
    assert not {light for light, _ in PALETTE.values()} & set(re.findall(r"#[0-9a-f]{6}", "".join(drawings)))


def test_the_origin_is_on_the_page() -> None:
    result = two_cores()
    markup = page(result, [], "two-cores.json")
    for said in (
        result.run.git_revision,
        "with changes on top",
        "the machine was busy before the run",
        result.run.checkpoint_version,
        result.machine.cpu,
        "onnxruntime 1.32.0",
        "mtgr_onnx_rank.intra_op_thread_count 1",
        "4,997 requests, 4,997 of them different",
        "python -m perf.run",
        "--request-count",
        "two-cores.json",
    ):
        assert said in markup


def test_names_are_not_markup() -> None:
    result = with_gpu()
    hostile = dataclasses.replace(
        result,
        machine=dataclasses.replace(result.machine, gpu='<img src=x onerror="alert(1)">'),
        versions={"<b>": "</style><script>"},
    )
    outline = Outline(page(hostile, charts(hostile, None)[-2:-1], "<i>.json"))
    assert not {"img", "script", "b", "i"} & outline.tags


def test_the_same_run_gives_the_same_drawings(report: Path) -> None:
    markup = (report / "index.html").read_text(encoding="utf-8")
    again = charts(with_gpu(), None)[1]
    assert again.draw is not None
    assert drawn_svg(again.draw, again.name, narrow=False) in markup
    assert (
        drawn_png(again.draw, f"{again.title} – preset large on NVIDIA H200")
        == (report / f"{again.name}.png").read_bytes()
    )


def test_pictures_show_every_strategy(report: Path) -> None:
    pixels = matplotlib.image.imread(report / "throughput.png")[:, :, :3]
    assert pixels.shape[1] > 1000
    for strategy in ("baseline", "onnx", "vllm", "auto", "direct-onnx"):
        tint = np.array([int(PALETTE[strategy][0][at : at + 2], 16) for at in (1, 3, 5)]) / 255
        assert (np.abs(pixels - tint).max(axis=2) < 0.02).sum() > 100, strategy


def test_the_command_writes_a_report_or_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    out.mkdir()
    (out / "energy.png").write_bytes(b"of an earlier run, on a machine that reported power")
    assert main([str(DATA), "--out", str(out), "--price-per-hour", "2.5", "--currency", "EUR"]) == 0
    assert str(out / "cost.png") in capsys.readouterr().out
    assert not (out / "energy.png").exists()
    assert "EUR per 1,000 answers" in (out / "index.html").read_text(encoding="utf-8")
    assert main([str(tmp_path / "none.json")]) == 2
    (tmp_path / "other.json").write_text('{"schema": "other"}', encoding="utf-8")
    assert main([str(tmp_path / "other.json")]) == 2
    assert "make perf" in capsys.readouterr().err
    assert main([str(DATA), "--out", str(out), "--price-per-hour", "0"]) == 2
    assert "must be positive" in capsys.readouterr().err


def test_labels_move_apart_as_little_as_it_takes() -> None:
    assert spread([0.1, 0.5, 0.9], 0.2) == [0.1, 0.5, 0.9]
    assert spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    crowded = spread([0.9, 0.95, 1.0, 1.0], 0.1)
    assert crowded == pytest.approx([0.7, 0.8, 0.9, 1.0])
    assert min(np.diff(spread([0.2, 0.21, 0.3, 0.31, 0.32], 0.1))) == pytest.approx(0.1)


def test_numbers_are_short_and_never_exponents() -> None:
    assert [number(value) for value in (0, 0.001234, 1.0, 12.34, 99.96, 123.4, 12345.0)] == [
        "0",
        "0.00123",
        "1.00",
        "12.3",
        "100",
        "123",
        "12,300",
    ]
    assert number(None) == "–"
    assert few([1, 2, 4, 8, 16]) == [1, 4, 16]
    assert few([1, 2]) == [1, 2]
