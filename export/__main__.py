"""``python -m export``: everything that can be exported on this machine, from checkpoint to model repository."""

from __future__ import annotations

import argparse
import filecmp
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from export.engines import EXPORTERS, Exporter, Job, installed_version
from export.install import template_hash
from export.report import Exported, table
from export.vllm import parse_settings, vllm_settings
from mtgr.bundle import STORE_FILE, bundle_directory, stage_bundle
from mtgr.checkpoint import load_checkpoint
from mtgr.errors import ConfigurationError, MTGRError
from mtgr.features.catalog import CATALOG_FILE
from mtgr.manifest import Manifest
from mtgr.schema import SCHEMA_FILE


def main(arguments: list[str] | None = None) -> int:
    """Run the exports; 0 if all went well, 2 with one sentence if not."""
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/checkpoint"), help="directory of `make train`")
    parser.add_argument("--model-repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--store", type=Path, help="feature store file; the checkpoint's own by default")
    parser.add_argument("--if-stale", action="store_true", help="do nothing if this checkpoint is installed already")
    parser.add_argument(
        "--engine", action="append", choices=list(EXPORTERS), help="may be repeated; by default all that can run here"
    )
    parser.add_argument(
        "--vllm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an engine argument of vLLM, such as block_size=32; may be repeated",
    )
    options = parser.parse_args(arguments)
    try:
        job = Job(
            load_checkpoint(options.checkpoint),
            options.checkpoint,
            options.model_repository,
            parse_settings(options.vllm),
        )
        vllm_settings(job.checkpoint, job.vllm)  # a wrong one is refused before anything is made
        store = options.store or options.checkpoint / STORE_FILE
        engines = available(options.engine)
        if options.if_stale and is_installed(job, store, engines):
            print(f"{options.model_repository} holds the engines of {options.checkpoint} already.")
            return 0
        export(job, store, options.engine)
    except MTGRError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    return 0


def available(strategies: Sequence[str] | None = None) -> list[Exporter]:
    """What is asked for; by default all that this machine can export."""
    if strategies is not None:
        return [EXPORTERS[name] for name in dict.fromkeys(strategies)]
    return [exporter for exporter in EXPORTERS.values() if exporter.problem() is None]


def export(job: Job, store: Path | None = None, strategies: Sequence[str] | None = None) -> None:
    """Install the bundle and engines into a model repository, with a line of progress for each and a table at the end.

    Args:
        job: What to export.
        store: Feature store file; the checkpoint's own by default.
        strategies: What must be exported; by default whatever can be on this machine.

    Raises:
        ConfigurationError: If one of them fails; then nothing was changed.
    """
    chosen = available(strategies)
    lines: list[Exported] = []
    with ExitStack() as stack:  # all of it is checked before any of it is installed
        print("exporting bundle of mtgr_features ...", end="", flush=True)
        stage_bundle(job.directory, store or job.directory / STORE_FILE, job.model_repository, stack)
        print(" done", flush=True)
        for exporter in chosen:
            print(f"exporting {', '.join(exporter.models)} ...", end="", flush=True)
            start = time.perf_counter()
            manifests = exporter.stage(job, stack)
            seconds = time.perf_counter() - start
            print(f" done in {seconds:.1f} s", flush=True)
            lines += [Exported(exporter.strategy, "installed", manifest, seconds) for manifest in manifests]
    lines += [Exported(name, _left_out(EXPORTERS[name], job)) for name in EXPORTERS if EXPORTERS[name] not in chosen]
    print(f"\n{table(lines, job.model_repository)}")


def _left_out(exporter: Exporter, job: Job) -> str:
    """Why a strategy was not exported, and what stands in its place."""
    reason = exporter.problem() or "not asked for"
    for model in exporter.models:
        try:
            manifest = Manifest.load(job.model_repository / model / "1")
        except (ConfigurationError, FileNotFoundError):
            continue
        if manifest.checkpoint != job.checkpoint.hash:
            reason += f" The {model} that is installed is of another checkpoint, {manifest.checkpoint[:12]}."
    return reason


def is_installed(job: Job, store: Path, engines: Sequence[Exporter]) -> bool:
    """Whether engines and bundle come from this very checkpoint, made with today's templates, settings and versions."""
    sources = [job.directory / SCHEMA_FILE, job.directory / CATALOG_FILE, store]
    targets = [bundle_directory(job.model_repository) / name for name in (SCHEMA_FILE, CATALOG_FILE, STORE_FILE)]
    try:
        same_files = all(filecmp.cmp(*pair, shallow=False) for pair in zip(sources, targets, strict=True))
        return same_files and all(_is_current(exporter, job) for exporter in engines)
    except (ConfigurationError, FileNotFoundError):
        return False


def _is_current(exporter: Exporter, job: Job) -> bool:
    for model in exporter.models:
        manifest = Manifest.load(job.model_repository / model / "1")
        details = {"template": template_hash(model), **exporter.details(job)}
        if (
            manifest.checkpoint != job.checkpoint.hash
            or any(installed_version(name) != version for name, version in manifest.versions.items())
            or any(manifest.details.get(name) != value for name, value in details.items())
        ):
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
