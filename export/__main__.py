"""``python -m export``: everything that can be exported on this machine, from checkpoint to model repository."""

from __future__ import annotations

import argparse
import filecmp
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import onnx
import onnxruntime
import torch

from export.baseline import export_baseline
from export.install import template_hash
from export.onnx import OPSET, export_onnx
from mtgr.bundle import STORE_FILE, bundle_directory, stage_bundle
from mtgr.checkpoint import checkpoint_hash, load_checkpoint
from mtgr.errors import ConfigurationError, MTGRError
from mtgr.features.catalog import CATALOG_FILE
from mtgr.manifest import Manifest
from mtgr.schema import SCHEMA_FILE

ENGINES = ("mtgr_baseline", "mtgr_onnx_rank", "mtgr_onnx_retrieve")


def main(arguments: list[str] | None = None) -> int:
    """Run the exports; 0 if all went well, 2 with one sentence if not."""
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/checkpoint"), help="directory of `make train`")
    parser.add_argument("--model-repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--store", type=Path, help="feature store file; the checkpoint's own by default")
    parser.add_argument("--if-stale", action="store_true", help="do nothing if this checkpoint is installed already")
    options = parser.parse_args(arguments)
    try:
        if options.if_stale and is_installed(options.checkpoint, options.model_repository, options.store):
            print(f"{options.model_repository} holds the engines of {options.checkpoint} already.")
            return 0
        export(options.checkpoint, options.model_repository, options.store)
    except MTGRError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    return 0


def export(checkpoint_directory: Path, model_repository: Path, store: Path | None = None) -> None:
    """Install bundle, ``baseline`` and ``onnx`` into a model repository, with a line of progress for each."""
    checkpoint = load_checkpoint(checkpoint_directory)
    store = store or checkpoint_directory / STORE_FILE
    with ExitStack() as stack:  # all of it is checked before any of it is installed
        steps: tuple[tuple[str, Callable[[], None]], ...] = (
            ("bundle of mtgr_features", lambda: stage_bundle(checkpoint_directory, store, model_repository, stack)),
            ("mtgr_baseline", lambda: export_baseline(checkpoint, checkpoint_directory, model_repository, stack)),
            ("mtgr_onnx_rank, mtgr_onnx_retrieve", lambda: export_onnx(checkpoint, model_repository, stack)),
        )
        for name, step in steps:
            print(f"exporting {name} ...", end="", flush=True)
            start = time.perf_counter()
            step()
            print(f" done in {time.perf_counter() - start:.1f} s", flush=True)


def is_installed(checkpoint_directory: Path, model_repository: Path, store: Path | None = None) -> bool:
    """Whether every engine and the bundle come from this very checkpoint, made with today's templates and versions.

    Raises:
        ConfigurationError: If there is no checkpoint.
    """
    expected = checkpoint_hash(checkpoint_directory)
    sources = [
        checkpoint_directory / SCHEMA_FILE,
        checkpoint_directory / CATALOG_FILE,
        store or checkpoint_directory / STORE_FILE,
    ]
    targets = [bundle_directory(model_repository) / name for name in (SCHEMA_FILE, CATALOG_FILE, STORE_FILE)]
    try:
        manifests = [Manifest.load(model_repository / name / "1") for name in ENGINES]
        same_files = all(filecmp.cmp(*pair, shallow=False) for pair in zip(sources, targets, strict=True))
    except (ConfigurationError, FileNotFoundError):
        return False
    return same_files and all(
        manifest.checkpoint == expected
        and all(installed_version(name) == version for name, version in manifest.versions.items())
        and manifest.details.get("template") == template_hash(manifest.model)
        for manifest in manifests
    )


def installed_version(name: str) -> str | None:
    """Version of a package as manifests record it; the opset is a package's version for this purpose."""
    return {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}.get(
        name, str(OPSET) if name == "opset" else None
    )


if __name__ == "__main__":
    sys.exit(main())
