"""``python -m perf.report RESULT`` (``make report``): a run as one HTML page, and its charts as PNGs beside it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mtgr.errors import ConfigurationError, MTGRError
from perf.record import ROOT
from perf.report.bars import Price, cost_chart, energy_chart, memory_chart
from perf.report.caches import cache_chart
from perf.report.chart import Chart
from perf.report.forest import ratio_chart
from perf.report.page import page, subject
from perf.report.stages import batch_chart, stage_chart
from perf.report.style import drawn_png
from perf.report.throughput import throughput_chart
from perf.results_format import PerfResult, load


def main(arguments: list[str] | None = None) -> int:
    """Write the report; 0 if it is there, 2 with one sentence if it cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m perf.report", description=__doc__)
    parser.add_argument("result", type=Path, help="what perf.run stored")
    parser.add_argument("--out", type=Path, help="folder; by default build/report/NAME of the result")
    parser.add_argument("--price-per-hour", type=float, help="of the machine, for the cost of 1,000 requests")
    parser.add_argument("--currency", default="USD")
    options = parser.parse_args(arguments)
    out = options.out or ROOT / "build" / "report" / options.result.stem
    try:
        if options.price_per_hour is not None and not options.price_per_hour > 0:
            raise ConfigurationError("--price-per-hour must be positive; leave it out if there is no price.")
        price = Price(options.price_per_hour, options.currency) if options.price_per_hour else None
        result = load(options.result)
        for path in write(result, out, options.result.name, price):
            print(path)
    except MTGRError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def charts(result: PerfResult, price: Price | None) -> list[Chart]:
    """All charts, in the order of the page; those without data among them."""
    return [
        throughput_chart(result),
        ratio_chart(result),
        stage_chart(result),
        batch_chart(result),
        cache_chart(result),
        memory_chart(result),
        cost_chart(result, price),
        energy_chart(result),
    ]


def write(result: PerfResult, folder: Path, source: str, price: Price | None) -> Sequence[Path]:
    """Write ``index.html`` and a PNG of each chart that has data; a PNG of an earlier report that has none now goes.

    Returns:
        What was written, the page first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = charts(result, price)
    written = [_put(folder / "index.html", page(result, drawn, source).encode())]
    for chart in drawn:
        picture = folder / f"{chart.name}.png"
        if chart.draw is None:
            picture.unlink(missing_ok=True)
        else:
            written.append(_put(picture, drawn_png(chart.draw, f"{chart.title} – {subject(result)}")))
    return written


def _put(path: Path, content: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return path


if __name__ == "__main__":
    sys.exit(main())
