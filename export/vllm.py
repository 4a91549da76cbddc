"""Export the ``vllm`` strategy: a folder in Hugging Face's style and engine arguments, checked in a running engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from export.install import model_directory, template_hash
from export.vllm_check import MODEL, SHAPES, check_engine
from mtgr.checkpoint import MODEL_FILE, Checkpoint
from mtgr.engines.vllm_settings import (
    CPU_CACHE_BYTES,
    MAX_TOKENS,
    SETTINGS_FILE,
    VLLMSettings,
    default_settings,
    kv_token_bytes,
)
from mtgr.errors import ConfigurationError
from mtgr.files import write_json
from mtgr.manifest import Manifest
from mtgr.vllm_plugin import ARCHITECTURE, MODEL_TYPE, versions
from mtgr.vllm_plugin.parallel import check_ranks

_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def vllm_problem(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> str | None:
    """Why this machine cannot export the strategy for a checkpoint, one sentence; None if it can."""
    try:
        versions.check_version()
        vllm_settings(checkpoint, changes)
    except ConfigurationError as error:
        return str(error)
    return None


def vllm_settings(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> VLLMSettings:
    """Settings for a checkpoint: defaults for its longest context, and what the user changes.

    Raises:
        ConfigurationError: If the network is of a kind that the plugin cannot serve, a key is unknown, a value is
            wrong, or a request of full length does not fit.
    """
    config, longest = checkpoint.config, checkpoint.schema.max_context
    if config.dqk != config.dv:
        raise ConfigurationError(
            f"vllm: keys have {config.dqk} and values {config.dv} columns per head, but the plugin's pages hold equal "
            "ones; train with dqk = dv, or export other engines with --engine."
        )
    if longest >= MAX_TOKENS:
        raise ConfigurationError(
            f"vllm: the longest context has {longest} tokens, but the plugin counts to {MAX_TOKENS}; train with a "
            "shorter max_history, or export other engines with --engine."
        )
    if "model" in changes:
        raise ConfigurationError("--vllm model: the export writes this folder itself; leave the option out.")
    defaults = default_settings(checkpoint.schema, min(1024, MAX_TOKENS - longest))
    settings = VLLMSettings.from_dict(defaults.to_dict() | dict(changes))
    if settings.max_model_len <= longest:
        raise ConfigurationError(
            f"{SETTINGS_FILE}: max_model_len is {settings.max_model_len}; it must be above the longest context, "
            f"{longest}, to leave room for candidates."
        )
    check_ranks(settings.tensor_parallel_size, config, SETTINGS_FILE)
    _check_memory(checkpoint, settings)
    return settings


def _check_memory(checkpoint: Checkpoint, settings: VLLMSettings) -> None:
    """See that a request of full length finds pages: vLLM would let it wait for ever, or not start."""
    pages = settings.max_pages
    if settings.num_gpu_blocks_override is not None:
        if settings.num_gpu_blocks_override < pages:
            raise ConfigurationError(
                f"{SETTINGS_FILE}: num_gpu_blocks_override is {settings.num_gpu_blocks_override}; a request of "
                f"max_model_len {settings.max_model_len} takes {pages} pages, so raise the one or lower the other."
            )
        return
    memory = settings.kv_cache_memory_bytes
    if memory is None and not torch.cuda.is_available():
        memory = CPU_CACHE_BYTES
    needed = pages * settings.block_size * _token_bytes(checkpoint, settings)
    if memory is not None and memory < needed:
        raise ConfigurationError(
            f"{SETTINGS_FILE}: kv_cache_memory_bytes is {memory}; a request of max_model_len "
            f"{settings.max_model_len} takes {needed}, so raise the one or lower the other."
        )


def _token_bytes(checkpoint: Checkpoint, settings: VLLMSettings) -> int:
    number_bytes = 4 if _precision(settings) == "fp32" else 2  # keys and values are never quantised
    return kv_token_bytes(checkpoint.config, number_bytes, settings.tensor_parallel_size)


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
    check: bool = True,
    seed: int = 0,
) -> Manifest:
    """Stage ``mtgr_vllm`` and check it in an engine of its own.

    Args:
        checkpoint: A trained model.
        model_repository: Where the model goes.
        stack: Installs it when it closes without an error, together with whatever else it holds.
        changes: Settings other than the defaults.
        check: Whether to start an engine and compare its answers with PyTorch's.
        seed: Of the rows that the engine is checked on.

    Raises:
        ConfigurationError: If vLLM is missing, a setting is wrong, the network is of a kind that the plugin cannot
            serve, or the engine misses the tolerance; what was installed before stays.
    """
    versions.check_version()
    settings = vllm_settings(checkpoint, changes or {})
    version = stack.enter_context(model_directory(MODEL, model_repository, checkpoint))
    write_folder(checkpoint, version / settings.model)
    settings.save(version / SETTINGS_FILE)
    parity: dict[str, Any] = {"checked": check}
    if check:
        print(" starting vLLM to check it ...", end="", flush=True)
        error = check_engine(checkpoint, version, settings, seed)
        parity |= {
            "max_abs_error": error,
            "precision": settings.quantization or "fp32",
            "shapes": [list(shape) for shape in SHAPES],
        }
    manifest = Manifest(
        model=MODEL,
        checkpoint=checkpoint.hash,
        schema=checkpoint.schema.hash,
        precision=precision(settings),
        versions={"torch": torch.__version__, "vllm": versions.installed_version() or ""},
        shapes={"context": ["int32", -1, -1, checkpoint.schema.width]},
        parity=parity,
        details={
            "retrieve_count": checkpoint.model.retrieve_count,
            "settings": settings.to_dict(),
            # Of keys and values, in the memory of each rank.
            "kv_bytes_per_token": _token_bytes(checkpoint, settings),
            "template": template_hash(MODEL),
        },
    )
    manifest.save(version)
    return manifest


def is_checked(manifest: Manifest) -> bool:
    """Whether the export compared an engine's answers with PyTorch's."""
    return manifest.parity.get("checked") is True


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
    save_file(weights, folder / MODEL_FILE)
    (folder / MODEL_FILE).chmod(0o644)  # safetensors writes for the owner alone; a server may run as someone else


def precision(settings: VLLMSettings) -> str:
    """Of weights and activations on this machine, in the manifests' words; ``fp8`` where the blocks' products are."""
    return settings.quantization or _precision(settings)


def _precision(settings: VLLMSettings) -> str:
    return _PRECISIONS.get(settings.dtype, "bf16" if torch.cuda.is_available() else "fp32")
