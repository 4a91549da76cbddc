"""A model that reads items' content, behind the door of a running server: every engine gives the same answer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.__main__ import main
from mtgr.bundle import STORE_FILE
from mtgr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mtgr.client import MTGRClient
from mtgr.config import Modality
from mtgr.features.modalities import ItemEmbeddings
from mtgr.features.sqlite import write_store
from mtgr.features.store import UserRecord
from mtgr.manifest import Manifest
from mtgr.pipeline import OptimizedInferencePipeline, PipelineConfig
from mtgr.serving.server import TritonServer
from tests.conftest import ROOT, copy_door
from tests.server.test_door import TOLERANCE, assert_same, scores_by_item
from tests.unit.models import DAYS, EPOCH, NUM_ACTIONS, small_catalog, small_config, small_schema, spread_model

ITEMS, TEXT_WIDTH, IMAGE_WIDTH = 200, 24, 8
REQUEST_TIME = EPOCH + 30 * 86_400
USERS = {"new": 0, "ann": 7, "ben": 64, "eve": 150}
CATALOG = small_catalog(ITEMS)
# Behind vLLM's engine stand processes of its own: without it the other two are compared.
STRATEGIES = ("baseline", "onnx", *(("vllm",) if find_spec("vllm") else ()))


def embeddings(width: int, seed: int) -> ItemEmbeddings:
    """For two items of three."""
    generator = np.random.default_rng(seed)
    ids = generator.permutation(CATALOG.raw_ids)[: len(CATALOG.raw_ids) * 2 // 3]
    return ItemEmbeddings(ids, generator.normal(size=(len(ids), width)).astype(np.float32))


CONTENT = {"text": embeddings(TEXT_WIDTH, 1), "image": embeddings(IMAGE_WIDTH, 2)}


def write_checkpoint(directory: Path) -> Path:
    """A random network with two modalities, one stored in half precision, and users with histories."""
    modalities = (Modality("text", TEXT_WIDTH, "fp16"), Modality("image", IMAGE_WIDTH))
    config = small_config(d_model=32, max_positions=1024, norm_epsilon=1e-4, retrieve_count=196, modalities=modalities)
    schema = small_schema(ITEMS, items_hash=CATALOG.hash, max_history=600)
    model = spread_model(config, schema, CATALOG, seed=4)
    assert model.embedding.item.modalities is not None
    model.embedding.item.modalities.fill(CONTENT, CATALOG)
    directory.mkdir()
    save_checkpoint(Checkpoint(model, config, schema, CATALOG), directory)
    generator = np.random.default_rng(3)
    records = []
    for user, events in USERS.items():
        times = np.sort(generator.integers(EPOCH, EPOCH + DAYS * 86_400, events))
        items = generator.choice(CATALOG.raw_ids, events)
        actions = generator.integers(0, NUM_ACTIONS, events).astype(np.int32)
        records.append((user, UserRecord({"age": 30, "gender": "F"}, items, actions, times)))
    write_store(directory / STORE_FILE, records)
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("content") / "checkpoint")


@pytest.fixture(scope="module")
def repository(source: Path) -> Path:
    """Every engine, exported by the command that users run."""
    repository = copy_door(source.with_name("repository"))
    command = [sys.executable, "-m", "export", "--checkpoint", str(source), "--model-repository", str(repository)]
    for strategy in STRATEGIES:
        command += ["--engine", strategy]
    # What the export would ask of vLLM in an engine of its own, the tests below ask of the one in the server.
    done = subprocess.run([*command, "--skip-vllm-check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return repository


@pytest.fixture(scope="module")
def client(repository: Path) -> Iterator[MTGRClient]:
    with TritonServer(repository, stop_timeout=5) as server, MTGRClient(server.grpc_url) as client:
        yield client


def test_graphs_hold_the_matrix_once_as_it_is_stored(repository: Path) -> None:
    for name in ("mtgr_onnx_rank", "mtgr_onnx_retrieve"):
        version = repository / name / "1"
        assert Manifest.load(version).parity["max_abs_error"] <= TOLERANCE
        tensors = onnx.load(version / "model.onnx").graph.initializer
        for width, kind in ((TEXT_WIDTH, onnx.TensorProto.FLOAT16), (IMAGE_WIDTH, onnx.TensorProto.FLOAT)):
            assert [tensor.data_type for tensor in tensors if list(tensor.dims) == [ITEMS, width + 1]] == [kind]


def test_engines_agree_on_rankings(client: MTGRClient) -> None:
    generator = np.random.default_rng(5)
    spreads = []
    for user in USERS:
        # Items with an embedding and without, and one that nobody knows.
        candidates = np.append(generator.choice(CATALOG.raw_ids, 60, replace=False), 10**9)
        first, *others = (
            client.rank(user, candidates, strategy=strategy, request_time=REQUEST_TIME) for strategy in STRATEGIES * 2
        )
        for other, strategy in zip(others, (STRATEGIES * 2)[1:], strict=True):  # the second time contexts are cached
            assert other.strategy == strategy
            assert_same(first, other)
        spreads.append(first.task_scores.std(axis=0).min())
    assert min(spreads) >= 0.05


def test_engines_agree_on_recommendations(client: MTGRClient) -> None:
    for user in USERS:
        first, *others = (
            client.recommend(user, strategy=strategy, top_k=10, request_time=REQUEST_TIME) for strategy in STRATEGIES
        )
        assert len(first) == 10
        for other in others:
            assert_same(first, other)


def test_content_decides_what_is_answered(client: MTGRClient, source: Path) -> None:
    """The same network with projections of zero misses the tolerance a hundredfold: no engine left the content out."""
    checkpoint = load_checkpoint(source)
    with torch.no_grad():
        for module in checkpoint.model.embedding.item.modalities.embeddings():
            module.project.weight.zero_()
    without = source.with_name("without")
    without.mkdir()
    save_checkpoint(checkpoint, without)
    repository = copy_door(source.with_name("without-repository"))
    arguments = ["--checkpoint", str(without), "--model-repository", str(repository), "--engine", "baseline"]
    assert main([*arguments, "--store", str(source / STORE_FILE)]) == 0
    candidates = CATALOG.raw_ids[:40]
    with OptimizedInferencePipeline(PipelineConfig(repository)) as pipeline:
        for user in USERS:
            other = scores_by_item(
                pipeline.infer_recommendations(
                    user, candidates=candidates, request_time=REQUEST_TIME, use_optimization="baseline"
                )
            )
            for strategy in STRATEGIES:
                answer = client.rank(user, candidates, strategy=strategy, request_time=REQUEST_TIME)
                missed = [np.abs(scores - other[item]).max() for item, scores in scores_by_item(answer).items()]
                assert np.median(missed) > 100 * TOLERANCE
