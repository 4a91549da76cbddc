"""Releases: a model repository with checksums of its files, carried from an image or a job into a store of many pods.

``pack`` writes the checksums into a repository that ``python -m export`` filled, ``install`` copies it under a new
name, ``verify`` compares. The file has the format of ``sha256sum``. A release never changes once it has its name, so
that servers may read it while others are installed beside it; checksums are against accidents, they are no signature.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mtgr.bundle import load_bundle
from mtgr.errors import ConfigurationError, MTGRError

SUMS_FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_LEFT_OUT = frozenset({"__pycache__", "staging", SUMS_FILE})
_CHUNK_BYTES = 1 << 20


def pack(repository: Path) -> int:
    """Write the checksums of a model repository's files into it; how many there are.

    Raises:
        ConfigurationError: If nothing was exported into it, or it holds what cannot be carried.
    """
    load_bundle(repository)
    lines = [f"{_digest(repository / name)}  {name}\n" for name in _files(repository)]
    temporary = repository / f".{SUMS_FILE}.{os.getpid()}"
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(repository / SUMS_FILE)
    return len(lines)


def verify(release: Path) -> int:
    """Compare a release with its checksums; how many files there are.

    Raises:
        ConfigurationError: If a file is missing, changed, or not in the list.
    """
    sums = read_sums(release)
    files = set(_files(release))
    for problem, names in (("is missing", sums.keys() - files), ("is not in its list", files - sums.keys())):
        if names:
            raise ConfigurationError(f"{release}: {min(names)} {problem}; install the release again.")
    for name, expected in sums.items():
        if _digest(release / name) != expected:
            raise ConfigurationError(f"{release}: {name} is not what was packed; install the release again.")
    return len(sums)


def install(source: Path, target: Path) -> bool:
    """Copy a release to where it is not yet; False if it is there.

    Any number of processes may do so at once: each copies for itself, and the first gives its copy the name.

    Raises:
        ConfigurationError: If the source or the copy does not agree with the checksums, or another release
            stands there.
    """
    sums = read_sums(source)
    if target.exists():
        _check_same(sums, target)
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        staging.chmod(0o755)
        for name in (*sums, SUMS_FILE):
            copy = staging / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            _copy(source / name, copy)
        verify(staging)
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            _check_same(sums, target)
            return False
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def read_sums(release: Path) -> dict[str, str]:
    """The checksums by file name, as they stand in a release.

    Raises:
        ConfigurationError: If there are none, or a line is none.
    """
    path = release / SUMS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); pack the release first.") from error
    sums = {}
    for line in lines:
        found = _LINE.fullmatch(line)
        name = found.group(2) if found else ""
        if found is None or name.startswith("/") or ".." in Path(name).parts:
            raise ConfigurationError(f"{path} has a line that is no checksum: {line[:80]!r}; pack the release again.")
        sums[name] = found.group(1)
    if not sums:
        raise ConfigurationError(f"{path} is empty; pack the release again.")
    return sums


def _check_same(sums: Mapping[str, str], target: Path) -> None:
    if read_sums(target) != sums:
        raise ConfigurationError(f"{target} holds another release; give this one a name of its own.")
    verify(target)


def _files(release: Path) -> Iterator[str]:
    for path in sorted(release.rglob("*")):
        name = path.relative_to(release)
        if _LEFT_OUT.intersection(name.parts) or name.parts[0].startswith("."):
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ConfigurationError(f"{path} is neither a file nor a directory; a release has nothing else.")
        if path.is_file():
            yield name.as_posix()


def _copy(source: Path, copy: Path) -> None:
    try:
        shutil.copyfile(source, copy)
    except OSError as error:
        raise ConfigurationError(f"{source} cannot be copied to {copy} ({error.strerror}).") from error
    copy.chmod(0o644)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 2 with one sentence where something is wrong."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "pack":
            print(f"{options.release}: {pack(options.release)} files packed.")
        elif options.command == "verify":
            print(f"{options.release}: {verify(options.release)} files are as packed.")
        else:
            done = "installed" if install(options.source, options.target) else "is there already"
            print(f"{options.target}: {done}.")
    except (MTGRError, OSError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mtgr.serving.release", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("pack", "write the checksums of a model repository"),
        ("verify", "compare a release with them"),
    ):
        commands.add_parser(name, help=text).add_argument("release", type=Path)
    copying = commands.add_parser("install", help="copy a release to where it is not yet")
    copying.add_argument("source", type=Path)
    copying.add_argument("target", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
