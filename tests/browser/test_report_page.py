"""The report in a real browser: Debian's Chromium, without a window, driven by Playwright."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from playwright.sync_api import Browser, Page, sync_playwright

from perf.report.__main__ import write
from perf.report.bars import Price
from perf.report.kpi import key_figures
from perf.report.style import PALETTE
from perf.results_format import PerfResult
from tests.perf_runs import two_cores, with_gpu

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
PHONE, DESKTOP = 390, 1200
# Marks that carry data, of every chart, at the least: strategies, numbers of callers, and points of the run.
MARKS = {
    "throughput": 2 * 6,
    "ratios": 4 * 3 * 3,
    "stages": 3 * (4 * 4 + 2),
    "batches": 3 * 4,
    "caches": 3 * 16 + 1,
    "memory": 2 * 5 + 2 * 3,
    "cost": 5,
    "energy": 5,
}

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed to look at the page with; sudo apt-get install -y chromium"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium has no sandbox for root, as whom containers of CI run.
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all charts."""
    return write(with_gpu(), tmp_path_factory.mktemp("full"), "run.json", Price(3.0, "USD"))[0]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a machine without a GPU, without a price."""
    return write(two_cores(), tmp_path_factory.mktemp("bare"), "run.json", None)[0]


class Opened:
    """A page, and what went wrong while it was opened."""

    def __init__(self, browser: Browser, path: Path, width: int, scheme: str = "light") -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()


# Of every chart that is shown: its frame, its marks, and its words, as boxes [left, top, right, bottom] in pixels.
CHARTS = """() => {
  const box = (node) => { const r = node.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const found = {};
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const shown = [...figure.querySelectorAll("svg")].filter((svg) => svg.getBoundingClientRect().height > 0);
    found[figure.dataset.chart] = shown.map((svg) => ({
      frame: box(svg),
      marks: [...svg.querySelectorAll('[id*="-mark-"]')].map(box),
      words: [...svg.querySelectorAll("text")].map((text) => [text.textContent, ...box(text)]),
      letters: Math.min(...[...svg.querySelectorAll("text")].map(
        (text) => parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a)),
    }));
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_all_charts_are_drawn_and_can_be_read(browser: Browser, full: Path, width: int, scheme: str) -> None:
    with Opened(browser, full, width, scheme) as opened:
        assert not opened.problems
        assert opened.requests == [full.as_uri()]
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        charts = opened.page.evaluate(CHARTS)
        assert list(charts) == list(MARKS)
        for name, shown in charts.items():
            assert len(shown) == 1, f"{name}: either the wide drawing or the narrow one"
            (chart,) = shown
            left, top, right, bottom = chart["frame"]
            assert right - left > 0.8 * min(width, 900)
            assert bottom - top > 80
            assert len(chart["marks"]) >= MARKS[name], name
            for mark in chart["marks"]:
                assert mark[2] - mark[0] + mark[3] - mark[1] > 0.5, f"{name}: an empty mark"
                assert left - 1 <= mark[0] <= mark[2] <= right + 1, f"{name}: a mark outside"
                assert top - 1 <= mark[1] <= mark[3] <= bottom + 1, f"{name}: a mark outside"
            assert chart["letters"] >= 10, f"{name}: letters of {chart['letters']:.1f} pixels"
            for word in chart["words"]:
                assert left - 1 <= word[1] < word[3] <= right + 1, f"{name}: '{word[0]}' is cut off"
                assert top - 1 <= word[2] < word[4] <= bottom + 1, f"{name}: '{word[0]}' is cut off"
            assert not covered(chart["words"]), name


def covered(words: list[tuple[str, float, float, float, float]]) -> list[tuple[str, str]]:
    """Pairs of words that lie on one another by more than a pixel of their boxes' edges."""
    slack = 1.5
    return [
        (a[0], b[0])
        for index, a in enumerate(words)
        for b in words[:index]
        if a[1] + slack < b[3] and b[1] + slack < a[3] and a[2] + 2 * slack < b[4] and b[2] + 2 * slack < a[4]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_picture_has_the_colors_of_every_strategy(browser: Browser, full: Path, width: int, scheme: str) -> None:
    with Opened(browser, full, width, scheme) as opened:
        for name in MARKS:
            chart = opened.page.locator(f"figure[data-chart={name}] svg:visible")
            pixels = (imread(io.BytesIO(chart.screenshot()))[:, :, :3] * 255).round()
            for part in ("paper", "ink", "baseline", "onnx", "vllm", "auto"):
                if name == "stages" and part not in ("paper", "ink"):
                    part = {"baseline": "stage-compute", "onnx": "stage-wait", "vllm": "stage-engine"}.get(
                        part, "stage-rest"
                    )
                if (name, part) in {("ratios", "baseline"), ("batches", "vllm")}:
                    continue
                tint = PALETTE[part][scheme == "dark"]
                wanted = np.array([int(tint[at : at + 2], 16) for at in (1, 3, 5)])
                near = (np.abs(pixels - wanted).max(axis=2) < 12).sum()
                assert near > 15, f"{name} has no {part} in {scheme}"


@pytest.mark.parametrize("run", [two_cores, with_gpu])
def test_the_table_of_key_figures_says_what_was_measured(
    browser: Browser, full: Path, bare: Path, run: type[PerfResult]
) -> None:
    with Opened(browser, bare if run is two_cores else full, DESKTOP) as opened:
        rows = opened.page.locator("#kpi-table tbody tr")
        cells = [rows.nth(index).locator("th, td").all_inner_texts() for index in range(rows.count())]
    signs = {"pass": "✓", "fail": "✗", "not measured": "–"}
    assert cells == [
        [row.name, row.target, row.measured, f"{signs[row.verdict.value]} {row.verdict.value}", row.note]
        for row in key_figures(run())
    ]


def test_what_was_not_measured_is_said_in_place_of_a_chart(browser: Browser, bare: Path) -> None:
    with Opened(browser, bare, DESKTOP) as opened:
        missing = opened.page.locator("p.missing")
        assert missing.all_inner_texts() == [
            "Not drawn. No price was given: pass --price-per-hour with what the machine costs an hour.",
            "Not drawn. The run's machine has no GPU, so no power was reported.",
        ]
        assert list(opened.page.evaluate(CHARTS)) == list(MARKS)[:6]


def test_everything_is_reached_by_the_keyboard(browser: Browser, full: Path) -> None:
    with Opened(browser, full, DESKTOP) as opened:
        page = opened.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.locator("a.skip").bounding_box()["x"] >= 0  # it is seen when it is reached
        number = """() => {
          const nodes = [...document.querySelectorAll("a, summary, .scroll")].filter((node) => node.checkVisibility());
          nodes.forEach((node, index) => { node.dataset.number = index; });
          return nodes.length;
        }"""
        wanted = page.evaluate(number)
        assert wanted > 2 * len(MARKS)
        reached = []
        for _ in range(wanted):
            reached.append(page.evaluate("document.activeElement.dataset.number"))
            page.keyboard.press("Tab")
        assert reached == [str(index) for index in range(wanted)]  # in the order of the page
        # Wide tables scroll under the arrow keys in browsers, too, that give scrolled boxes no focus of themselves.
        assert page.locator(".scroll:not([tabindex='0'])").count() == 0
        summary = page.locator("summary").first
        summary.focus()
        page.keyboard.press("Enter")
        table = page.locator("details[open] table")
        assert table.is_visible()
        assert "onnx, 8 callers" in table.inner_text()


def test_it_is_printed_light_and_whole(browser: Browser, full: Path) -> None:
    with Opened(browser, full, DESKTOP, "dark") as opened:
        opened.page.emulate_media(media="print", color_scheme="dark")
        assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert opened.page.evaluate("getComputedStyle(document.querySelector('.verdict')).color") == "rgb(179, 35, 42)"
        charts = opened.page.evaluate(CHARTS)
        assert all(len(shown) == 1 for shown in charts.values())
        assert len(opened.page.pdf()) > 50_000
