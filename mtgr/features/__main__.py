"""``python -m mtgr.features``: load a feature store, append events to it, and show what it holds of a user."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from mtgr.bundle import STORE_FILE, bundle_directory
from mtgr.errors import ConfigurationError, InvalidRequestError, MTGRError
from mtgr.features.parquet import read_parquet
from mtgr.features.request import MAX_USER_ID_BYTES
from mtgr.features.settings import STORE_URL_VARIABLE, open_store, store_url
from mtgr.features.sqlite import SQLiteStore
from mtgr.features.store import FeatureStore, HistoryLimit, UserRecord
from mtgr.schema import SCHEMA_FILE, Schema

T = TypeVar("T")

_TIMEOUT_SECONDS = 10.0
_BATCH = 256


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 if it went well, 1 if the user to show is not known, 2 with one sentence after an error.
    """
    options = _parser().parse_args(arguments)
    try:
        result: int = options.run(options)
    except MTGRError as error:
        print(f"mtgr.features: {error}", file=sys.stderr)
        return 2
    return result


def load(options: argparse.Namespace) -> int:
    """Replace users of a store by those of a file."""
    source = options.source or bundle_directory(options.model_repository) / STORE_FILE
    total, records = _records(source)
    store = _open(options, create=True)
    start = time.perf_counter()
    users = events = 0
    with tqdm(total=total, desc=f"loading {source}", unit=" users") as progress:
        for batch in _batches(records, _BATCH):
            store.put_many(batch)
            users += len(batch)
            events += sum(len(record.items) for _, record in batch)
            progress.update(len(batch))
    seconds = time.perf_counter() - start
    store.close()
    print(f"{users:,} users with {events:,} events in {seconds:.2f} s: {users / seconds:,.0f} users/s")
    return 0


def append(options: argparse.Namespace) -> int:
    """Add events of one user."""
    count = len(options.item)
    if len(options.action) not in (1, count):
        raise InvalidRequestError(f"--item has {count} values, --action {len(options.action)}; give one or as many.")
    actions = options.action * count if len(options.action) == 1 else options.action
    times = options.time or [int(time.time())]
    if len(times) not in (1, count):
        raise InvalidRequestError(f"--item has {count} values, --time {len(times)}; give one or as many.")
    store = _open(options)
    store.append_events(_user(options.user), options.item, actions, times * count if len(times) == 1 else times)
    store.close()
    known = _schema(options).num_actions
    if any(action >= known for action in actions):
        print(f"actions from {known} on are stored, but this model does not know them.", file=sys.stderr)
    print(f"user {options.user}: {count} {'event' if count == 1 else 'events'} appended")
    return 0


def show(options: argparse.Namespace) -> int:
    """Print a user's profile and last events."""
    store: FeatureStore
    if options.to or store_url():
        store = _open(options)
    else:
        store = SQLiteStore(bundle_directory(options.model_repository) / STORE_FILE)
    record = store.get(_user(options.user))
    store.close()
    if record is None:
        print(f"user {options.user} is not known")
        return 1
    profile = ", ".join(f"{name} {value}" for name, value in record.profile.items()) or "no profile"
    print(f"user {options.user}: {profile}; {len(record.items):,} events")
    last = slice(max(0, len(record.items) - options.events), None)
    columns = (record.items[last].tolist(), record.actions[last].tolist(), record.times[last].tolist())
    for item, action, moment in zip(*columns, strict=True):
        print(f"  {_date(moment)}  item {item:<10} action {action}")
    return 0


def _records(source: Path) -> tuple[int, Iterator[tuple[str, UserRecord]]]:
    """How many users a file holds, and their records."""
    if source.suffix == ".parquet":
        return read_parquet(source)
    store = SQLiteStore(source)
    users = store.user_ids()

    def records() -> Iterator[tuple[str, UserRecord]]:
        for user_id in users:
            record = store.get(user_id)
            if record is not None:
                yield user_id, record
        store.close()

    return len(users), records()


def _batches(values: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(values)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _open(options: argparse.Namespace, *, create: bool = False) -> FeatureStore:
    url = options.to or store_url()
    if not url:
        raise ConfigurationError(
            f"name the store with --to redis://host:port/0 or sqlite:///path, or in {STORE_URL_VARIABLE}; "
            "the one inside the model repository is read-only."
        )
    return open_store(url, HistoryLimit.of(_schema(options)), _TIMEOUT_SECONDS, create=create)


def _schema(options: argparse.Namespace) -> Schema:
    return Schema.load(bundle_directory(options.model_repository) / SCHEMA_FILE)


def _user(text: str) -> str:
    if not 1 <= len(text.encode()) <= MAX_USER_ID_BYTES or "\x00" in text:
        raise InvalidRequestError(f"--user must be 1 to {MAX_USER_ID_BYTES} bytes of text without NUL, as in requests.")
    return text


def _date(moment: int) -> str:
    try:
        return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):
        return str(moment)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mtgr.features", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--to", metavar="URL", help=f"redis://..., rediss://... or sqlite:///path; or {variable}")
        command.add_argument("--model-repository", type=Path, default=Path("model_repository"), help="for the schema")
        return command

    variable = f"{STORE_URL_VARIABLE} in the environment, where passwords belong"
    loading = add("load", load, "replace users of a store by those of a file")
    loading.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="store.sqlite, or events.parquet with columns user_id, item_id, action, time, and perhaps profile (JSON); "
        "the model repository's store by default",
    )
    appending = add("append", append, "add events of one user")
    appending.add_argument("--user", required=True)
    appending.add_argument("--item", type=int, nargs="+", required=True, help="raw item ids")
    appending.add_argument("--action", type=int, nargs="+", required=True, help="from 0; one for all, or one each")
    appending.add_argument("--time", type=int, nargs="+", help="unix seconds; one for all, or one each (default: now)")
    showing = add("show", show, "print what the store holds of a user")
    showing.add_argument("--user", required=True)
    showing.add_argument("--events", type=int, default=10, help="last events to print")
    return parser


if __name__ == "__main__":
    sys.exit(main())
