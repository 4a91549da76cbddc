"""What the example clients share: options, the table, and errors as one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from mtgr.client import MTGRClient, Recommendation
from mtgr.data.dataset import Item
from mtgr.data.movielens import MovieLens100K
from mtgr.errors import MTGRError

TASKS = ("engagement", "retention", "monetization")
LONGEST_TEXT = 44


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every example takes."""
    parser.add_argument("--user", required=True, metavar="ID", help="user id, e.g. 196")
    parser.add_argument("--strategy", default="auto", help="baseline, onnx, tensorrt, vllm or auto (default)")
    parser.add_argument("--time", type=int, metavar="UNIX", help="the request's time in unix seconds (default: now)")
    parser.add_argument("--url", metavar="HOST:PORT", help="default: port 8001 (gRPC) or 8000 (HTTP) of 127.0.0.1")
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument(
        "--titles",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show MovieLens-100K's titles, years and genres beside the ids",
    )


def run(options: argparse.Namespace, call: Callable[[MTGRClient], Recommendation]) -> int:
    """Make the call and print its answer.

    Returns:
        The exit code: 0, or 2 after one sentence on stderr that says what went wrong.
    """
    try:
        with MTGRClient(options.url, protocol=options.protocol, timeout=options.timeout) as client:
            answer = call(client)
    except MTGRError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(render(answer, _catalogue() if options.titles else None))
    return 0


def render(answer: Recommendation, catalogue: Mapping[int, Item] | None) -> str:
    """The answer as a table with a line on who served it; ids only if there is no catalogue."""
    num_tasks = answer.task_scores.shape[1]
    tasks = TASKS if num_tasks == len(TASKS) else tuple(f"task {index}" for index in range(num_tasks))
    described = () if catalogue is None else ("title", "year", "genres")
    header = ("rank", "item", *described, "score", *tasks)
    rows = []
    for place, (item, score, probabilities) in enumerate(
        zip(answer.items.tolist(), answer.scores.tolist(), answer.task_scores.tolist(), strict=True), start=1
    ):
        description = () if catalogue is None else _describe(catalogue.get(item))
        numbers = (f"{value:.4f}" for value in (score, *probabilities))
        rows.append((str(place), str(item), *description, *numbers))
    served = f"strategy {answer.strategy}, arm {answer.arm or '-'}, {answer.latency_ms:.1f} ms"
    if answer.labels:
        served += f" ({', '.join(answer.labels)})"
    table = _aligned(header, rows, left={"title", "genres"})
    return "\n".join([*table, "", f"{len(answer)} items, {served}"])


def _describe(item: Item | None) -> tuple[str, str, str]:
    if item is None:
        return ("?", "", "")
    return (_shortened(item.title), str(item.year or ""), _shortened(", ".join(item.categories)))


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: set[str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]


def _catalogue() -> Mapping[int, Item] | None:
    """Items by id, or None, with a note on stderr, where the data set cannot be had: the answer still counts."""
    try:
        return {item.id: item for item in MovieLens100K().items()}
    except MTGRError as error:
        print(f"note: no titles, because {error}", file=sys.stderr)
        return None
