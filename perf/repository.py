"""A model repository to measure, and requests that its users could send."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.__main__ import export
from export.engines import Job
from mtgr.bundle import load_bundle
from mtgr.checkpoint import Checkpoint, load_checkpoint
from mtgr.client import RecommendationRequest
from mtgr.config import ModelConfig
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
    """The door with engines on a random network; every user has ``context`` tokens.

    The checkpoint itself lies in ``folder / "checkpoint"``.
    """
    checkpoint, repository = folder / "checkpoint", folder / "repository"
    model: Checkpoint = synthetic_checkpoint(CONFIG, num_items=20_000, seed=seed)
    save_synthetic(model, synthetic_users(model, num_users, context - len(model.schema.profile), seed), checkpoint)
    for name in DOOR_MODELS:
        ignored = shutil.ignore_patterns("bundle*", "staging", "__pycache__")
        shutil.copytree(ROOT / "model_repository" / name, repository / name, ignore=ignored)
    export(Job(load_checkpoint(checkpoint), checkpoint, repository), strategies=tuple(strategies))
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
