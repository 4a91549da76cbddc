"""Rank given films for a user.

python clients/rank.py --user 196 --candidates 1,2,50,100
"""

from __future__ import annotations

import argparse
import sys

from _show import add_options, run


def item_ids(text: str) -> list[int]:
    """Comma-separated item ids as integers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of item ids such as 1,2,50") from error


def main(arguments: list[str] | None = None) -> int:
    """Run the example; returns the exit code."""
    parser = argparse.ArgumentParser(description="Rank films for a user.")
    add_options(parser)
    parser.add_argument(
        "--candidates", type=item_ids, required=True, metavar="ID,ID,...", help="item ids to rank, e.g. 1,2,50"
    )
    options = parser.parse_args(arguments)
    return run(
        options,
        lambda client: client.rank(
            options.user, options.candidates, strategy=options.strategy, request_time=options.time
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
