"""The in-process pipeline without a server: what it says when something is missing or wrong."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from export.baseline import export_baseline
from mtgr.bundle import STORE_FILE, stage_bundle
from mtgr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mtgr.errors import ConfigurationError, InvalidRequestError, UnavailableError
from mtgr.features.sqlite import write_store
from mtgr.features.store import UserRecord
from mtgr.pipeline import OptimizedInferencePipeline, PipelineConfig
from mtgr.routing.config import RoutingConfig
from mtgr.routing.policy import Policy
from tests.unit.models import EPOCH, small_catalog, small_config, small_schema, spread_model

SCHEMA = small_schema()
CATALOG = small_catalog()
NOW = EPOCH + 10_000


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = small_config()
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_checkpoint(Checkpoint(spread_model(config, SCHEMA, CATALOG), config, SCHEMA, CATALOG), directory)
    write_store(directory / STORE_FILE, [("ann", UserRecord({"age": 30}))])
    return directory


@pytest.fixture
def repository(checkpoint: Path, tmp_path: Path) -> Path:
    """A repository that holds the bundle and the baseline, as one looks while ONNX is not exported yet."""
    directory = tmp_path / "repository"
    with ExitStack() as stack:
        stage_bundle(checkpoint, checkpoint / STORE_FILE, directory, stack)
        export_baseline(load_checkpoint(checkpoint), checkpoint, directory, stack)
    return directory


def pipeline(repository: Path, **routing: object) -> OptimizedInferencePipeline:
    return OptimizedInferencePipeline(
        PipelineConfig(repository, policy=Policy("test", routing=RoutingConfig(**routing)))
    )  # type: ignore[arg-type]


def test_without_a_bundle_there_is_no_pipeline(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigurationError, match="run `make train` and `make export`"):
            pipeline(directory)


@pytest.mark.parametrize("name", ["schema.json", "catalog.safetensors", "store.sqlite"])
@pytest.mark.parametrize("content", [None, b"", b"noise"])
def test_a_damaged_bundle_is_an_error(repository: Path, name: str, content: bytes | None) -> None:
    path = repository / "mtgr_features" / "bundle" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError):
        pipeline(repository)


def test_the_baseline_serves_and_auto_finds_it(repository: Path) -> None:
    served = pipeline(repository)
    for strategy in ("baseline", "auto"):
        answer = served.infer_recommendations(
            "ann",
            candidates=[10, 13, 16],
            request_time=NOW,
            use_optimization=strategy,  # type: ignore[arg-type]
        )
        assert answer.strategy == "baseline"
        assert sorted(answer.items.tolist()) == [10, 13, 16]
        assert answer.labels == ("cold_start",)
    assert len(served.infer_recommendations("ann", request_time=NOW, top_k=4)) == 4


def test_engines_that_need_triton_are_unavailable(repository: Path) -> None:
    served = pipeline(repository)
    with pytest.raises(UnavailableError, match="strategy tensorrt: mtgr_tensorrt_rank is not installed"):
        served.infer_recommendations("ann", candidates=[10], request_time=NOW, use_optimization="tensorrt")
    with pytest.raises(UnavailableError, match="strategy vllm: mtgr_vllm is not installed"):
        served.infer_recommendations("ann", request_time=NOW, use_optimization="vllm")


def test_installed_engines_that_need_triton_say_so(repository: Path) -> None:
    version = repository / "mtgr_tensorrt_rank" / "1"
    version.mkdir(parents=True)
    manifest = (repository / "mtgr_baseline" / "1" / "manifest.json").read_bytes()
    (version / "manifest.json").write_bytes(manifest)
    with pytest.raises(UnavailableError, match="runs inside Triton only; start a server"):
        pipeline(repository).infer_recommendations(
            "ann", candidates=[10], request_time=NOW, use_optimization="tensorrt"
        )


def test_an_engine_that_is_not_exported_names_the_command(repository: Path) -> None:
    with pytest.raises(UnavailableError, match=r"mtgr_onnx_rank is not installed .*make export"):
        pipeline(repository).infer_recommendations("ann", candidates=[10], request_time=NOW, use_optimization="onnx")


def test_a_damaged_engine_is_unavailable(repository: Path) -> None:
    (repository / "mtgr_baseline" / "1" / "model.safetensors").write_bytes(b"noise")
    served = pipeline(repository)
    with pytest.raises(UnavailableError, match="strategy baseline"):
        served.infer_recommendations("ann", candidates=[10], request_time=NOW, use_optimization="baseline")
    with pytest.raises(UnavailableError, match="no engine is ready"):
        served.infer_recommendations("ann", candidates=[10], request_time=NOW)


def test_wrong_requests_are_refused_as_at_the_door(repository: Path) -> None:
    served = pipeline(repository)
    with pytest.raises(InvalidRequestError, match="candidates holds -1 at index 0"):
        served.infer_recommendations("ann", candidates=[-1], request_time=NOW)
    with pytest.raises(InvalidRequestError, match="strategy is 'gpu'; it must be one of"):
        served.infer_recommendations("ann", use_optimization="gpu")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="candidates is empty"):
        served.infer_recommendations("ann", candidates=[], request_time=NOW)


def test_weights_of_unknown_tasks_are_refused(repository: Path) -> None:
    with pytest.raises(ConfigurationError, match="weight for 'clicks'"):
        pipeline(repository, task_weights={"clicks": 1.0})
