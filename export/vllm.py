"""Export the ``vllm`` strategy: a folder in Hugging Face's style and engine arguments, checked in a running engine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from export.install import model_directory, template_hash
from export.rows import random_rows
from mtgr.checkpoint import Checkpoint
from mtgr.engines.vllm_rows import VLLMRowEngine
from mtgr.engines.vllm_settings import SETTINGS_FILE, VLLMSettings, default_settings
from mtgr.errors import ConfigurationError
from mtgr.files import write_json
from mtgr.manifest import Manifest
from mtgr.schema import FIRST_ID
from mtgr.vllm_plugin import ARCHITECTURE, MODEL_TYPE
from mtgr.vllm_plugin.versions import check_version, installed_version

MODEL = "mtgr_vllm"
TOLERANCE = 1e-5  # absolute, on probabilities and cosine similarities: another path in fp32

# Context and candidates of the requests that every export is checked on, each without and with a cached context.
SHAPES = ((1, 1), (7, 3), (64, 16), (130, 5), (200, 64), (512, 256))


def vllm_problem() -> str | None:
    """Why this machine cannot export the strategy; None if it can."""
    try:
        check_version()
    except ConfigurationError as error:
        return str(error)
    return None


def vllm_settings(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> VLLMSettings:
    """Settings for a checkpoint: defaults for its longest context, and what the user changes.

    Raises:
        ConfigurationError: If a key is unknown, a value is wrong, or a request of full length does not fit.
    """
    settings = VLLMSettings.from_dict(default_settings(checkpoint.schema).to_dict() | dict(changes))
    if settings.max_model_len <= checkpoint.schema.max_context:
        raise ConfigurationError(
            f"{SETTINGS_FILE}: max_model_len is {settings.max_model_len}; it must be above the longest context, "
            f"{checkpoint.schema.max_context}, to leave room for candidates."
        )
    return settings


def parse_settings(options: Sequence[str]) -> dict[str, Any]:
    """Changes of settings out of command line options ``KEY=VALUE``; values are JSON, or else text.

    Raises:
        ConfigurationError: If one is not of this form.
    """
    changes: dict[str, Any] = {}
    for option in options:
        name, separator, text = option.partition("=")
        if not separator or not name:
            raise ConfigurationError(f"--vllm {option}: write it as KEY=VALUE, such as block_size=32.")
        try:
            changes[name] = json.loads(text)
        except json.JSONDecodeError:
            changes[name] = text
    return changes


def export_vllm(
    checkpoint: Checkpoint,
    model_repository: Path,
    stack: ExitStack,
    changes: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Manifest:
    """Stage ``mtgr_vllm`` and check it in an engine of its own.

    Args:
        checkpoint: A trained model.
        model_repository: Where the model goes.
        stack: Installs it when it closes without an error, together with whatever else it holds.
        changes: Settings other than the defaults.
        seed: Of the rows that the engine is checked on.

    Raises:
        ConfigurationError: If vLLM is missing, a setting is wrong, the network is of a kind that the plugin cannot
            serve, or the engine misses the tolerance; what was installed before stays.
    """
    check_version()
    settings = vllm_settings(checkpoint, changes or {})
    config = checkpoint.config
    if config.dqk != config.dv:
        raise ConfigurationError(
            f"vllm: keys have {config.dqk} and values {config.dv} columns per head, but the plugin's pages hold equal "
            "ones; train with dqk = dv, or export with --engine for the others."
        )
    version = stack.enter_context(model_directory(MODEL, model_repository, checkpoint))
    write_folder(checkpoint, version / settings.model)
    settings.save(version / SETTINGS_FILE)
    error = check_engine(checkpoint, version, settings, seed)
    manifest = Manifest(
        model=MODEL,
        checkpoint=checkpoint.hash,
        schema=checkpoint.schema.hash,
        precision=precision(settings),
        versions={"torch": torch.__version__, "vllm": installed_version() or ""},
        shapes={"context": ["int32", -1, -1, checkpoint.schema.width]},
        parity={"max_abs_error": error, "precision": "fp32", "shapes": [list(shape) for shape in SHAPES]},
        details={
            "retrieve_count": checkpoint.model.retrieve_count,
            "settings": settings.to_dict(),
            "template": template_hash(MODEL),
        },
    )
    manifest.save(version)
    return manifest


def write_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """Weights and description as vLLM reads them: ``model.safetensors`` and ``config.json``."""
    folder.mkdir(parents=True)
    described = {
        "model": checkpoint.config.to_dict(),
        "schema": checkpoint.schema.to_dict(),
        "num_features": checkpoint.model.embedding.item.features.shape[1],
        "model_version": checkpoint.hash,
    }
    write_json(folder / "config.json", {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "mtgr": described})
    weights = {name: tensor.contiguous() for name, tensor in checkpoint.model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")


def precision(settings: VLLMSettings) -> str:
    """Of weights and activations, in the manifests' words."""
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    return names.get(settings.dtype, "bf16" if torch.cuda.is_available() else "fp32")


def check_engine(checkpoint: Checkpoint, version: Path, settings: VLLMSettings, seed: int) -> float:
    """Largest absolute error of an engine in fp32 with a small cache, over ``SHAPES``, cold and cached.

    Raises:
        ConfigurationError: If it is above the tolerance, or the engine does not start.
    """
    pages = 2 * -(-settings.max_model_len // settings.block_size) + 1
    small = dataclasses.replace(settings, dtype="float32", num_gpu_blocks_override=pages)
    with tempfile.TemporaryDirectory() as directory:
        trial = Path(directory)
        (trial / settings.model).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(version / settings.model, trial / settings.model, copy_function=_link)
        small.save(trial / SETTINGS_FILE)
        return asyncio.run(_check(checkpoint, trial, seed))


async def _check(checkpoint: Checkpoint, trial: Path, seed: int) -> float:
    engine = await VLLMRowEngine.start(trial)
    try:
        generator = np.random.default_rng(seed)
        worst = 0.0
        for length, candidates in SHAPES:
            tokens = min(length, checkpoint.schema.max_context)
            rows = random_rows(checkpoint.schema, checkpoint.catalog, 1, tokens, candidates, generator)
            for state in ("cold", "cached"):
                error = await _error(engine, checkpoint, *rows)
                if not error <= TOLERANCE:
                    raise ConfigurationError(
                        f"{MODEL} ({state}) differs from PyTorch by {error:.1e} at {tokens} x {candidates} tokens, "
                        f"more than {TOLERANCE:.0e}; it was not installed."
                    )
                worst = max(worst, error)
        return worst
    finally:
        engine.shutdown()


async def _error(engine: VLLMRowEngine, checkpoint: Checkpoint, context: torch.Tensor, rows: torch.Tensor) -> float:
    """Largest difference of task scores, and of the similarities of what is retrieved."""
    with torch.inference_mode():
        expected = checkpoint.model(context, rows)[0].numpy()
        logits = checkpoint.model.next_item_logits(context)[0].numpy()
        wanted = checkpoint.model.retrieve(context)[1][0].numpy()
    scores = await engine.rank(context[0].numpy(), rows[0].numpy())
    items, similarities = await engine.retrieve(context[0].numpy())
    if scores.shape != expected.shape or similarities.shape != wanted.shape or len(np.unique(items)) != len(items):
        return float("inf")
    # Items of almost equal score may change places; the similarity of what stands at a place may not differ.
    found = logits[items.astype(np.int64) - FIRST_ID]
    retrieved = max(np.abs(found - wanted).max(), np.abs(similarities - wanted).max())
    return float(max(np.abs(scores - expected).max(), checkpoint.config.temperature * retrieved))


def _link(source: str, target: str) -> None:
    """Instead of a copy of the weights."""
    Path(target).symlink_to(Path(source).resolve())
