"""Recommend films to a user: the server retrieves candidates and ranks them.

python clients/recommend.py --user 196 --top-k 10
"""

from __future__ import annotations

import argparse
import sys

from _show import add_options, run


def main(arguments: list[str] | None = None) -> int:
    """Run the example; returns the exit code."""
    parser = argparse.ArgumentParser(description="Recommend films to a user.")
    add_options(parser)
    parser.add_argument("--top-k", type=int, default=10, metavar="N", help="most films to show (default 10)")
    options = parser.parse_args(arguments)
    return run(
        options,
        lambda client: client.recommend(
            options.user, top_k=options.top_k, strategy=options.strategy, request_time=options.time
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
