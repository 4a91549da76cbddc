"""A model repository to measure, and requests that its users could send."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from export.__main__ import export
from export.engines import Job
from mtgr.bundle import load_bundle
from mtgr.checkpoint import Checkpoint, load_checkpoint
from mtgr.client import RecommendationRequest
from mtgr.config import ModelConfig
from mtgr.engines.compiled_network import CompiledPrecision
from mtgr.serving.server import DOOR_MODELS
from perf.record import ROOT
from perf.synthetic import save_synthetic, synthetic_checkpoint, synthetic_users

# One network for all benchmarks on a CPU, so that figures can be compared.
CONFIG = ModelConfig(
    num_layers=4, d_model=256, num_heads=4, attention_norm_length=2048, feature_dim=32, item_dim=128, head_dim=128
)


def synthetic_repository(
    folder: Path, num_users: int, context: int, seed: int, strategies: Sequence[str] = ("baseline", "onnx")
) -> Path:
    """The door with engines on a random network of ``CONFIG``; every user has ``context`` tokens.

    The checkpoint itself lies in ``folder / "checkpoint"``.
    """
    model = synthetic_checkpoint(CONFIG, num_items=20_000, seed=seed)
    users = {f"user-{index}": context for index in range(num_users)}
    return built_repository(folder, model, users, seed, strategies)


def built_repository(
    folder: Path,
    model: Checkpoint,
    users: Mapping[str, int],
    seed: int,
    strategies: Sequence[str],
    vllm: Mapping[str, Any] | None = None,
    compiled: CompiledPrecision | None = None,
) -> Path:
    """The door with engines on a network.

    Args:
        folder: Where ``checkpoint`` and ``repository`` are made. Weights are written into the first only for engines
            that read them there: a large network has no room for two.
        model: The network.
        users: Tokens of each user's context.
        seed: Of the users' events.
        strategies: Engines to export.
        vllm: Engine arguments other than the defaults; with them vLLM's answers are not checked first.
        compiled: Precision of the compiled engine as baseline; None for the eager one.

    Returns:
        The repository.
    """
    checkpoint, repository = folder / "checkpoint", folder / "repository"
    events = {user: context - len(model.schema.profile) for user, context in users.items()}
    on_disk = bool({"baseline", "onnx"} & set(strategies))
    save_synthetic(model, synthetic_users(model, events, seed), checkpoint, on_disk)
    for name in DOOR_MODELS:
        ignored = shutil.ignore_patterns("bundle*", "staging", "__pycache__")
        shutil.copytree(ROOT / "model_repository" / name, repository / name, ignore=ignored)
    exported = load_checkpoint(checkpoint) if on_disk else replace(model, hash="synthetic")
    job = Job(exported, checkpoint, repository, vllm or {}, vllm is None, compiled=compiled)
    export(job, strategies=tuple(strategies))
    return repository


def ranking_requests(repository: Path, count: int, candidates: int, seed: int) -> list[RecommendationRequest]:
    """Random users of the repository's store, each with other candidates, a minute after the user's last event."""
    bundle = load_bundle(repository)
    generator = np.random.default_rng(seed)
    store = bundle.store()
    requests = []
    for user in generator.choice(store.user_ids(), count).tolist():
        record = store.get(user)
        assert record is not None, user
        moment = int(record.times[-1]) + 60 if len(record.times) else bundle.schema.epoch
        items = generator.choice(bundle.catalog.raw_ids, candidates, replace=False)
        requests.append(RecommendationRequest(user, None, items, request_time=moment))
    return requests


def set_threads(repository: Path, threads: int) -> None:
    """Give every engine behind the door so many threads."""
    parameters = {"mtgr_baseline": "threads", "mtgr_onnx_rank": "intra_op_thread_count", "mtgr_vllm": "threads"}
    for model, parameter in parameters.items():
        config = repository / model / "config.pbtxt"
        if not config.is_file():
            continue
        text, changed = re.subn(
            rf'(key: "{parameter}" value: {{ string_value: )"1"',
            rf'\g<1>"{threads}"',
            config.read_text(encoding="utf-8"),
        )
        assert changed == 1, config
        config.write_text(text, encoding="utf-8")


def set_instances(repository: Path, model: str, count: int) -> None:
    """Serve a model of the door by several processes."""
    config = repository / model / "config.pbtxt"
    text, changed = re.subn(r"(instance_group \[ { count: )\d+", rf"\g<1>{count}", config.read_text(encoding="utf-8"))
    assert changed == 1, config
    config.write_text(text, encoding="utf-8")


def set_feature_cache(repository: Path, mib: int) -> None:
    """Let each process of ``mtgr_features`` keep so much of its users."""
    config = repository / "mtgr_features" / "config.pbtxt"
    pattern = r'(key: "cache_bytes"\s+value: { string_value: )"\d+"'
    text, changed = re.subn(pattern, rf'\g<1>"{mib << 20}"', config.read_text(encoding="utf-8"))
    assert changed == 1, config
    config.write_text(text, encoding="utf-8")
