"""The compiled engine in the place of the eager one, behind the door of a running server: the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton_client
from tritonclient.utils import InferenceServerException

from export.__main__ import main
from export.requests import real_requests
from mtgr.checkpoint import load_checkpoint
from mtgr.client import MTGRClient
from mtgr.engines.baseline import BaselineEngine
from mtgr.manifest import Manifest
from mtgr.pipeline import OptimizedInferencePipeline, PipelineConfig
from mtgr.schema import SLOT_COLUMN
from mtgr.serving.server import TritonServer
from tests.conftest import copy_door
from tests.server.test_door import TOLERANCE, assert_same

REQUEST_TIME = 893_286_639
USERS = ("1", "196", "405", "655")


@pytest.fixture(scope="module")
def repository(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported by the command that users run."""
    torch.set_num_threads(1)
    repository = copy_door(tmp_path_factory.mktemp("compiled"))
    arguments = ["--checkpoint", str(checkpoint), "--model-repository", str(repository), "--engine", "baseline"]
    assert main([*arguments, "--compiled", "fp32"]) == 0
    return repository


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, stop_timeout=5) as running:
        yield running


def test_the_manifest_says_what_serves(repository: Path) -> None:
    manifest = Manifest.load(repository / "mtgr_baseline" / "1")
    assert manifest.precision == "fp32"
    assert manifest.details["engine"] == "compiled"
    assert 0 < manifest.parity["max_abs_error"] <= TOLERANCE
    assert manifest.parity["spearman"] >= 0.9999
    assert manifest.parity["requests"] == 64


def test_the_door_answers_as_the_eager_engine(repository: Path, server: TritonServer) -> None:
    """Pipelines in process run ``mtgr_baseline`` eagerly; callers at once, so that the router merges users."""
    with (
        OptimizedInferencePipeline(PipelineConfig(repository)) as pipeline,
        MTGRClient(server.grpc_url) as client,
        ThreadPoolExecutor(8) as threads,
    ):
        answers = [
            threads.submit(client.recommend, user, strategy="baseline", top_k=20, request_time=REQUEST_TIME)
            for user in USERS * 4
        ]
        for user, answer in zip(USERS * 4, answers, strict=True):
            wanted = pipeline.infer_recommendations(
                user, top_k=20, request_time=REQUEST_TIME, use_optimization="baseline"
            )
            assert answer.result().strategy == "baseline"
            assert_same(answer.result(), wanted)
            assert wanted.task_scores.std(axis=0).max() > 0.01


def test_rows_of_real_users(checkpoint: Path, server: TritonServer) -> None:
    """The model itself, on held-out requests; what only the eager engine takes is refused, so it is not that one."""
    requests = real_requests(load_checkpoint(checkpoint), count=10).held_out
    assert len(requests) == 10
    reference = BaselineEngine(checkpoint)
    with triton_client.InferenceServerClient(server.grpc_url) as client:
        for request in requests:
            rows = {"context": request.context, "candidates": request.candidates}
            found = client.infer("mtgr_baseline", tensors(rows)).as_numpy("task_scores")
            np.testing.assert_allclose(found, reference.infer(rows)["task_scores"], rtol=0, atol=TOLERANCE)
        shifted = request.context.copy()
        shifted[..., SLOT_COLUMN] += 1
        reference.infer({"context": shifted})
        with pytest.raises(InferenceServerException, match="slots 0, 1, 2"):
            client.infer("mtgr_baseline", tensors({"context": shifted}))


def tensors(rows: dict[str, np.ndarray]) -> list[triton_client.InferInput]:
    made = []
    for name, array in rows.items():
        made.append(triton_client.InferInput(name, list(array.shape), "INT32"))
        made[-1].set_data_from_numpy(np.ascontiguousarray(array, dtype=np.int32))
    return made
