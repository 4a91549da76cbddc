"""``python -m export``: everything that can be exported on this machine, from checkpoint to model repository."""

from __future__ import annotations

import argparse
import filecmp
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

from export.artifacts import export_artifacts
from export.engines import EXPORTERS, Exporter, Job, installed_version
from export.install import removed_model, template_hash
from export.precision import PRECISIONS
from export.report import Exported, table
from export.vllm import parse_settings, vllm_settings
from mtgr.bundle import STORE_FILE, bundle_directory, stage_bundle
from mtgr.compat.options import parse_options
from mtgr.engines.compiled_network import CompiledPrecision
from mtgr.errors import ConfigurationError, MTGRError
from mtgr.features.catalog import CATALOG_FILE
from mtgr.loading import DEFAULT_CHECKPOINT, LoadedModel, load_model, save_converted
from mtgr.manifest import Manifest, latest_version
from mtgr.schema import SCHEMA_FILE


def main(arguments: list[str] | None = None) -> int:
    """Run the exports; 0 if all went well, 2 with one sentence if not."""
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        default=str(DEFAULT_CHECKPOINT),
        metavar="PATH_OR_ID",
        help="directory of `make train`, a checkpoint of a public format, or owner/name on the Hugging Face hub",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what a public checkpoint's tensors do not show, such as num_heads=2; may be repeated",
    )
    parser.add_argument("--fallback", type=Path, help="directory of `make train`, for when --checkpoint cannot be used")
    parser.add_argument("--converted", type=Path, default=Path("build/converted"), help="where conversions are kept")
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
    parser.add_argument(
        "--skip-vllm-check", action="store_true", help="do not start vLLM to compare what it answers with PyTorch"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of ONNX graphs and TensorRT plans; by default fp32 and fp16"
    )
    parser.add_argument(
        "--compiled",
        choices=get_args(CompiledPrecision),
        metavar="PRECISION",
        help="run mtgr_baseline on the compiled engine (own kernels, CUDA graphs) in fp32, fp16, bf16 or fp8",
    )
    parser.add_argument(
        "--force", action="store_true", help="install a low precision also if it is not close enough to fp32"
    )
    parser.add_argument(
        "--artifacts",
        type=Path,
        metavar="DIRECTORY",
        help="also write graphs, and plans where TensorRT is installed, in every precision there",
    )
    options = parser.parse_args(arguments)
    try:
        changes = parse_settings(options.vllm)
        loaded = load(options)
        job = Job(
            loaded.checkpoint,
            loaded.path,
            options.model_repository,
            changes,
            not options.skip_vllm_check,
            options.precision or "fp32",
            options.force,
            options.compiled,
            options.precision or "fp16",
        )
        # What is wrong is said before anything is made.
        if changes:
            vllm_settings(job.checkpoint, changes)
        engines = available(job, options.engine)
        if job.compiled and EXPORTERS["baseline"] not in engines:
            reason = EXPORTERS["baseline"].problem(job) or "It needs --engine baseline among the engines asked for."
            raise ConfigurationError(f"--compiled is of no use here. {reason}")
        if changes and EXPORTERS["vllm"] not in engines:
            reason = EXPORTERS["vllm"].problem(job) or "It is not among the engines asked for; add --engine vllm."
            raise ConfigurationError(f"--vllm is of no use, as vllm is not exported. {reason}")
        store = options.store or job.directory / STORE_FILE
        if options.if_stale and is_installed(job, store, engines):
            print(f"{options.model_repository} holds the engines of {job.directory} already.")
            return 0
        export(job, store, options.engine)
        if options.artifacts is not None:
            lines = []
            for line in export_artifacts(job, options.artifacts):
                print(f"{line.strategy}: {line.state}", flush=True)
                lines.append(line)
            print(f"\n{table(lines, options.model_repository)}")
    except MTGRError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    return 0


def load(options: argparse.Namespace) -> LoadedModel:
    """The checkpoint, converted into one of the project's own if it has a public format.

    Raises:
        ConfigurationError: If it cannot be loaded.
    """
    loaded = load_model(
        options.checkpoint,
        options=parse_options(options.option),
        fallback=options.fallback,
        revision=options.revision,
    )
    if loaded.report is not None:
        print(loaded.report.table())
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", options.checkpoint.strip("/"))
        loaded = save_converted(loaded, options.converted / name)
        tasks = ", ".join(loaded.checkpoint.schema.task_names)
        print(f"  its tasks are {tasks}: weigh them in the policy (routing.task_weights)")
    if loaded.report is not None or loaded.fallback is not None:
        print(loaded.used)
    return loaded


def available(job: Job, strategies: Sequence[str] | None = None) -> list[Exporter]:
    """What is asked for; by default all that this machine can export.

    Raises:
        ConfigurationError: If something is asked for that it cannot.
    """
    if strategies is None:
        return [exporter for exporter in EXPORTERS.values() if exporter.problem(job) is None]
    chosen = [EXPORTERS[name] for name in dict.fromkeys(strategies)]
    for exporter in chosen:
        problem = exporter.problem(job)
        if problem is not None:
            raise ConfigurationError(problem)
    return chosen


def export(job: Job, store: Path | None = None, strategies: Sequence[str] | None = None) -> None:
    """Install the bundle and engines into a model repository, with a line of progress for each and a table at the end.

    An engine of another checkpoint that is not exported anew is removed: it would go on ranking by the other one.

    Args:
        job: What to export.
        store: Feature store file; the checkpoint's own by default.
        strategies: What must be exported; by default whatever can be on this machine.

    Raises:
        ConfigurationError: If one of them fails; then nothing was changed.
    """
    chosen = available(job, strategies)
    lines: list[Exported] = []
    with ExitStack() as stack:  # all of it is checked before any of it is installed
        others = [line for name in EXPORTERS if EXPORTERS[name] not in chosen for line in _leave(name, job, stack)]
        print("exporting bundle of mtgr_features ...", end="", flush=True)
        stage_bundle(job.directory, store or job.directory / STORE_FILE, job.model_repository, stack)
        print(" done", flush=True)
        for exporter in chosen:
            print(f"exporting {', '.join(exporter.models_of(job))} ...", end="", flush=True)
            start = time.perf_counter()
            try:
                first, *rest = _staged(exporter, job, stack)
            except ConfigurationError as error:
                if strategies is not None or not exporter.is_optional:
                    raise
                print(f" failed: {error}", flush=True)
                others += _leave(exporter.strategy, job, stack, str(error))
                continue
            for model in set(exporter.models) - set(exporter.models_of(job)):
                if (job.model_repository / model).is_dir():  # of another checkpoint, which could do more
                    stack.enter_context(removed_model(model, job.model_repository))
            seconds = time.perf_counter() - start
            print(f" done in {seconds:.1f} s", flush=True)
            lines.append(Exported(exporter.strategy, "installed", first, seconds))
            lines += [Exported(exporter.strategy, "installed", manifest) for manifest in rest]
    print(f"\n{table([*lines, *others], job.model_repository)}")


def _staged(exporter: Exporter, job: Job, stack: ExitStack) -> list[Manifest]:
    """Its models, staged on ``stack``; if one of them fails, none is."""
    with ExitStack() as own:
        manifests = exporter.stage(job, own)
        stack.push(own.pop_all())
    return manifests


def _leave(name: str, job: Job, stack: ExitStack, reason: str = "") -> Iterator[Exported]:
    """What becomes of a strategy that is not exported: its models stay, or are removed when ``stack`` closes."""
    exporter = EXPORTERS[name]
    reason = reason or exporter.problem(job) or "not asked for"
    found = dict(_found(exporter, job.model_repository))
    for model, manifest in found.items():
        if manifest.checkpoint == job.checkpoint.hash:
            yield Exported(name, f"kept ({reason})", manifest)
        else:
            stack.enter_context(removed_model(model, job.model_repository))
            yield Exported(name, f"{model} of another checkpoint removed ({reason})")
    if not found:
        yield Exported(name, f"skipped ({reason})")


def _found(exporter: Exporter, model_repository: Path) -> Iterator[tuple[str, Manifest]]:
    """Models in the repository with their manifests; those without a usable one are never served."""
    for model in exporter.models:
        version = latest_version(model_repository / model)
        if version is None:
            continue
        try:
            yield model, Manifest.load(version)
        except ConfigurationError:
            continue


def is_installed(job: Job, store: Path, engines: Sequence[Exporter]) -> bool:
    """Whether engines and bundle come from this very checkpoint, made with today's templates, settings and versions.

    Models of engines that are not asked for may be there or not, but not of another checkpoint.
    """
    sources = [job.directory / SCHEMA_FILE, job.directory / CATALOG_FILE, store]
    targets = [bundle_directory(job.model_repository) / name for name in (SCHEMA_FILE, CATALOG_FILE, STORE_FILE)]
    others = [exporter for exporter in EXPORTERS.values() if exporter not in engines]
    try:
        return (
            all(filecmp.cmp(*pair, shallow=False) for pair in zip(sources, targets, strict=True))
            and all(_is_current(exporter, model, job) for exporter in engines for model in exporter.models_of(job))
            and all(
                manifest.checkpoint == job.checkpoint.hash
                for exporter in others
                for _, manifest in _found(exporter, job.model_repository)
            )
        )
    except (ConfigurationError, FileNotFoundError):
        return False


def _is_current(exporter: Exporter, model: str, job: Job) -> bool:
    manifest = Manifest.load(job.model_repository / model / "1")
    return (
        manifest.checkpoint == job.checkpoint.hash
        and manifest.details.get("template") == template_hash(model)
        and all(installed_version(name) == version for name, version in manifest.versions.items())
        and exporter.is_current(job, manifest)
    )


if __name__ == "__main__":
    sys.exit(main())
